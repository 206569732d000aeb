"""The reviewers' questions on synthetic artifacts: known answers, both outcomes of every sentence, the notebook."""

import itertools
import json
from dataclasses import replace

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import synthetic
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.report import convergence, distribution, gradient, ground_truth, neurons, widths
from hfprune_nb.report.results import collect, legend, prunings
from hfprune_nb.report.results import experiment as read_experiment
from hfprune_nb.report.style import Legend
from hfprune_nb.runs import artifacts, stage

matplotlib.use("Agg")
MODEL, LEGEND = "smollm2-135m", Legend()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("questions")


@pytest.fixture(scope="module")
def scorings(folder):
    return [synthetic.scoring(folder / "scoring" / str(seed), seed) for seed in (1, 0)]


@pytest.fixture(scope="module")
def experiment(folder):
    return synthetic.experiments(folder / "experiments")


@pytest.fixture(scope="module")
def predictions(experiment, scorings):
    return ground_truth.predictions([experiment], scorings)


@pytest.fixture(scope="module")
def results(folder):
    return collect(synthetic.study(folder / "evaluation", synthetic.THREE, (0.1, 0.2), tasks={"boolq": "acc"}))


def texts(figure):
    """Return all words of a figure."""
    figure.canvas.draw()
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def choices(between, within, n_seeds=3, noise=0.01, random=0):
    """The overlaps of one pair of criteria with several seeds in twelve layers; `noise` is what a seed does to its overlaps."""
    rng = np.random.default_rng(random)
    names = ("One-hot CE / Entropy (HFPrune)", "One-hot CE, two seeds", "Entropy (HFPrune), two seeds", neurons.CHANCE)
    same, two = [(seed, seed) for seed in range(n_seeds)], list(itertools.combinations(range(n_seeds), 2))
    lucky = rng.normal(0, noise, (len(names), n_seeds)) * [[1], [1], [1], [0]]
    rows = [
        (MODEL, 0.2, layer, name, "", "", seeds, level + lucky[i, list(seeds)].mean() + 0.001 * rng.normal())
        for i, (name, level, pairs) in enumerate(zip(names, (between, within, within, 0.3), (same, two, two, two), strict=True))
        for layer in range(12) for seeds in pairs
    ]  # fmt: skip
    return neurons.choice(pd.DataFrame(rows, columns=neurons.PAIRS))


def test_different_choices_are_told_from_calibration_noise():
    frame = choices(between=0.6, within=0.8)
    assert frame["difference"].iloc[0] == pytest.approx(0.2, abs=0.02) and frame["low"].iloc[0] > 0
    assert "by more than calibration noise at every ratio" in neurons.choice_sentence(frame, MODEL)
    assert "chance 0.3" in neurons.choice_sentence(frame, MODEL)


def test_equal_choices_are_not_called_different():
    frame = choices(between=0.8, within=0.8)
    assert "by more than calibration noise at no ratio" in neurons.choice_sentence(frame, MODEL)
    assert "two seeds are too few" in neurons.choice_sentence(choices(between=0.6, within=0.8, n_seeds=2), MODEL)
    found = [choices(0.8, 0.8, random=number)["p_holm"].iloc[0] < 0.05 for number in range(200)]
    assert np.mean(found) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200), "seeds are the unit: many layers prove nothing"
    nothing = neurons.choice(pd.DataFrame(columns=neurons.PAIRS))
    assert "two seeds each are needed" in neurons.choice_sentence(nothing, MODEL)


def test_the_overlap_of_a_study_gives_an_answer(tmp_path):
    frame = neurons.choice(neurons.kept_pairs(synthetic.prunings(tmp_path), LEGEND))
    assert len(frame) == 9 and set(frame["ratio"]) == {0.1, 0.2, 0.3}
    assert (frame["between"] < frame["within"]).all() and "noise" in neurons.choice_sentence(frame, MODEL)


def test_predictions_are_sums_over_the_silenced_neurons(predictions, experiment):
    ablations = pd.read_parquet(experiment / "ablations.parquet")
    mean = (synthetic.importance(0)["one_hot_ce"] + synthetic.importance(1)["one_hot_ce"]) / 2
    ours = predictions[predictions["predictor"] == "one_hot_ce"]
    group = ablations.index[ablations["size"] == 16][0]
    expected = mean[ablations.loc[group, "layer"], list(ablations.loc[group, "neurons"])].sum()
    assert ours["predicted"].iloc[group] == pytest.approx(expected) and len(ours) == len(ablations)
    assert np.isfinite(predictions["predicted"]).all(), "a first stage's negative ranks count as nothing"


def test_correlations_are_spearmans_within_layers(predictions):
    table = ground_truth.truth_table(predictions, LEGEND, ["Protocol. Synthetic."])
    row = table.long.query("predictor == 'entropy' and target == 'kl' and scope == 'within'").iloc[0]
    singles = predictions[(predictions["predictor"] == "entropy") & (predictions["size"] == 1)]
    expected = np.mean([stats.spearmanr(part["predicted"], part["kl"]).statistic for _, part in singles.groupby("layer")])
    assert row["spearman"] == pytest.approx(expected) and row["low"] < expected < row["high"] and row["n"] == len(singles)
    signed = table.long.query("predictor == 'predicted_ce' and target == 'ce'")
    assert (signed["spearman"] > 0.99).all(), "a signed prediction is held against the signed change"
    assert "Entropy (HFPrune)" in table.markdown() and "Protocol. Synthetic." in table.markdown()


def test_the_criterion_that_made_the_damage_is_called_closer(predictions):
    assert "Entropy (HFPrune) is closer to the truth than" in ground_truth.truth_sentence(predictions, MODEL, LEGEND)


def test_damage_that_no_criterion_knows_tells_none_apart(tmp_path, scorings):
    unrelated = ground_truth.predictions([synthetic.experiments(tmp_path / "e", true_criterion=None)], scorings)
    sentence = ground_truth.truth_sentence(unrelated, MODEL, LEGEND)
    assert "closer to the truth" not in sentence and sentence.count("not told apart") == 3
    few = unrelated[unrelated["predictor"] == "entropy"]
    assert "fewer than two criteria" in ground_truth.truth_sentence(few, MODEL, LEGEND)


def test_differences_by_position_are_those_of_the_windows(results):
    frame = distribution.entropy_split(results)
    assert set(frame["positions"]) == set(distribution.POSITIONS) and len(frame) == 2 * 2 * 2 * 3
    row = frame.query("corpus == 'c4' and ratio == 0.2 and positions == 'low_entropy' and other == 'one_hot_ce'").iloc[0]
    windows = results.fidelity_positions.query("corpus == 'c4' and ratio == 0.2 and positions == 'low_entropy'")
    means = windows.groupby("criterion")["kl"].mean()
    assert row["difference"] == pytest.approx(means["entropy"] - means["one_hot_ce"])
    assert (frame["p_holm"] >= frame["p"]).all()
    text = distribution.entropy_table(frame, results, LEGEND).markdown()
    assert "low-entropy half" in text and "Protocol." in text


def test_the_two_sides_of_a_difference_are_weighted_as_it_is(results):
    fidelity = results.fidelity_positions
    uneven = fidelity.assign(compared=fidelity["compared"].where(fidelity["window"] % 3 > 0, 20))
    frame = distribution.entropy_split(replace(results, fidelity_positions=uneven))
    assert (frame["entropy"] - frame["value_other"]).to_numpy() == pytest.approx(frame["difference"].to_numpy())
    broken = uneven.assign(kl=uneven["kl"].where(uneven["criterion"] != "one_hot_ce"))
    assert set(distribution.entropy_split(replace(results, fidelity_positions=broken))["other"]) == {"self_distillation"}


def test_the_sentence_on_the_distribution_has_both_outcomes(results):
    frame = distribution.entropy_split(results)
    sentence = distribution.entropy_sentence(frame, MODEL, LEGEND)
    certain = frame[(frame["high"] < 0) & (frame["p_holm"] < 0.05) & (frame["other"] == "self_distillation")]
    assert len(certain) and f"against Self-distillation, closer in {len(certain)} and further away in 0 of 12" in sentence
    some = frame.assign(p_holm=frame["p_holm"].where(frame["positions"] == "low_entropy", 1.0))
    assert "(closer: c4, low-entropy half at " in distribution.entropy_sentence(some, MODEL, LEGEND)
    undecided = distribution.entropy_sentence(frame.assign(p_holm=1.0), MODEL, LEGEND)
    assert undecided.count("closer in 0 and further away in 0 of 12") == 2 and "(closer:" not in undecided
    assert "says nothing about others" in distribution.entropy_sentence(frame.assign(p=np.nan), MODEL, LEGEND)
    assert "not evaluated on the same" in distribution.entropy_sentence(distribution.entropy_split(None), MODEL, LEGEND)


def test_main_tables_read_all_positions_only(results):
    assert set(results.fidelity["positions"]) == {"all"} and len(results.fidelity_positions) == 3 * len(results.fidelity)


def test_convergence_ends_at_one_with_itself_and_below_with_another_seed(scorings):
    frame = convergence.convergence(scorings, {MODEL: 0.4})
    own = frame[frame["against"] == "own total"]
    assert set(frame["criterion"]) == set(synthetic.THREE) and sorted(frame["n"].unique()) == [1, 2, 4, 8]
    assert (own.loc[own["n"] == 8, ["jaccard", "spearman"]] == 1).all(axis=None)
    other = frame[frame["against"] == "other seed"].groupby("n")["jaccard"].mean()
    assert other[1] < other[8] < 1


def test_overlap_of_kept_sets_by_hand():
    a, b = [np.array([1.0, 2, 3, 4, 5])], [np.array([1.0, 2, 3, 5, 0])]
    assert neurons.overlap(a, b, 0.4) == pytest.approx(2 / 4)  # {2, 3, 4} and {1, 2, 3}
    assert neurons.rank_correlation(a, a) == 1 and neurons.overlap(a, b, 0.0) == 1


def test_texts_are_compared_with_two_seeds_of_one(experiment, tmp_path, scorings):
    frame = convergence.corpora([experiment], {MODEL: 0.4})
    assert list(frame["seeds"]) == [True, True, False, False]
    converging = convergence.convergence(scorings, {MODEL: 0.4})
    sentence = convergence.calibration_sentence(converging, frame, MODEL, LEGEND)
    assert "less overlap code" in sentence and "with 4 to" in sentence and "with 8 windows" in sentence
    alike = convergence.corpora([synthetic.experiments(tmp_path / "e", text_changes=False)], {MODEL: 0.4})
    assert "no other text overlaps less" in convergence.calibration_sentence(converging, alike, MODEL, LEGEND)
    assert "say nothing" in convergence.calibration_sentence(converging.iloc[:0], frame.iloc[:0], MODEL, LEGEND)
    assert "next seed" in convergence.corpora_table(frame, ["note"], LEGEND).markdown()


def test_the_zero_gradient_is_shown_or_denied(experiment, tmp_path):
    sentence = gradient.gradient_sentence(gradient.gradients([experiment]), MODEL)
    assert "has no signal, its logit gradient is exactly 0" in sentence and "0.100 after 2.5 %" in sentence
    other = gradient.gradients([synthetic.experiments(tmp_path / "e", gradient=0.3)])
    assert "has a signal" in gradient.gradient_sentence(other, MODEL)
    assert "no gradient" in gradient.gradient_sentence(gradient.gradients([]), MODEL)


def test_the_middle_ratio_is_that_of_the_prunings(tmp_path):
    folders = synthetic.prunings(tmp_path, ("entropy",))
    ratios = sorted({facts["neuron_ratio"] for facts, _ in prunings(folders)})
    assert neurons.neuron_ratio(folders, MODEL) == pytest.approx(ratios[1], abs=1e-3)
    assert neurons.neuron_ratio([], MODEL) == neurons.DEFAULT_NEURON_RATIO


def test_every_figure_says_what_it_shows(predictions, results, scorings, experiment):
    table = ground_truth.truth_table(predictions, LEGEND)
    words = texts(ground_truth.truth_figure(predictions, table.long, MODEL, LEGEND))
    assert "within a layer: " in words and "higher: worse" in words and "signed first-order CE" in words
    words = texts(distribution.entropy_split_figure(distribution.entropy_split(results), MODEL, LEGEND))
    assert "left: entropy is closer" in words and "high-entropy half" in words and "wikitext, 20 %" in words
    frames = convergence.convergence(scorings, {MODEL: 0.4}), convergence.corpora([experiment], {MODEL: 0.4})
    words = texts(convergence.calibration_figure(*frames, MODEL, LEGEND))
    assert "1: same neurons" in words and "c4,\nnext seed" in words and "calibration windows" in words
    words = texts(gradient.gradient_figure(gradient.gradients([experiment]), MODEL, LEGEND))
    assert "dense model" in words and "2.5 %" in words and words.startswith("0 | ")


def test_figures_of_nothing_say_what_is_missing(predictions, scorings):
    empty = [
        ground_truth.truth_figure(predictions.iloc[:0], pd.DataFrame(), MODEL, LEGEND),
        distribution.entropy_split_figure(distribution.entropy_split(None), MODEL, LEGEND),
        convergence.calibration_figure(convergence.convergence([], {}), convergence.corpora([], {}), MODEL, LEGEND),
        gradient.gradient_figure(gradient.gradients([]), MODEL, LEGEND),
    ]
    assert all("nothing to draw" in texts(figure) for figure in empty)


def test_what_is_corrupt_or_missing_is_named(tmp_path, experiment):
    with pytest.raises(UserError, match="run stage 08"):
        read_experiment(tmp_path)
    corrupt = synthetic.scoring(tmp_path / "s")
    (corrupt / "snapshots.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="corrupt"):
        convergence.convergence([corrupt], {MODEL: 0.4})


def test_a_variant_has_its_place_in_every_question(tmp_path, experiment):
    names = ("entropy", "variant")
    scorings = [synthetic.scoring(tmp_path / "s" / str(seed), seed, criteria=names) for seed in (0, 1, 2)]
    prunings = synthetic.prunings(tmp_path / "p", names, (0.2,))
    named, label = legend([*scorings, *prunings]), "Self-distillation (alpha 0.4)"
    assert f"{label} / Entropy (HFPrune)" in neurons.choice_sentence(neurons.choice(neurons.kept_pairs(prunings, named)), MODEL)
    predictions = ground_truth.predictions([experiment], scorings)
    assert label in ground_truth.truth_table(predictions, named).markdown()
    sentence = ground_truth.truth_sentence(predictions, MODEL, named)
    assert f"{label} and Entropy (HFPrune)" in sentence or f"than {label}" in sentence
    converging = convergence.convergence(scorings, {MODEL: 0.4})
    texts_of = convergence.corpora([], {})
    assert label in convergence.calibration_sentence(converging, texts_of, MODEL, named)
    figures = [
        neurons.importance_heatmap(scorings[0]),
        neurons.rank_agreement_figure(neurons.rank_agreement(scorings), MODEL, named),
        ground_truth.truth_figure(predictions, ground_truth.truth_table(predictions, named).long, MODEL, named),
        convergence.calibration_figure(converging, texts_of, MODEL, named),
    ]
    assert all(label in texts(figure).replace("\n", " ") for figure in figures)


def test_layers_of_different_widths_are_compared_layer_by_layer():
    rng = np.random.default_rng(0)
    a = [rng.random(width) for width in (4, 10, 6)]
    b = [a[0], a[1][::-1].copy(), a[2]]
    assert [len(kept) for kept in neurons.kept_sets(a, 0.5)] == [2, 5, 3]
    by_layer = [stats.spearmanr(left, right).statistic for left, right in zip(a, b, strict=True)]
    assert neurons.rank_correlation(a, b) == pytest.approx(np.mean(by_layer))
    assert neurons.overlap(a, a, 0.3) == 1 and neurons.importance_bins(a).shape == (3, 4)


@pytest.mark.parametrize("removed", range(1, 64))
def test_the_kept_set_has_as_many_neurons_as_the_pruned_model(removed):
    (kept,) = neurons.kept_sets([np.arange(1536.0)], removed * 24 / 1536)
    assert len(kept) == 1536 - removed * 24


def artifact(study, stage_name, key, make):
    """Put a synthetic artifact into a study as a finished one."""
    writer = artifacts.Writer(study / stage_name / key)
    make(writer.partial)
    card = {"versions": {"torch": "2"}, "platform": "p", "cpu_count": 2, "threads": 1, "git": {"commit": None}, "facts": {}}
    writer.finish({}, {}, card)


def test_widths_of_every_allocation_are_tabled_and_drawn(tmp_path):
    uniform = [synthetic.pruning(tmp_path / name, name, 0.25, 0) for name in ("entropy", "magnitude")]
    ragged = synthetic.pruning(tmp_path / "ragged", "entropy", 0.25, 1)
    facts = json.loads((ragged / "pruning.json").read_text())
    facts |= {"allocation": "cut", "allocation_spec": {"depth": {}, "as": "cut"}, "widths": [0, *[80] * 11]}
    facts |= {"importance_lost": [0.3, *[0.1] * 11], "importance_lost_exact": [0.1] * 12, "found": {"joint_kl": 0.25}}
    (ragged / "pruning.json").write_text(json.dumps(facts))
    folders = [*uniform, ragged]
    frame, names = widths.widths(folders), legend(folders)
    assert frame.groupby("allocation")["kept"].min().to_dict() == {"uniform": frame["width"].iloc[0] / 96, "cut": 0}
    table = widths.widths_table(folders, names)
    assert table.long["n_models"].tolist() == [2, 1] and table.long["levels"].tolist() == [1, 2]
    assert table.long["rounding"].iloc[1] == pytest.approx(0.2 / 12) and table.long["predicted_kl"].isna().all()
    assert table.display["Allocation"].tolist() == ["Uniform", "Depth"] and "0.25" in table.markdown()
    figure = widths.widths_figure(frame, MODEL, names)
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["Uniform", "Depth"]
    assert widths.widths_table([], names).display.empty and widths.widths_figure(frame, "other", names).axes


def test_the_notebook_answers_every_question(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path))
    study = tmp_path / "asked"
    cells = [(name, seed) for name in ("entropy", "one_hot_ce") for seed in (0, 1)]
    artifact(study, "evaluation", "f" * 16, lambda to: synthetic.evaluation(to, n_items=10))
    for i, (name, seed) in enumerate(cells):
        key = f"{i:016x}"
        artifact(study, "evaluation", key, lambda to, n=name, s=seed: synthetic.evaluation(to, n, 0.2, s, n_items=10))
        artifact(study, "pruning", key, lambda to, n=name, s=seed: synthetic.pruning(to, n, 0.2, s))
    for seed in (0, 1):
        artifact(study, "scoring", f"{seed:016x}", lambda to, s=seed: synthetic.scoring(to, s))
    artifact(study, "experiments", f"{0:016x}", synthetic.experiments)
    made = stage.execute("questions", "asked", {})
    answers = json.loads(made.path("answers.json").read_text())
    assert set(answers) == {"choice", "truth", "distribution", "calibration", "gradient", "components", "power"}
    assert all(len(sentences) == 1 and MODEL in sentences[0] for sentences in answers.values())
    names = ("importance", "rank_agreement", "kept_overlap", "truth", "entropy_split", "calibration", "gradient")
    names += ("components", "power")
    assert {path.stem for path in made.path("figures").glob("*.svg")} == set(names)
    assert all(
        made.path(f"tables/{name}.md").stat().st_size
        for name in ("components", "power", "widths", "truth", "entropy_split", "calibration_text")
    )
    outputs = [o for cell in nbformat.read(made.path("notebook.ipynb"), 4).cells for o in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == len(names)
    assert any(all(a[0] in data.get("text/markdown", "") for a in answers.values()) for data in shown)
