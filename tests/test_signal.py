"""Probabilities of choices by hand, signal-to-noise against known spreads, and tasks whose answers tip over together."""

import numpy as np
import pandas as pd
import pytest
import synthetic
from scipy.special import softmax

from hfprune_nb.report import choices
from hfprune_nb.report.components import components_table
from hfprune_nb.report.paired import paired_table
from hfprune_nb.report.results import choice_columns, collect, sample
from hfprune_nb.report.signal import AVERAGE, _ratio, answers_table, sentences, signal_table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return collect(synthetic.study(tmp_path_factory.mktemp("study")))


def items(likelihoods, characters, sizes, right, metric="acc_norm"):
    row = {"task": "a", "doc_id": 0, "metric": metric, "value": 0.0, "loglikelihoods": likelihoods}
    return pd.DataFrame([row | {"characters": characters, "bytes": sizes, "right": right}])


def test_measures_of_an_item_made_by_hand():
    found = choices.measures(items([-6.0, -4.0], [6, 2], [8, 2], 0)).iloc[0]
    expected = softmax([-1.0, -2.0])[0]
    assert (found["chosen"], found["right"]) == (0, 0)
    assert found["p_right"] == pytest.approx(expected) and found["log_p_right"] == pytest.approx(np.log(expected))
    assert found["bits_per_byte"] == pytest.approx(6 / 8 / np.log(2))
    assert choices.measures(items([-6.0, -4.0], [6, 2], [8, 2], 0, "acc")).iloc[0]["chosen"] == 1


def test_items_without_one_right_choice_say_nothing():
    frame = pd.concat([items([-1.0, -2.0], [1, 1], [1, 1], -1), items(None, None, None, np.nan)])
    assert choices.measures(frame).empty


def test_what_is_chosen_is_what_the_harness_counts(results):
    told = choices.measures(results.items)
    assert len(told) == len(results.items)
    np.testing.assert_array_equal((told["chosen"] == told["right"]).astype(float), told["value"])


def test_balanced_accuracy_of_one_answer_is_chance():
    right = pd.Series([0, 1, 1, 1, 1])
    assert choices.balanced_accuracy(pd.Series([1] * 5), right) == 0.5
    assert choices.balanced_accuracy(right, right) == 1


def test_signal_over_noise_is_the_range_over_the_spread_of_seeds(results):
    long = signal_table(results).long
    row = long[(long["task"] == "boolq") & (long["measure"] == "p_right")].iloc[0]
    told = choices.measures(results.items[results.items["task"] == "boolq"])
    seeds = told.groupby(["criterion", "ratio", "seed"])["p_right"].mean()
    models = seeds.groupby(["criterion", "ratio"])
    noise = np.sqrt(models.var().dropna().mean())
    assert row["ratio"] == pytest.approx((models.mean().max() - models.mean().min()) / noise)
    assert row["low"] < row["ratio"] < row["high"]
    average = long[long["task"] == AVERAGE].set_index("measure")
    assert average["gain"]["p_right"] == average["ratio"]["p_right"] / average["ratio"]["task"]


def test_intervals_cover_the_ratio_to_a_noise_that_is_known():
    rng, covered, draws = np.random.default_rng(0), 0, 200
    index = pd.MultiIndex.from_product([["a", "b", "c"], [0.1, 0.2], range(4)], names=["criterion", "ratio", "seed"])
    for _ in range(draws):
        found = _ratio(pd.Series(rng.normal(size=24), index))
        covered += found["low"] <= found["signal"] <= found["high"]
    assert covered / draws > 0.95 - 3 * (0.05 * 0.95 / draws) ** 0.5


def test_a_task_that_gives_one_answer_is_flagged(tmp_path):
    folders = synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), (0, 1))
    for folder in folders:
        if "entropy" in folder.name:
            frame = pd.read_parquet(folder / "items.parquet")
            boolq = frame["task"] == "boolq"
            frame.loc[boolq, "loglikelihoods"] = pd.Series([[-9.0, -2.0]] * boolq.sum(), frame.index[boolq])
            frame.loc[boolq, "value"] = (frame.loc[boolq, "right"] == 1).astype(float)
            frame.to_parquet(folder / "items.parquet")
    found = collect(folders)
    table = answers_table(found)
    tips = table.long[table.long["tips"]]
    assert tips[["criterion", "task"]].to_numpy().tolist() == [["entropy", "boolq"]]
    assert tips["share"].item() == 1 and tips["balanced"].item() == 0.5
    assert any("boolq: 1 of 2 pruned models" in sentence for sentence in sentences(signal_table(found), table))


def test_choices_are_paired_and_taken_apart_as_other_measures_are(tmp_path):
    results = collect(synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), (0, 1)))
    long = paired_table(results, of_choices=True).long
    assert set(long["measure"]) == set(choices.MEASURES) and long["p"].notna().any()
    assert long[["margin", "p_equivalent"]].isna().all(axis=None)
    assert set(choices.MEASURES) <= set(components_table(results).long["measure"])
    column = choice_columns(results, "smollm2-135m")[0]
    assert sample(results, column, "smollm2-135m", "entropy", 0.2)["value"].between(0, 100).all()


def test_evaluations_without_choices_still_have_the_signal_of_accuracy(tmp_path):
    folders = synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), (0, 1))
    for folder in folders:
        pd.read_parquet(folder / "items.parquet").drop(columns=list(choices.COLUMNS)).to_parquet(folder / "items.parquet")
    found = collect(folders)
    table = signal_table(found)
    assert set(table.long["measure"]) == {"task"} and "kept no log-likelihoods" in table.notes[0]
    assert choice_columns(found, "smollm2-135m") == [] and answers_table(found).long.empty
    assert paired_table(found, of_choices=True).long.empty
