"""Which criterion is closer to the truth? Predicted against measured damage of silenced neurons."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals
from hfprune_nb.report.results import experiment, scores, specs
from hfprune_nb.report.style import GREYS, STYLE, WIDTH, Legend, closed, message
from hfprune_nb.report.table import ABSENT, Table, bounded, format_p

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


KINDS = {"one neuron": ".", "random group": "s", "lowest group": "^"}


SIGNED = "predicted_ce"


def predictions(experiment_folders: Iterable[Path], scoring_folders: Iterable[Path]) -> pd.DataFrame:
    """Return every ablation once per predictor: model, layer, kind, size, kl, ce, entropy, predictor, predicted.

    Predictors are the criteria of the study's scorings (importance summed over the silenced neurons, mean over calibration
    seeds; neurons that a first stage removed count zero) and the first-order estimates on the ablation's own text.
    """
    scorings = [scores(folder) for folder in scoring_folders]
    legend = Legend(spec for facts, _ in scorings for spec in specs(facts))
    parts = []
    for folder in experiment_folders:
        model = experiment(folder)["model"]
        ablations = pd.read_parquet(Path(folder) / "ablations.parquet")
        of_model = [importance for facts, importance in scorings if facts["model"] == model]
        for criterion in legend.in_order({name for importance in of_model for name in importance}):
            by_seed = [importance[criterion] for importance in of_model if criterion in importance]
            mean = [np.mean(layer, axis=0).clip(min=0) for layer in zip(*by_seed, strict=True)]
            sums = [mean[row.layer][list(row.neurons)].sum() for row in ablations.itertuples()]
            parts.append(ablations.assign(model=model, predictor=criterion, predicted=sums))
        for column in SAME_TEXT:
            parts.append(ablations.assign(model=model, predictor=column, predicted=ablations[column]))
    columns = ["model", "layer", "kind", "size", *TARGETS, "predictor", "predicted"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def truth_table(frame: pd.DataFrame, legend: Legend, notes: Iterable[str] = ()) -> Table:
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
        texts = {heading: _estimate(cells.loc[place]) for place, heading in TRUTH_COLUMNS.items() if place in cells.index}
        display.append({"Model": model, "Prediction": SAME_TEXT.get(predictor) or legend.label(predictor)} | texts)
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


def _target(rows: pd.DataFrame, target: str, predictor: str) -> pd.Series:
    return rows[target] if predictor in ("predicted_ce", "predicted_entropy") else rows[target].abs()


def truth_figure(predictions: pd.DataFrame, correlations: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw predicted against measured damage, a panel per criterion, and last the signed estimate of cross-entropy.

    `predictions` is that of `predictions`, `correlations` the long form of `truth_table`.
    """
    rows = predictions[predictions["model"] == model]
    names = legend.in_order(set(rows["predictor"]) - set(SAME_TEXT))
    if not names:
        return message("No criterion was scored on a model with measured ablations: nothing to draw.")
    panels = [*names, SIGNED]
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(down, across, figsize=(WIDTH, 0.8 + 2.2 * down), squeeze=False)
        for ax, name in zip(axes.flat, panels, strict=False):
            part = rows[rows["predictor"] == name]
            colour = GREYS[0] if name == SIGNED else legend.colour(name)
            _truth_panel(ax, part, "ce" if name == SIGNED else "kl", colour)
            title = "signed first-order CE" if name == SIGNED else legend.short(name, 32)
            ax.set_title(title + _within(correlations[correlations["model"] == model], name), fontsize=9)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        handles = [
            mpl.lines.Line2D([], [], color=GREYS[1], marker=mark, mfc="none", linestyle="none", label=kind)
            for kind, mark in KINDS.items()
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=3)
        fig.suptitle(f"{model}: predicted against measured damage of silenced neurons", fontsize=10)
    return closed(fig, _caption(correlations[correlations["model"] == model], names, legend))


def _caption(correlations: pd.DataFrame, names: list[str], legend: Legend) -> str:
    within = correlations[correlations["scope"] == "within"].set_index(["predictor", "target"])
    rows = within.xs("kl", level="target").reindex(legend.compared(names)).dropna(subset="spearman")
    if rows.empty:
        return ""
    kl = rows["spearman"]
    best, worst = kl.idxmax(), kl.idxmin()
    if best != worst and kl[worst] >= rows.loc[best, "low"]:
        told = (
            f"Within a layer all criteria rank the measured KL of single neurons about alike ({kl[worst]:.2f} to {kl[best]:.2f})"
        )
    else:
        told = f"Within a layer {legend.label(best)} ranks the measured KL of single neurons best ({kl[best]:.2f})"
        told += f", {legend.label(worst)} worst ({kl[worst]:.2f})" if best != worst else ""
    exact = within["spearman"].get((SIGNED, "ce"))
    return told + (f"; the signed estimate on the same text ranks the change of CE with {exact:.2f}." if exact else ".")


def _truth_panel(ax, rows: pd.DataFrame, target: str, colour: str) -> None:
    kinds = np.where(rows["size"] == 1, "one neuron", np.where(rows["kind"] == "random group", "random group", "lowest group"))
    seaborn.scatterplot(
        rows, x="predicted", y=target, style=kinds, markers=KINDS, s=22, fc="none", ec=colour, linewidth=0.8, ax=ax, legend=False
    )
    if target == "kl":
        ax.set(xscale="log", yscale="log", xlabel="importance (right: keep)")
        ax.set_ylabel("KL, nats (higher: worse)" if ax.get_subplotspec().is_first_col() else "")
        return
    size = float(np.quantile(np.abs(rows[["predicted", "ce"]]), 0.25)) or 1e-6
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
    for scale in (ax.set_xscale, ax.set_yscale):
        scale("symlog", linthresh=size)
    powers = 10.0 ** np.arange(-8, 3, 2)
    powers = powers[powers > 10 * size]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(mpl.ticker.FixedLocator([*-powers, 0, *powers]))
        axis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set(xlabel="predicted change of CE, nats", ylabel="measured change, nats\n(line: equal)")


def _within(correlations: pd.DataFrame, name: str) -> str:
    target = "ce" if name == SIGNED else "kl"
    keys = correlations[["predictor", "target", "scope"]].apply(tuple, axis=1)
    row = correlations[keys.isin([(name, target, "within")])]
    return "" if row.empty else f"\nwithin a layer: {_estimate(row.iloc[0])}"


def _estimate(row: pd.Series) -> str:
    return bounded(row["spearman"], row["low"], row["high"], ".2f")


def truth_sentence(frame: pd.DataFrame, model: str, legend: Legend) -> str:
    """Return one sentence: how well the criteria rank the damage (KL) of single neurons within a layer, and which better."""
    rows = frame[(frame["model"] == model) & (frame["size"] == 1)]
    names = legend.compared(set(rows["predictor"]) - set(SAME_TEXT))
    if len(names) < 2:
        return f"{model}: fewer than two criteria were scored and tested by ablation, so none can be called closer to the truth."
    sides = {name: rows[rows["predictor"] == name] for name in names}
    layer = sides[names[0]]["layer"]
    kl = sides[names[0]]["kl"]
    found = {name: intervals.rank_correlation(part["predicted"], kl, layer) for name, part in sides.items()}
    told = ", ".join(f"{legend.label(name)} {i.mean:.2f} [{i.low:.2f}, {i.high:.2f}]" for name, i in found.items())
    pairs = legend.pairs(names)
    differences = [
        intervals.rank_correlation_difference(sides[a]["predicted"], sides[b]["predicted"], kl, layer) for a, b in pairs
    ]
    verdicts = []
    for (a, b), difference, p in zip(pairs, differences, intervals.holm([d.p for d in differences]), strict=True):
        if p < 1 - intervals.LEVEL:
            first, second = (a, b) if difference.mean > 0 else (b, a)
            verdicts.append(f"{legend.label(first)} is closer to the truth than {legend.label(second)} (p {format_p(p)})")
        else:
            verdicts.append(f"{legend.label(a)} and {legend.label(b)} are not told apart (p {format_p(p)})")
    signed = frame[(frame["model"] == model) & (frame["size"] == 1) & (frame["predictor"] == "predicted_ce")]
    exact = intervals.spearman(signed["predicted"], signed["ce"], signed["layer"])
    return (
        f"{model}, rank correlation of importance with the measured KL of {len(kl)} single neurons within {layer.nunique()} "
        f"layers: {told}; after Holm's correction {'; '.join(verdicts)}. (For comparison, the signed first-order estimate on the "
        f"measured text itself ranks the signed change of cross-entropy with {exact:.2f}.)"
    )
