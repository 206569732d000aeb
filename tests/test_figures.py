"""Figures and the figures notebook on synthetic artifacts: what is drawn, reproducible files, studies with gaps."""

import itertools
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
from hfprune_nb.report import ground_truth, neurons, next_tokens, style
from hfprune_nb.report.criterion import against_ratio, criterion_table
from hfprune_nb.report.paired import PAIRED, forest, hero, paired_table
from hfprune_nb.report.results import collect, first_seeds, kept, scores
from hfprune_nb.report.table import Table
from hfprune_nb.runs import artifacts, parameters, stage

matplotlib.use("Agg")
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def results(folder):
    return collect(synthetic.study(folder / "evaluation", ratios=(0.1, 0.2), n_items=20))


@pytest.fixture(scope="module")
def criterion(results):
    return criterion_table(results)


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


# How the world looks in linear sRGB without cones for green or for red (Machado, Oliveira and Fernandes 2009, severity 1).
VISIONS = {
    "full": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OKLAB = [
    [0.2104542553, 0.793617785, -0.0040720468],
    [1.9779984951, -2.428592205, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.808675766],
]


def distances(colours):
    """Return how far colours are apart in Oklab (Ottosson 2020) for the eyes that tell them apart worst, (colours, colours)."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = [
        np.cbrt((linear @ np.transpose(vision)).clip(0, 1) @ np.transpose(CONES)) @ np.transpose(OKLAB)
        for vision in VISIONS.values()
    ]
    return np.min([np.linalg.norm(lab[:, None] - lab[None], axis=-1) for lab in seen], axis=0)


@pytest.mark.parametrize("look, length", [(style.look, 19), (style.neutral, 19)])
def test_no_two_criteria_of_one_figure_look_alike(look, length):
    """Every one has its own marker; where some eyes confuse the colours, the dashes differ."""
    looks = [look(index) for index in range(length)]
    assert len({str(own["marker"]) for own in looks}) == length >= 16
    apart = distances([own["color"] for own in looks])
    close = [pair for pair in itertools.combinations(range(length), 2) if apart[pair] < 0.07]
    assert all(looks[a]["linestyle"] != looks[b]["linestyle"] for a, b in close) and close, "otherwise nothing was tested"
    assert (distances(["#FFFFFF", *dict.fromkeys(own["color"] for own in looks)])[0, 1:] > 0.15).all(), "invisible on white"


def test_the_papers_three_keep_their_looks_and_every_variant_gets_its_own():
    alone, specs = style.Legend(synthetic.THREE), [*synthetic.THREE, "magnitude", "random"]
    variants = [{"self_distillation": {"alpha": alpha}, "as": f"sd_{alpha}"} for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)]
    global_ = [(name, "global") for name in synthetic.THREE]
    crowded = style.Legend([*specs, *variants, *global_])
    assert all(alone.look(name) == crowded.look(name) for name in synthetic.THREE)
    names = crowded.in_order(
        [*specs, *(f"sd_{alpha}" for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)), *(f"{n}@global" for n in synthetic.THREE)]
    )
    assert len({str(crowded.look(name)) for name in names}) == len(names) == 13
    assert names[0] == "one_hot_ce" and names[-2:] == ["magnitude", "random"]
    assert crowded.label("sd_0.4") == "Self-distillation (alpha 0.4)" and crowded.label("entropy@global").startswith(
        "Entropy (HFPrune), "
    )


def test_one_colour_means_one_criterion():
    legend = style.Legend([*synthetic.THREE, ("entropy", "global"), ("entropy", "depth"), ("one_hot_ce", "global")])
    allocated = [legend.look(f"entropy{allocation}") for allocation in ("", "@depth", "@global")]
    assert {look["color"] for look in allocated} == {legend.colour("entropy")} and len(
        {look["marker"] for look in allocated}
    ) == 3
    for pair in (("one_hot_ce", "entropy"), ("entropy", "one_hot_ce"), ("one_hot_ce@global", "entropy@global")):
        assert legend.pair_look(*pair)["color"] == legend.colour("one_hot_ce")
    assert legend.pair_look("entropy", "entropy@global") == legend.look("entropy@global")
    assert legend.pair_look("one_hot_ce", "self_distillation")["color"] in style.GREYS
    assert not {*style.GREYS} & {*style.COLOURS}, "what is no criterion looks like one"


def test_hero_shows_how_far_each_criterion_is_from_entropy(results, criterion):
    table = paired_table(results)
    figure = hero(table, criterion, MODEL)
    left, middle, right = figure.axes
    assert left.get_title().startswith("average") and middle.get_title().startswith("log-perplexity")
    assert right.get_title().startswith("JS distance"), "the measures on which the verdict rests"
    words = figure.legends[0].get_texts()
    assert [text.get_text() for text in words] == ["One-hot CE", "Self-distillation"]
    against = table.long[(table.long["a"] == "entropy") & (table.long["column"] == "perplexity:c4")]
    drawn = [point.lines[0].get_xdata()[0] for point in middle.containers]
    assert sorted(drawn) == pytest.approx(sorted(-against["mean"])) and len(drawn) == 2 * against["ratio"].nunique()
    assert "not drawn, at 10 %: Magnitude" in figure.get_label() and figure.get_figwidth() == style.WIDTH


def test_no_criterion_is_called_best_whose_interval_does_not_say_so():
    rows = [("one_hot_ce", 0.59, 0.39), ("entropy", 0.58, 0.39)]
    frame = pd.DataFrame(rows, columns=["predictor", "spearman", "low"]).assign(scope="within", target="kl")
    legend = style.Legend(["one_hot_ce", "entropy"])
    assert "all criteria rank" in ground_truth._caption(frame, ["one_hot_ce", "entropy"], legend)
    sure = ground_truth._caption(frame.assign(low=[0.585, 0.39]), ["one_hot_ce", "entropy"], legend)
    assert "One-hot CE ranks" in sure and "worst (0.58)" in sure


def test_a_crowd_keeps_to_the_width_and_each_is_named(results):
    table = paired_table(results)
    rows = table.long[table.long["ratio"] == 0.2]
    specs = [{"self_distillation": {"alpha": n / 30}, "as": f"variant_{n:02}"} for n in range(24)]
    crowd = pd.concat([rows.query("a == 'entropy' and b == 'one_hot_ce'").assign(b=spec["as"]) for spec in specs])
    legend = style.Legend([*synthetic.THREE, *specs])
    figure = forest(Table("paired", "", crowd, None, (), legend), MODEL)
    assert figure.get_figwidth() == style.WIDTH and len(figure.axes) == 3
    assert len(figure.axes[0].get_yticklabels()) == 24


def test_every_criterion_is_held_against_entropy_and_no_baseline_is():
    legend = style.Legend(
        [*synthetic.THREE, "random", {"entropy": {"aggregation": "weight"}, "as": "entropy_w"}, ("entropy", "global")]
    )
    names = [*synthetic.THREE, "random", "dense", "entropy_w", "entropy@global"]
    assert set(legend.pairs(names)) == {
        ("one_hot_ce", "self_distillation"),
        ("one_hot_ce", "entropy"),
        ("self_distillation", "entropy"),
        ("entropy", "entropy_w"),
        ("entropy", "entropy@global"),
    }
    assert legend.pairs(["magnitude", "self_distillation", "one_hot_ce"]) == [("one_hot_ce", "self_distillation")]
    assert legend.pairs([]) == []


def test_forest_draws_every_pair_and_marks_what_is_certain(results):
    table = paired_table(results)
    paired, figure = table.long, forest(table, MODEL)
    words = texts(figure)
    assert "Entropy (HFPrune) − One-hot CE" in words and "log-perplexity c4\nnats per token" in words
    drawn = [ax for ax in figure.axes if ax.containers]
    assert len(drawn) == paired["column"].nunique() and all(len(ax.containers) == 6 for ax in drawn)
    hollow = sum(c.lines[0].get_markerfacecolor() == "white" for ax in drawn for c in ax.containers)
    assert hollow == (~paired["verdict"].str.endswith(" better")).sum()


def test_heat_map_has_a_panel_per_criterion(scorings):
    words = texts(neurons.importance_heatmap(scorings[0]))
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
    words = texts(neurons.rank_agreement_figure(frame, MODEL, style.Legend()))
    assert "mean and range of 3 seeds" in words and "Magnitude" not in words


def test_chance_overlap_is_that_of_random_sets():
    rng = np.random.default_rng(0)
    drawn = [neurons.jaccard(rng.permutation(40)[:25], rng.permutation(40)[:25]) for _ in range(4000)]
    assert neurons.chance_jaccard(25, 25, 40) == pytest.approx(np.mean(drawn), abs=0.004)
    assert neurons.chance_jaccard(40, 40, 40) == 1.0


def test_kept_overlap_has_both_references(prunings):
    frame = neurons.kept_overlap(neurons.kept_pairs(prunings, style.Legend()))
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
    assert "expected by chance" in texts(neurons.kept_overlap_figure(frame, MODEL, style.Legend()))


def test_next_tokens_show_what_can_be_printed(results):
    words = texts(next_tokens.next_tokens(results, MODEL, 0.2))
    assert "␣Paris" in words and "↵" in words and "U+7684" in words and "␣$x$" in words and "of 10 shared" in words


def test_tokens_are_shortened_and_never_empty():
    assert next_tokens.shown("") == "(empty)" and len(next_tokens.shown("x" * 50)) == 12


def test_curves_have_a_log_axis_for_perplexity_and_the_dense_line(criterion):
    figure = against_ratio(criterion, MODEL)
    scales = {ax.get_title(): ax.get_yscale() for ax in figure.axes if ax.get_title()}
    assert scales["perplexity on c4"] == "log" and scales["average of tasks"] == "linear"
    assert "Dense" in texts(figure) and "lower is better" in texts(figure)


def test_equal_figures_give_equal_files(criterion, tmp_path):
    for name in ("one", "two"):
        written = style.save(against_ratio(criterion, MODEL), tmp_path / name, "curves", criterion.long)
    assert [path.name for path in written] == ["curves.png", "curves.svg", "curves.txt", "curves.csv"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert b"dc:date" not in written[1].read_bytes()


def test_names_of_figures_are_plain_files(tmp_path):
    drawn = style.per_model("forest", ["org/one", "two"], lambda model: forest(_no_pairs(), model))
    assert list(drawn) == ["forest-org-one", "forest-two"]
    assert "computed nothing" in texts(style.per_model("forest", [], None)["forest"])
    with pytest.raises(UserError, match="plain file name"):
        style.save(drawn["forest-two"], tmp_path, "a/b")


def _no_pairs():
    return Table("paired", "", pd.DataFrame(columns=[*PAIRED, "p_holm", "verdict"]), pd.DataFrame(), ())


def test_figures_of_nothing_say_what_is_missing(tmp_path, results):
    alone = synthetic.scoring(tmp_path / "s", criteria=["entropy"])
    empty = [
        forest(_no_pairs(), MODEL),
        neurons.rank_agreement_figure(neurons.rank_agreement([]), MODEL, style.Legend()),
        neurons.rank_agreement_figure(neurons.rank_agreement([alone]), MODEL, style.Legend()),
        neurons.kept_overlap_figure(neurons.kept_overlap(neurons.kept_pairs([], style.Legend())), MODEL, style.Legend()),
        next_tokens.next_tokens(results, MODEL, 0.77),
        against_ratio(
            Table("none", "", pd.DataFrame(columns=["model", "mean", "measure", "criterion", "column"]), None, ()), MODEL
        ),
    ]
    assert all("to draw" in texts(figure) or "to compare" in texts(figure) for figure in empty)


def test_one_criterion_one_ratio_one_seed(tmp_path):
    results = collect(synthetic.study(tmp_path / "e", ("entropy",), (0.2,), seeds=(0,)))
    table = criterion_table(results)
    scoring = synthetic.scoring(tmp_path / "s", criteria=["entropy"])
    for figure in (
        against_ratio(table, MODEL),
        neurons.importance_heatmap(scoring),
        next_tokens.next_tokens(results, MODEL, 0.2),
    ):
        assert "Entropy (HFPrune)" in texts(figure)
    assert first_seeds([scoring]) == {MODEL: scoring}


def test_flat_importance_still_has_a_colour_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "importance", lambda seed: {"magnitude": np.ones((12, 96))})
    assert "Magnitude" in texts(neurons.importance_heatmap(synthetic.scoring(tmp_path / "flat")))


def test_corrupt_or_missing_artifacts_are_refused(tmp_path):
    folder = synthetic.scoring(tmp_path / "s")
    (folder / "scores.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="corrupt"):
        scores(folder)
    with pytest.raises(UserError, match="missing"):
        kept(tmp_path)


def test_the_report_never_imports_torch():
    code = "import sys; from hfprune_nb.report import criterion, neurons, paired; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.project()).returncode == 0


def artifact(study, stage_name, key, make):
    """Put a synthetic artifact into a study as a finished one."""
    writer = artifacts.Writer(study / stage_name / key)
    make(writer.partial)
    card = {"versions": {}, "platform": "p", "cpu_count": 2, "threads": 1, "git": {"commit": None, "dirty": None}, "facts": {}}
    writer.finish(parameters.complete(stage_name, {}), {}, card)


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
    for name in ("hero", "forest", "next_tokens", "against_ratio"):
        assert all(made.path(f"figures/{name}.{kind}").stat().st_size for kind in ("png", "svg", "txt"))
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.name != "notebook.ipynb"}
    again = tmp_path / "again.ipynb"
    papermill.execute_notebook(paths.notebooks() / "06_figures.ipynb", again, {"study": "paper"}, progress_bar=False)
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.name != "notebook.ipynb"}
    outputs = [output for cell in nbformat.read(again, 4).cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 4
    said = "\n".join(data.get("text/markdown", "") for data in shown)
    assert all(path.read_text().strip() in said for path in made.path("figures").glob("*.txt")), "a figure without its caption"
    assert "The paper (LLaMA-2-7B" in said and "Item sampling alone" in said
    paragraph = made.path("tables/verdict.md").read_text().strip()
    assert paragraph in said and "By the kit's measured rates" in paragraph
    assert json.loads(made.path("tables/verdict.json").read_text())["sentences"]
