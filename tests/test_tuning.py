"""The recovery table: four states of every model, paired gains, and what is left of a gain beyond the dense model's."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic

from hfprune_nb.report import intervals, results, tuning

SPENT = {
    "recipe": {"name": "hfprune-lora", "rank": 32, "learning_rate": 4e-4, "rows_per_step": 4, "seq_len": 256},
    "steps": 40, "tokens": 40_000, "flops": 2.2e13, "data": "instructlab-sdg", "seed": 0, "distillation": 0.0,
}  # fmt: skip


def evaluated(folder, gain=0.0, **changes):
    """An evaluation whose answers are right more often by `gain`, at the items where `gain` turns them."""
    synthetic.evaluation(folder, **({"compensation": "none"} | changes))
    items = pd.read_parquet(folder / "items.parquet")
    turned = np.random.default_rng(1).random(len(items)) < gain
    items.loc[turned, "value"] = 1.0
    items.to_parquet(folder / "items.parquet")
    perplexity = pd.read_parquet(folder / "perplexity.parquet")
    perplexity.assign(nll=perplexity["nll"] - 511 * gain).to_parquet(folder / "perplexity.parquet")
    if changes.get("tuned") and not (folder / "fidelity.parquet").is_file():
        like = synthetic.evaluation(folder.with_name(f"{folder.name}-like"), "entropy", 0.1, 0)
        for name in ("fidelity.parquet", "next_tokens.parquet"):
            (folder / name).write_bytes((like / name).read_bytes())
    return folder


def study(folder, dense_gain=0.1, pruned_gain=0.3, compensation=False, seeds=(0, 1)):
    tuned = {"tuned": True, "recipe": "hfprune-lora", "recovery": SPENT}
    folders = [evaluated(folder / "dense"), evaluated(folder / "dense-tuned", dense_gain, **tuned)]
    for seed in seeds:
        at = {"criterion": "entropy", "ratio": 0.2, "seed": seed}
        folders.append(evaluated(folder / f"pruned-{seed}", **at))
        folders.append(evaluated(folder / f"tuned-{seed}", pruned_gain, **at, **tuned))
        if compensation:
            at["compensation"] = "least_squares"
            folders.append(evaluated(folder / f"compensated-{seed}", 0.05, **at))
            folders.append(evaluated(folder / f"compensated-tuned-{seed}", 0.35, **at, **tuned))
    return folders


def cell(table, state, column="average", criterion="entropy", compensation="none"):
    long = table.long
    (found,) = long[
        (long["state"] == state) & (long["column"] == column) & (long["criterion"] == criterion)
        & (long["compensation"] == compensation)
    ].to_dict("records")  # fmt: skip
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folders = study(tmp_path_factory.mktemp("recovery"), compensation=True)
    return tuning.recovery_table(tuning.Recovered(folders))


def test_every_state_and_both_differences_are_there(table):
    states = table.long.groupby(["criterion", "compensation"])["state"].agg(set).to_dict()
    four = {"untuned", "tuned", tuning.GAIN}
    assert states == {
        ("dense", "none"): four,
        ("entropy", "none"): four | {tuning.BEYOND},
        ("entropy", "least_squares"): four | {tuning.BEYOND},
    }
    assert len(table.display) == 3 + 4 + 4 and set(table.long["source"]) == {"measured"}


@pytest.mark.parametrize("column", ["average", "perplexity:c4", "arc_easy"])
def test_the_difference_in_differences_is_what_it_says(table, column):
    means = {
        (criterion, state): cell(table, state, column, criterion)["mean"]
        for criterion in ("dense", "entropy") for state in ("untuned", "tuned")
    }  # fmt: skip
    if column.startswith("perplexity"):
        means = {key: np.log(value) for key, value in means.items()}
    gains = {name: means[name, "tuned"] - means[name, "untuned"] for name in ("dense", "entropy")}
    found = cell(table, tuning.BEYOND, column)
    assert found["mean"] == pytest.approx(gains["entropy"] - gains["dense"], abs=1e-9)
    assert found["low"] <= found["mean"] <= found["high"] and 0 <= found["p"] <= found["p_holm"] <= 1
    assert cell(table, tuning.GAIN, column)["mean"] == pytest.approx(gains["entropy"], abs=1e-9)
    assert cell(table, tuning.GAIN, column, "dense")["mean"] == pytest.approx(gains["dense"], abs=1e-9)


def test_an_equal_shift_of_every_window_is_found_exactly(table):
    """Perplexity fell by .3 nats in each pruned window and by .1 in each dense one: .2 beyond, and no spread but rounding."""
    found = cell(table, tuning.BEYOND, "perplexity:c4")
    assert found["mean"] == pytest.approx(-0.2) and found["low"] == pytest.approx(-0.2) and found["high"] == pytest.approx(-0.2)


def test_sentences_follow_the_numbers(tmp_path):
    same = tuning.recovery_table(tuning.Recovered(study(tmp_path / "a", 0.0, 0.0)))
    better = tuning.recovery_table(tuning.Recovered(study(tmp_path / "b", 0.0, 0.6)))
    (first,), (second,) = tuning.sentences(same), tuning.sentences(better)
    assert "not told apart" in first and "+0.0 [" in first
    assert "gained more" in second and f"{cell(better, tuning.GAIN)['mean']:+.1f}" in second


def test_verdicts_follow_the_corrected_p_values(table):
    long = table.long[table.long["state"].isin([tuning.GAIN, tuning.BEYOND])]
    for _, family in long.groupby(["model", "column"]):
        assert family["p_holm"].to_numpy() == pytest.approx(intervals.holm(family["p"]), nan_ok=True)
    at = (table.long["column"] == "average") & (table.long["state"] == tuning.BEYOND)
    for p_holm, verdict in ((0.2, "not told apart"), (0.01, "gained more")):
        changed = table.long.assign(mean=4.0, low=1.0, high=7.0, p=0.01, p_holm=table.long["p_holm"].where(~at, p_holm))
        assert all(verdict in sentence for sentence in tuning.sentences(replace(table, long=changed)))


def test_one_seed_gives_no_verdict(tmp_path):
    table = tuning.recovery_table(tuning.Recovered(study(tmp_path, 0.0, 0.6, seeds=(0,))))
    (sentence,) = tuning.sentences(table)
    assert sentence.endswith("one seed: no verdict.") and cell(table, tuning.BEYOND)["low"] > 0
    assert "], one seed" in table.markdown() and table.long["p_holm"].isna().all()


def test_published_values_stand_beside_and_the_price_is_told(table):
    text = table.markdown()
    display = table.display.set_index(["Criterion", "Compensation", "State"])["paper, %"]
    assert display["Dense", "–", "untuned"] == "58.3" and display["Dense", "–", "tuned"] == "–"
    assert display["Entropy (HFPrune)", "–", "tuned"] == "59.0" and display["Entropy (HFPrune)", "–", "untuned"] == "53.1"
    assert "dense row is untuned" in text and "40,000" in text and "hfprune-lora" in text


def test_other_tables_do_not_mix_tuned_models_in(tmp_path):
    folders = study(tmp_path, compensation=True)
    plain = results.collect(folders)
    assert len(plain.models) == 3 and len(results.collect(folders, tuned=True).models) == 3
    assert set(results.collect(folders, True, "least_squares").models["criterion"]) == {"entropy"}


def test_without_tuning_there_is_nothing_to_show(tmp_path):
    plain = [evaluated(tmp_path / "dense"), evaluated(tmp_path / "pruned", criterion="entropy", ratio=0.2, seed=0)]
    assert not tuning.Recovered(plain)
    assert tuning.Recovered(study(tmp_path / "study", seeds=(0,)))


def test_the_figure_shows_hollow_and_filled_marks(table, tmp_path):
    figure = tuning.recovery_figure(table, "smollm2-135m")
    faces = [line.get_markerfacecolor() for ax in figure.axes for line in ax.lines if line.get_marker() == "o"]
    assert faces.count("white") == len(faces) / 2 and len(figure.axes) == 3
    assert json.dumps([text.get_text() for text in figure.axes[0].get_yticklabels()]).count("least squares") == 1
