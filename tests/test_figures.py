"""Figures and the figures notebook on synthetic artifacts: what is drawn, reproducible files, studies with gaps."""

import json
import subprocess
import sys

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import synthetic
from scipy import stats

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.report import figures, measurements, neurons, tables
from hfprune_nb.runs import artifacts, stage

matplotlib.use("Agg")
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def results(folder):
    return measurements.collect(synthetic.study(folder / "evaluation", ratios=(0.1, 0.2), n_items=20))


@pytest.fixture(scope="module")
def criterion(results):
    return tables.criterion_table(results).long


@pytest.fixture(scope="module")
def scorings(folder):
    return [synthetic.scoring(folder / "scoring" / str(seed), seed) for seed in (2, 0, 1)]


@pytest.fixture(scope="module")
def prunings(folder):
    return synthetic.prunings(folder / "pruning")


def texts(figure):
    """Return all words of a figure."""
    figure.canvas.draw()
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_colours_are_distinct_and_cover_every_criterion():
    assert set(figures.COLOURS) == set(measurements.ORDER) and len(set(figures.COLOURS.values())) == 6
    assert set(figures.MARKERS) == set(figures.DASHES) == set(measurements.ORDER) - {"dense"}
    assert len(set(figures.MARKERS.values())) == len({str(dash) for dash in figures.DASHES.values()}) == 5


def test_forest_draws_every_pair_and_marks_what_is_certain(results):
    paired = tables.paired_table(results).long
    figure = figures.forest(paired, MODEL)
    words = texts(figure)
    assert "Entropy (HFPrune) − One-hot CE" in words and "log-perplexity c4\nnats per token" in words
    drawn = [ax for ax in figure.axes if ax.containers]
    assert len(drawn) == paired["column"].nunique() and all(len(ax.containers) == 6 for ax in drawn)
    hollow = sum(c.lines[0].get_markerfacecolor() == "white" for ax in drawn for c in ax.containers)
    assert hollow == (~paired["verdict"].str.endswith(" better")).sum()


def test_heat_map_has_a_panel_per_criterion(scorings):
    words = texts(figures.importance_heatmap(scorings[0]))
    for name in ("One-hot CE", "Self-distillation", "Entropy (HFPrune)", "Magnitude", "Random", "seed 2"):
        assert name in words


def test_importance_bins_are_sorted_relative_means():
    importance = np.arange(1, 13, dtype=float).reshape(2, 6)
    bins = neurons.importance_bins(importance, 3)
    assert bins == pytest.approx(np.array([[5.5, 3.5, 1.5], [11.5, 9.5, 7.5]]) / 6.5)
    importance[0, 0] = -np.inf
    assert np.isfinite(neurons.importance_bins(importance, 3)).all()
    assert np.isnan(neurons.importance_bins(importance, 6)[0, -1])


def test_rank_agreement_is_spearmans(scorings):
    frame = neurons.rank_agreement(scorings)
    assert len(frame) == 3 * 12 * 10 and list(frame["seed"].unique()) == [0, 1, 2]
    importance = synthetic.importance(1)
    row = frame.query("seed == 1 and layer == 3 and a == 'one_hot_ce' and b == 'entropy'").iloc[0]
    assert row["spearman"] == pytest.approx(stats.spearmanr(importance["one_hot_ce"][3], importance["entropy"][3])[0])
    words = texts(figures.rank_agreement(frame, MODEL))
    assert "mean and range of 3 seeds" in words and "Magnitude" not in words


def test_chance_overlap_is_that_of_random_sets():
    rng = np.random.default_rng(0)
    drawn = [neurons.jaccard(rng.permutation(40)[:25], rng.permutation(40)[:25]) for _ in range(4000)]
    assert neurons.chance_jaccard(25, 25, 40) == pytest.approx(np.mean(drawn), abs=0.004)
    assert neurons.chance_jaccard(40, 40, 40) == 1.0


def test_kept_overlap_has_both_references(prunings):
    frame = neurons.kept_overlap(prunings, measurements.CRITERIA)
    at = frame[(frame["ratio"] == 0.2) & (frame["layer"] == 0)].set_index("comparison")
    assert set(at.index) == {
        "One-hot CE / Self-distillation",
        "One-hot CE / Entropy (HFPrune)",
        "Self-distillation / Entropy (HFPrune)",
        "One-hot CE, two seeds",
        "Self-distillation, two seeds",
        "Entropy (HFPrune), two seeds",
        neurons.CHANCE,
    }
    assert (at["n_pairs"].drop(neurons.CHANCE) == 3).all()
    assert at.loc["Entropy (HFPrune), two seeds", "jaccard"] > at.loc[neurons.CHANCE, "jaccard"]
    assert "expected by chance" in texts(figures.kept_overlap(frame, MODEL))


def test_next_tokens_show_what_can_be_printed(results):
    words = texts(figures.next_tokens(results, MODEL, 0.2))
    assert "␣Paris" in words and "↵" in words and "U+7684" in words and "␣$x$" in words and "of 10 shared" in words


def test_tokens_are_shortened_and_never_empty():
    assert figures.shown("") == "(empty)" and len(figures.shown("x" * 50)) == 12


def test_curves_have_a_log_axis_for_perplexity_and_the_dense_line(criterion):
    figure = figures.against_ratio(criterion, MODEL)
    scales = {ax.get_title(): ax.get_yscale() for ax in figure.axes if ax.get_title()}
    assert scales["perplexity, c4"] == "log" and scales["average of tasks"] == "linear"
    assert "Dense" in texts(figure) and "lower is better" in texts(figure)


def test_equal_figures_give_equal_files(criterion, tmp_path):
    for name in ("one", "two"):
        written = figures.save(figures.against_ratio(criterion, MODEL), tmp_path / name, "curves", criterion)
    assert [path.name for path in written] == ["curves.png", "curves.svg", "curves.csv"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert b"dc:date" not in written[1].read_bytes()


def test_names_of_figures_are_plain_files(tmp_path):
    drawn = figures.per_model("forest", ["org/one", "two"], lambda model: figures.forest(_no_pairs(), model))
    assert list(drawn) == ["forest-org-one", "forest-two"]
    assert "computed nothing" in texts(figures.per_model("forest", [], None)["forest"])
    with pytest.raises(UserError, match="plain file name"):
        figures.save(drawn["forest-two"], tmp_path, "a/b")


def _no_pairs():
    return pd.DataFrame(columns=[*tables.PAIRED, "p_holm", "verdict"])


def test_figures_of_nothing_say_what_is_missing(tmp_path, results):
    alone = synthetic.scoring(tmp_path / "s", criteria=["entropy"])
    empty = [
        figures.forest(_no_pairs(), MODEL),
        figures.rank_agreement(neurons.rank_agreement([]), MODEL),
        figures.rank_agreement(neurons.rank_agreement([alone]), MODEL),
        figures.kept_overlap(neurons.kept_overlap([], measurements.CRITERIA), MODEL),
        figures.next_tokens(results, MODEL, 0.77),
        figures.against_ratio(pd.DataFrame(columns=["model", "mean", "measure", "criterion", "column"]), MODEL),
    ]
    assert all("to draw" in texts(figure) or "to compare" in texts(figure) for figure in empty)


def test_one_criterion_one_ratio_one_seed(tmp_path):
    results = measurements.collect(synthetic.study(tmp_path / "e", ("entropy",), (0.2,), seeds=(0,)))
    long = tables.criterion_table(results).long
    scoring = synthetic.scoring(tmp_path / "s", criteria=["entropy"])
    for figure in (
        figures.against_ratio(long, MODEL),
        figures.importance_heatmap(scoring),
        figures.next_tokens(results, MODEL, 0.2),
    ):
        assert "Entropy (HFPrune)" in texts(figure)
    assert neurons.first_seeds([scoring]) == {MODEL: scoring}


def test_flat_importance_still_has_a_colour_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "importance", lambda seed: {"magnitude": np.ones((12, 96))})
    assert "Magnitude" in texts(figures.importance_heatmap(synthetic.scoring(tmp_path / "flat")))


def test_damaged_or_missing_artifacts_are_refused(tmp_path):
    folder = synthetic.scoring(tmp_path / "s")
    (folder / "scores.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        neurons.scores(folder)
    with pytest.raises(UserError, match="missing"):
        neurons.kept(tmp_path)


def test_the_report_never_imports_torch():
    code = "import sys; from hfprune_nb.report import figures, neurons, tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.project()).returncode == 0


def artifact(study, stage_name, key, make):
    """Put a synthetic artifact into a study as a finished one."""
    writer = artifacts.Writer(study / stage_name / key)
    make(writer.partial)
    card = {"versions": {}, "platform": "p", "cpu_count": 2, "threads": 1, "git": {"commit": None, "dirty": None}, "facts": {}}
    writer.finish({}, {}, card)


def test_the_notebook_writes_everything_and_redraws_when_done(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path))
    study = tmp_path / "paper"
    cells = [("dense", 0.0, None)] + [(c, r, s) for c in ("entropy", "one_hot_ce") for r in (0.1, 0.2) for s in (0, 1)]
    for i, (name, ratio, seed) in enumerate(cells):
        artifact(
            study, "evaluation", f"{i:016x}", lambda to, n=name, r=ratio, s=seed: synthetic.evaluation(to, n, r, s, n_items=15)
        )
    made = stage.execute("figures", "paper", {})
    for name in ("criterion.csv", "ablation.md", "fidelity.html", "paired.csv", "published.md", "published_defects.csv"):
        assert made.path(f"tables/{name}").stat().st_size
    assert json.loads(made.path("tables/protocol.json").read_text())["settings"]["dtype"] == ["bfloat16"]
    for name in ("forest", "next_tokens", "against_ratio"):
        assert made.path(f"figures/{name}.png").stat().st_size and made.path(f"figures/{name}.svg").stat().st_size
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.name != "notebook.ipynb"}
    again = tmp_path / "again.ipynb"
    papermill.execute_notebook(paths.notebooks() / "06_figures.ipynb", again, {"study": "paper"}, progress_bar=False)
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.name != "notebook.ipynb"}
    outputs = [output for cell in nbformat.read(again, 4).cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 3
    said = "".join(data.get("text/markdown", "") for data in shown)
    assert "The paper (LLaMA-2-7B" in said and "would have been found with 80 % chance" in said and "Item sampling alone" in said
