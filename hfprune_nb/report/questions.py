"""What reviewers asked about the criteria, answered from a study's artifacts: one frame and one sentence per question.

Every sentence is generated from its frame, and says that nothing was found where the interval holds zero.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.files import by_layer
from hfprune_nb.report import intervals, neurons
from hfprune_nb.report.measurements import CRITERIA, Column, Results, in_order, label, made_with, percent, protocol_note, sample
from hfprune_nb.report.tables import ABSENT, Table, format_p

SINGLE = "single"
DEFAULT_NEURON_RATIO = 0.3  # where a study has no pruning to take it from
TARGETS = {"kl": "KL(dense, ablated)", "ce": "change of cross-entropy", "entropy": "change of entropy"}
SAME_TEXT = {
    "predicted_abs_ce": "One-hot CE, same text",
    "predicted_abs_entropy": "Entropy, same text",
    "predicted_ce": "signed CE, same text",
    "predicted_entropy": "signed entropy, same text",
}
TRUTH_COLUMNS = {
    ("kl", "within"): "KL, one neuron, within a layer",
    ("kl", "across"): "KL, one neuron, all layers",
    ("kl", "groups"): "KL, groups of one size",
    ("ce", "within"): "change of CE, one neuron, within a layer",
    ("entropy", "within"): "change of entropy, one neuron, within a layer",
}
POSITIONS = {"all": "all positions", "low_entropy": "low-entropy half", "high_entropy": "high-entropy half"}
NEXT_SEED = ", next seed"
CHOICE = ["model", "ratio", "pair", "between", "within", "chance", "difference", "low", "high", "p"]


def neuron_ratio(pruning_folders: Iterable[Path], model: str) -> float:
    """Return the fraction of MLP neurons removed at the middle ratio of `model`, or the default without any pruning."""
    ratios = sorted(
        {round(facts["neuron_ratio"], 3) for facts, _ in map(neurons.kept, pruning_folders) if facts["model"] == model}
    )
    return ratios[(len(ratios) - 1) // 2] if ratios else DEFAULT_NEURON_RATIO


def kept_sets(importance: np.ndarray, ratio: float) -> list[np.ndarray]:
    """Return each layer's kept neurons when the fraction `ratio` of the neurons goes, the lowest first (layers, neurons)."""
    kept = importance.shape[1] - round(ratio * importance.shape[1])
    return [row[-kept:] for row in np.argsort(importance, axis=1, kind="stable")]


def overlap(a: np.ndarray, b: np.ndarray, ratio: float) -> float:
    """Return the Jaccard overlap of two importances' kept sets, the mean over layers."""
    pairs = zip(kept_sets(a, ratio), kept_sets(b, ratio), strict=True)
    return float(np.mean([neurons.jaccard(left, right) for left, right in pairs]))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of two importances (layers, neurons), the mean over layers."""
    layers = np.repeat(np.arange(len(a)), a.shape[1])
    return intervals.spearman(a.ravel(), b.ravel(), layers)


# Do the criteria choose different neurons?


def choice(kept_pairs: pd.DataFrame) -> pd.DataFrame:
    """Return for each model, ratio and pair of criteria how much less they overlap than two seeds of one criterion.

    `kept_pairs` is `neurons.kept_pairs`. between : Jaccard of the two criteria with the same seed; within : the mean of
    both criteria's overlap between two seeds; chance; difference : within minus between with its 95 % interval and p-value,
    from the jackknife over seeds, which three or more can give; p_holm : after Holm's correction over the rows of a model.
    """
    rows = []
    for (model, ratio), part in kept_pairs.groupby(["model", "ratio"], sort=False):
        layers = part.groupby(["comparison", "seeds"], sort=False)["jaccard"].mean()
        for pair in [name for name in layers.index.unique(0) if " / " in name]:
            floors = [f"{side}, two seeds" for side in pair.split(" / ")]
            if not set(floors) <= set(layers.index.unique(0)):
                continue
            between, within = layers[pair], layers[floors].groupby(level="seeds", sort=False).mean()
            row = {"model": model, "ratio": ratio, "pair": pair, "between": between.mean(), "within": within.mean()}
            rows.append(row | {"chance": layers[neurons.CHANCE].mean()} | _over_seeds(between, within))
    frame = pd.DataFrame(rows, columns=CHOICE)
    frame["p_holm"] = frame.groupby("model")["p"].transform(lambda p: intervals.holm(p)) if rows else []
    return frame


def _over_seeds(between: pd.Series, within: pd.Series) -> dict:
    """Return within minus between, its interval and p-value; both are indexed by their pair of seeds."""
    difference, seeds = within.mean() - between.mean(), {seed for pair in between.index for seed in pair}
    found = {"difference": difference, "low": np.nan, "high": np.nan, "p": np.nan}
    if len(seeds) < 3:
        return found
    kept = [[side[[seed not in pair for pair in side.index]].mean() for side in (within, between)] for seed in seeds]
    pseudo = [len(seeds) * difference - (len(seeds) - 1) * (without - same) for without, same in kept]
    test = stats.ttest_1samp(pseudo, 0)
    low, high = difference - np.mean(pseudo) + np.array(test.confidence_interval(intervals.LEVEL))
    return found | {"low": low, "high": high, "p": test.pvalue}


def choice_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence on whether the criteria choose different neurons, beyond the noise of calibration."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return f"{model}: two criteria with two seeds each are needed to say whether the criteria choose different neurons."
    told = []
    for pair, part in rows.groupby("pair", sort=False):
        more = ((part["difference"] > 0) & (part["p_holm"] < 1 - intervals.LEVEL)).to_numpy()
        where = "at every ratio" if more.all() else "at " + _listed(part.loc[more, "ratio"]) if more.any() else "at no ratio"
        verdict = f"so they differ by more than calibration noise {where}"
        told.append(
            f"{pair} overlap {_range(part['between'])} where two seeds of one criterion overlap {_range(part['within'])}, "
            + (verdict if part["p"].notna().any() else "and two seeds are too few to judge the difference")
        )
    return (
        f"{model}, Jaccard of kept neurons (chance {_range(rows['chance'])}; jackknife over seeds, Holm's correction over "
        f"{len(rows)}): {'; '.join(told)}."
    )


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _listed(ratios: Iterable[float]) -> str:
    return ", ".join(percent(ratio) for ratio in ratios)


# Which criterion is closer to the truth?


def experiment(folder: Path) -> dict:
    """Return the facts of an experiments artifact (08). Raises UserError when it is missing or damaged."""
    try:
        return json.loads((Path(folder) / "experiments.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"{folder} is no finished experiments artifact: run stage 08 of this study") from None


def predictions(experiment_folders: Iterable[Path], scoring_folders: Iterable[Path]) -> pd.DataFrame:
    """Return every ablation once per predictor: model, layer, kind, size, kl, ce, entropy, predictor, predicted.

    Predictors are the criteria of the study's scorings (importance summed over the silenced neurons, mean over calibration
    seeds; neurons that a first stage removed count zero) and the first-order estimates on the ablation's own text.
    """
    scorings = [neurons.scores(folder) for folder in scoring_folders]
    parts = []
    for folder in experiment_folders:
        model = experiment(folder)["model"]
        ablations = pd.read_parquet(Path(folder) / "ablations.parquet")
        of_model = [importance for facts, importance in scorings if facts["model"] == model]
        for criterion in in_order({name for importance in of_model for name in importance}):
            mean = np.mean([importance[criterion] for importance in of_model if criterion in importance], axis=0).clip(min=0)
            sums = [mean[row.layer, list(row.neurons)].sum() for row in ablations.itertuples()]
            parts.append(ablations.assign(model=model, predictor=criterion, predicted=sums))
        for column in SAME_TEXT:
            parts.append(ablations.assign(model=model, predictor=column, predicted=ablations[column]))
    columns = ["model", "layer", "kind", "size", *TARGETS, "predictor", "predicted"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def predictor_label(name: str) -> str:
    """Return a predictor's name for readers."""
    return SAME_TEXT.get(name, label(name))


def experiment_notes(experiment_folders: Iterable[Path]) -> list[str]:
    """Return the protocol of the experiments as sentences, one per model, and their notes."""
    notes = []
    for folder in experiment_folders:
        facts = experiment(folder)
        text, truth = facts["calibration"], facts["truth"]
        made = {name: value for name, value in ({"device": facts["device"]} | made_with(folder)).items() if value}
        notes.append(
            f"Protocol. Model {facts['model']} ({facts['layers']} layers of {facts['intermediate_size']} neurons). Scored on "
            f"{text['n_windows']} windows of {text['seq_len']} tokens of each text ({'; '.join(facts['corpora'])}) in "
            f"{text['dtype']}, seed {facts['seed']}, BOS {'yes' if text['bos'] else 'no'}; damage measured on "
            f"{truth['n_windows']} held-out windows of {truth['seq_len']} tokens of {truth['corpus']} in {truth['dtype']}; own "
            f"text: {facts['own_text'] or 'none'}. {', '.join(f'{name} {value}' for name, value in made.items())}."
        )
        notes += facts["notes"]
    return list(dict.fromkeys(notes))


def truth_table(frame: pd.DataFrame, notes: Iterable[str] = ()) -> Table:
    """Return how well each predictor ranks real damage: Spearman with 95 % intervals over ablations, `notes` below.

    `frame` is `predictions`. Single neurons are ranked within their layer, as pruning does, and over all layers; groups over
    all layers within their size. A signed prediction is held against the signed change, a criterion against its size.
    """
    rows = []
    for (model, predictor), part in frame.groupby(["model", "predictor"], sort=False):
        one = part["size"] == 1
        choices = {"within": (part[one], "layer"), "across": (part[one], None), "groups": (part[~one], "size")}
        for target, (scope, (chosen, group)) in itertools.product(TARGETS, choices.items()):
            if len(chosen) < 3:
                continue
            real = _target(chosen, target, predictor)
            labels = None if group is None else chosen[group]
            found = intervals.rank_correlation(chosen["predicted"], real, labels)
            place = {"model": model, "predictor": predictor, "target": target, "scope": scope, "n": len(chosen)}
            rows.append(place | {"spearman": found.mean, "low": found.low, "high": found.high})
    long = pd.DataFrame(rows, columns=["model", "predictor", "target", "scope", "n", "spearman", "low", "high"])
    display = []
    for (model, predictor), part in long.groupby(["model", "predictor"], sort=False):
        cells = part.set_index(["target", "scope"])
        texts = {
            heading: bounded(*cells.loc[place, ["spearman", "low", "high"]], ".2f")
            for place, heading in TRUTH_COLUMNS.items()
            if place in cells.index
        }
        display.append({"Model": model, "Prediction": predictor_label(predictor)} | texts)
    method = (
        "Spearman rank correlation between predicted and measured damage, 95 % jackknife intervals over ablations: 1 is the same "
        "order, 0 no relation. Neurons were drawn from strata of importance, so the range of damage is wider than among neurons "
        "drawn at random.",
        "Predicted: importance from the study's calibration text, mean over seeds, summed over the silenced neurons; 'same text' "
        "is the first-order estimate on the windows of the measurement. KL is compared as it is; changes of CE and entropy by "
        "their size, except for signed predictions, which are held against the signed change.",
    )
    display = pd.DataFrame(display).fillna(ABSENT)
    return Table("truth", "Predicted against measured damage of silenced neurons (measured)", long, display, (*method, *notes))


def bounded(value: float, low: float, high: float, form: str) -> str:
    """Return a value with its interval, alone where it has none."""
    return f"{value:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def _target(rows: pd.DataFrame, target: str, predictor: str) -> pd.Series:
    return rows[target] if predictor in ("predicted_ce", "predicted_entropy") else rows[target].abs()


def truth_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence: how well the criteria rank the damage (KL) of single neurons within a layer, and which better."""
    rows = frame[(frame["model"] == model) & (frame["size"] == 1) & frame["predictor"].isin(CRITERIA)]
    names = in_order(rows["predictor"].unique())
    if len(names) < 2:
        return f"{model}: fewer than two criteria were scored and tested by ablation, so none can be called closer to the truth."
    sides = {name: rows[rows["predictor"] == name] for name in names}
    layer = sides[names[0]]["layer"]
    kl = sides[names[0]]["kl"]
    found = {name: intervals.rank_correlation(part["predicted"], kl, layer) for name, part in sides.items()}
    told = ", ".join(f"{label(name)} {i.mean:.2f} [{i.low:.2f}, {i.high:.2f}]" for name, i in found.items())
    pairs = list(itertools.combinations(names, 2))
    differences = [
        intervals.rank_correlation_difference(sides[a]["predicted"], sides[b]["predicted"], kl, layer) for a, b in pairs
    ]
    verdicts = []
    for (a, b), difference, p in zip(pairs, differences, intervals.holm([d.p for d in differences]), strict=True):
        if p < 1 - intervals.LEVEL:
            first, second = (a, b) if difference.mean > 0 else (b, a)
            verdicts.append(f"{label(first)} is closer to the truth than {label(second)} (p {format_p(p)})")
        else:
            verdicts.append(f"{label(a)} and {label(b)} are not told apart (p {format_p(p)})")
    signed = frame[(frame["model"] == model) & (frame["size"] == 1) & (frame["predictor"] == "predicted_ce")]
    exact = intervals.spearman(signed["predicted"], signed["ce"], signed["layer"])
    return (
        f"{model}, rank correlation of importance with the measured KL of {len(kl)} single neurons within {layer.nunique()} "
        f"layers: {told}; after Holm's correction {'; '.join(verdicts)}. (For comparison, the signed first-order estimate on the "
        f"measured text itself ranks the signed change of cross-entropy with {exact:.2f}.)"
    )


# Does entropy keep the distribution?


def entropy_split(results: Results, measure: str = "kl") -> pd.DataFrame:
    """Return paired differences of `measure` (entropy minus another criterion) by corpus, ratio and kind of position.

    positions : all, or the half where the dense model's entropy is below or above its median. `p_holm` is over all rows of a
    model. Negative means that entropy stays closer to the dense model. Models whose KL is not finite have no row (the main tables
    name them). Without results the frame is empty.
    """
    columns = ["model", "corpus", "ratio", "positions", "other", "entropy", "value_other", "difference", "low", "high", "p"]
    if results is None:
        return pd.DataFrame(columns=[*columns, "p_holm"])
    rows = []
    for model, corpus in results.fidelity_positions[["model", "corpus"]].drop_duplicates().itertuples(index=False):
        of_model = results.fidelity_positions[results.fidelity_positions["model"] == model]
        column = Column(f"{measure}:{corpus}", measure, measure, corpus=corpus)
        others = [name for name in in_order(of_model["criterion"].unique()) if name in CRITERIA and name != "entropy"]
        for ratio, other, where in itertools.product(sorted(of_model["ratio"].unique()), others, POSITIONS):
            sides = [sample(results, column, model, name, ratio, where) for name in ("entropy", other)]
            if any(side.empty or not np.isfinite(side["value"]).all() for side in sides):
                continue
            if not set(sides[0]["seed"]) & set(sides[1]["seed"]):
                continue
            d = intervals.paired_difference(*sides)
            place = {"model": model, "corpus": corpus, "ratio": ratio, "positions": where, "other": other}
            means = [np.average(side["value"], weights=side["weight"]) for side in sides]
            place |= dict(zip(("entropy", "value_other"), means, strict=True))
            rows.append(place | {"difference": d.mean, "low": d.low, "high": d.high, "p": d.p})
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_holm"] = frame.groupby("model")["p"].transform(lambda p: intervals.holm(p)) if rows else []
    return frame


def entropy_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence: where entropy stays closer to (or further from) the dense distribution than another criterion."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return f"{model}: entropy and another criterion were not evaluated on the same held-out text."
    if rows["p"].isna().all():
        return f"{model}: entropy and another criterion share one calibration seed, which says nothing about others."
    told = []
    for other, part in rows.groupby("other", sort=False):
        certain = part[part["p_holm"] < 1 - intervals.LEVEL]
        closer, further = certain[certain["difference"] < 0], certain[certain["difference"] > 0]
        verdict = f"against {label(other)}, closer in {len(closer)} and further away in {len(further)} of {len(part)} comparisons"
        for name, found in (("closer", closer), ("further away", further)):
            if 0 < len(found) < len(part):
                verdict += f" ({name}: {'; '.join(_places(found))})"
        told.append(verdict)
    return (
        f"{model}, KL to the dense model by corpus, ratio and kind of position, entropy {'; '.join(told)}; comparisons that are "
        f"neither are undecided after Holm's correction over {len(rows)}."
    )


def _places(rows: pd.DataFrame) -> list[str]:
    return [
        f"{corpus}, {POSITIONS[where]} at {_listed(part['ratio'])}"
        for (corpus, where), part in rows.groupby(["corpus", "positions"], sort=False)
    ]


def entropy_table(frame: pd.DataFrame, results: Results | None) -> Table:
    """Return `entropy_split` as a table with the protocol below."""
    display = pd.DataFrame(
        {
            "Model": frame["model"],
            "Corpus": frame["corpus"],
            "Positions": frame["positions"].map(POSITIONS),
            "Ratio": frame["ratio"].map(percent),
            "A - B": [f"{label('entropy')} - {label(other)}" for other in frame["other"]],
            "KL of A": frame["entropy"].map("{:.3f}".format),
            "KL of B": frame["value_other"].map("{:.3f}".format),
            "Difference, nats": [bounded(row.difference, row.low, row.high, "+.3f") for row in frame.itertuples()],
            "p": frame["p"].map(format_p),
            "p (Holm)": frame["p_holm"].map(format_p),
        }
    )
    note = (
        "KL(dense, pruned) in nats; positions are split at the median entropy of the dense model's distribution over a corpus. "
        "Differences are paired by window and calibration seed, interval and p over both (one seed gives no p-value); Holm's "
        "correction is over all rows of a model. Negative: entropy stays closer to the dense model."
    )
    notes = (note,) if results is None else (note, protocol_note(results))
    return Table("entropy_split", "KL to the dense model by position, entropy against others (measured)", frame, display, notes)


# How much calibration is enough, and which text?


def convergence(scoring_folders: Iterable[Path], ratios: dict[str, float]) -> pd.DataFrame:
    """Return how the first n windows compare with all windows: model, criterion, seed, n, against, jaccard, spearman.

    against : `own total` (the same seed's, of which the n windows are a part) or `other seed` (the mean over the others'
    totals, independent text). `ratios` gives the neuron ratio of each model's kept sets. Means over layers.
    """
    read = [(neurons.scores(folder)[0], _snapshots(folder)) for folder in scoring_folders]
    rows = []
    for facts, snapshots in sorted(read, key=lambda pair: (pair[0]["model"], pair[0]["seed"] or 0)):
        model = facts["model"]
        for criterion, by_count in snapshots.items():
            others = [found[criterion] for other, found in read if other["model"] == model and other["seed"] != facts["seed"]]
            totals = {"own total": [by_count]} | ({"other seed": others} if others else {})
            for n, (against, references) in itertools.product(sorted(by_count), totals.items()):
                finals = [reference[max(reference)] for reference in references]
                row = {"model": model, "criterion": criterion, "seed": facts["seed"], "n": n, "against": against}
                jaccard = np.mean([overlap(by_count[n], final, ratios[model]) for final in finals])
                spearman = np.mean([rank_correlation(by_count[n], final) for final in finals])
                rows.append(row | {"jaccard": jaccard, "spearman": spearman})
    return pd.DataFrame(rows, columns=["model", "criterion", "seed", "n", "against", "jaccard", "spearman"])


def _snapshots(folder: Path) -> dict[str, dict[int, np.ndarray]]:
    """Return criterion -> number of windows -> importance of a scoring artifact; empty where no criterion read text."""
    path = Path(folder) / "snapshots.safetensors"
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise UserError(f"{path} is damaged: delete the folder and rerun") from None
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, rows in by_layer(tensors).items():
        criterion, _, n = name.rpartition("/")
        found.setdefault(criterion, {})[int(n)] = np.array(rows)
    return {criterion: found[criterion] for criterion in in_order(found)}


def corpora(experiment_folders: Iterable[Path], ratios: dict[str, float]) -> pd.DataFrame:
    """Return how each calibration text compares with the first corpus: model, criterion, corpus, jaccard, spearman, seeds.

    `seeds` marks the row that compares the first corpus with itself under the next seed: the noise of calibration.
    """
    rows = []
    for folder in experiment_folders:
        facts, tensors = experiment(folder), by_layer(load_file(Path(folder) / "corpora.safetensors"))
        first, *others = facts["corpora"]
        for criterion, corpus in itertools.product(in_order(facts["criteria"]), others):
            pair = np.array(tensors[f"{first}/{criterion}"]), np.array(tensors[f"{corpus}/{criterion}"])
            row = {"model": facts["model"], "criterion": criterion, "first": first, "corpus": corpus}
            compared = {"jaccard": overlap(*pair, ratios[facts["model"]]), "spearman": rank_correlation(*pair)}
            rows.append(row | compared | {"seeds": corpus.endswith(NEXT_SEED), "n_windows": facts["calibration"]["n_windows"]})
    columns = ["model", "criterion", "first", "corpus", "jaccard", "spearman", "seeds", "n_windows"]
    return pd.DataFrame(rows, columns=columns).sort_values("seeds", ascending=False, kind="stable", ignore_index=True)


def calibration_sentence(converging: pd.DataFrame, texts: pd.DataFrame, model: str) -> str:
    """Return one sentence: what the last doubling of the windows still changes, and whether another text changes more."""
    told = []
    rows = converging[(converging["model"] == model) & (converging["against"] == "other seed")]
    for criterion, part in rows.groupby("criterion", sort=False):
        means = part.groupby("n")["jaccard"].mean()
        if len(means) > 1:
            before, after = means.index[-2:]
            gained = means[after] - means[before]
            state = "still grows" if gained > 0.01 else "no longer grows by more than 0.01"
            told.append(
                f"{label(criterion)}: the overlap of kept neurons with another seed's goes from {means[before]:.3f} with "
                f"{before} to {means[after]:.3f} with {after} windows and {state}"
            )
    for criterion, part in texts[texts["model"] == model].groupby("criterion", sort=False):
        noise = part.loc[part["seeds"], "jaccard"].mean()
        foreign = part[~part["seeds"] & (part["jaccard"] < noise)]
        names = ", ".join(f"{row.corpus} {row.jaccard:.2f}" for row in foreign.itertuples())
        end = f"less overlap {names}" if names else "no other text overlaps less"
        first, count = part[["first", "n_windows"]].iloc[0]
        told.append(f"{label(criterion)}, {count} windows: two seeds of {first} overlap {noise:.2f}; {end}")
    return f"{model}. " + ". ".join(told) + "." if told else f"{model}: one seed and one text say nothing about calibration."


def corpora_table(frame: pd.DataFrame, notes: Iterable[str]) -> Table:
    """Return `corpora` as a table, with `notes` below."""
    display = pd.DataFrame(
        {
            "Model": frame["model"],
            "Criterion": frame["criterion"].map(label),
            "Text": frame["corpus"],
            "Compared with": frame["first"],
            "Windows": frame["n_windows"].astype(str),
            "Jaccard of kept neurons": frame["jaccard"].map("{:.3f}".format),
            "Rank correlation": frame["spearman"].map("{:.3f}".format),
        }
    )
    note = (
        "Means over layers. The row of the next seed is one draw of the noise of calibration: one pair of seeds tests nothing, "
        "and a value close to it says nothing about the text."
    )
    return Table("calibration_text", "Kept neurons by calibration text (measured)", frame, display, (note, *notes))


# The zero gradient of self-distillation


def gradients(experiment_folders: Iterable[Path]) -> pd.DataFrame:
    """Return the mean norm of each criterion's logit gradient by student: model, student_ratio, criterion, gradient, value."""
    parts = [
        pd.read_parquet(Path(folder) / "gradients.parquet").assign(model=experiment(folder)["model"])
        for folder in experiment_folders
    ]
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["model", "student_ratio", "criterion", "gradient"])
    )


def gradient_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence on the gradient of self-distillation at the dense model and after a first stage."""
    rows = frame[frame["model"] == model].set_index(["student_ratio", "criterion"])["gradient"]
    if rows.empty:
        return f"{model}: no gradient was measured."
    at_dense, ce = rows[0.0, "self_distillation"], rows[0.0, "one_hot_ce"]
    size = "exactly 0" if at_dense == 0 else f"{at_dense:.1e}, {at_dense / ce:.1e} of one-hot CE's"
    ratios = [ratio for ratio in rows.index.get_level_values(0).unique() if ratio > 0]
    told = ", ".join(f"{rows[ratio, 'self_distillation'] / ce:.3f} after {percent(ratio)}" for ratio in ratios)
    verdict = "has no signal" if at_dense < 1e-3 * ce else "has a signal"
    return (
        f"{model}: at the dense model self-distillation {verdict}, its logit gradient is {size}; relative to one-hot CE's it is "
        f"{told} of the neurons have been removed in a first stage."
    )
