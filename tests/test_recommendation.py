"""Which recipe to take: the table, what is chosen of it for each need, sentences and figures."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import synthetic

from hfprune_nb.files import read_json, write_json
from hfprune_nb.report import intervals, recommendation
from hfprune_nb.report.results import collect

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    folders = synthetic.study(folder / "none", ratios=(0.2, 0.3), dense=True)
    folders += synthetic.study(folder / "repaired", ("entropy",), (0.2,), dense=False, compensation="least_squares")
    for seed in (0, 1, 2):
        per_layer = {"allocation": "global", "allocation_spec": "global", "loads_with": "hfprune_nb.load"}
        folders.append(synthetic.evaluation(folder / f"global-{seed}", "one_hot_ce", 0.2, seed, **per_layer))
        folders.append(synthetic.evaluation(folder / f"tuned-{seed}", "one_hot_ce", 0.3, seed, tuned=True))
    return recommendation.recommendation_table(folders)


def row(table, criterion, ratio=0.2, compensation="none"):
    long = table.long
    found = long[(long["criterion"] == criterion) & (long["ratio"] == ratio) & (long["compensation"] == compensation)]
    assert len(found) == 1
    return found.iloc[0]


def test_the_ratio_is_that_of_geometric_means_over_the_same_windows(table, tmp_path):
    folders = synthetic.study(tmp_path, ratios=(0.2,))
    fidelity = collect(folders).fidelity
    logs = np.log(
        fidelity.astype({"kl": float}).groupby(["criterion", "corpus"])["kl"].apply(lambda kl: np.exp(np.log(kl).mean()))
    )
    means = logs.groupby("criterion").mean()
    found = row(table, "self_distillation")
    assert found["times"] == pytest.approx(np.exp(means["self_distillation"] - means["entropy"]), rel=1e-12)
    assert found["kl"] == pytest.approx(np.exp(means["self_distillation"]), rel=1e-12)
    assert found["low"] < found["times"] < found["high"] and found["n_seeds"] == 3


def test_the_reference_is_the_papers_recipe_and_has_no_test(table):
    own = row(table, "entropy")
    assert own["times"] == 1 and np.isnan(own["p"]) and np.isnan(own["p_holm"])
    assert row(table, "entropy", compensation="least_squares")["n_seeds"] == 3
    assert np.isnan(row(table, "magnitude")["p"]), "one seed gives no verdict"


def test_holm_counts_the_recipes_of_one_ratio(table):
    for _, part in table.long.groupby("ratio"):
        assert np.array_equal(part["p_holm"], intervals.holm(part["p"]), equal_nan=True)


def test_each_need_gets_the_best_that_meets_it(table):
    chosen = recommendation.recommendation(table).set_index(["ratio", "need"])
    plain = table.long[(table.long["ratio"] == 0.2) & (table.long["loads_with"] == "plain")]
    best = plain.loc[plain["kl"].idxmin()]
    assert chosen.loc[(0.2, "plain"), "kl"] == best["kl"] and chosen.loc[(0.2, "any"), "kl"] <= best["kl"]
    assert chosen.loc[(0.2, "forward"), "criterion"] in ("magnitude", "random"), "only these run no backward pass here"
    assert "one_hot_ce@global" in set(table.long["criterion"])


def test_passes_of_rounds_and_of_what_an_allocation_measures_are_counted(tmp_path):
    """Twelve layers; two of the measured windows to sixteen of the text: (1 + 5 * 12 / 2) / 8 passes for the curves."""
    measured = {"sensitivity": {"windows": 2}, "as": "measured"}
    rules = {"uniform": "uniform", "dlp": "dlp", "measured": measured}
    folders, prunings = [synthetic.evaluation(tmp_path / "dense")], []
    for criterion, (name, spec) in itertools.product(("magnitude", "entropy"), rules.items()):
        chosen = {"allocation": name, "allocation_spec": spec}
        folders.append(synthetic.evaluation(tmp_path / f"{criterion}-{name}", criterion, 0.2, 0, **chosen))
        summary = read_json(folders[-1] / "summary.json")
        summary["protocol"]["calibration"] = {"corpus": "c4-sample", "n_windows": 16, "seq_len": 8}
        write_json(folders[-1] / "summary.json", summary)
        facts = {"model": MODEL, "criterion": criterion, "ratio": 0.2, "seed": 0, "rounds": 3 if name == "uniform" else 1}
        prunings.append(tmp_path / f"pruned-{criterion}-{name}")
        prunings[-1].mkdir()
        write_json(prunings[-1] / "pruning.json", facts | chosen | {"widths": [5] * 12})
    found = recommendation.recommendation_table(folders, prunings)
    forwards = {row["criterion"]: row["forwards"] for row in found.long.to_dict("records")}
    curves = (1 + 5 * 12 / 2) * 2 / 16
    assert forwards == {"magnitude": 0, "magnitude@dlp": 1, "magnitude@measured": curves, "entropy": 9, "entropy@dlp": 3,
                        "entropy@measured": 3 + curves}  # fmt: skip


def test_sentences_and_figures_name_what_was_found(table):
    told = recommendation.sentences(table)
    assert len(told) == 3 and all(sentence.startswith(f"{MODEL} at 20 %, ") for sentence in told)
    assert "scoring takes no pass" in told[2]
    for draw in (recommendation.pareto_figure, recommendation.against_ratio_figure):
        assert "Entropy (HFPrune)" in words(draw(table, MODEL))
        assert "evaluated" in " ".join(words(draw(table, "another")))


def words(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text)]


def test_a_study_without_pruned_models_says_so(tmp_path):
    table = recommendation.recommendation_table([synthetic.evaluation(tmp_path / "dense")])
    assert table.long.empty and recommendation.sentences(table) == [] and "No rows." in table.markdown()
