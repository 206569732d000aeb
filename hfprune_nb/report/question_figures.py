"""One figure per question of `report.questions`: its frame in, a matplotlib Figure out."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.figures import DASHES, MARKERS, OTHER_MARKER, STYLE, closed, colour, message
from hfprune_nb.report.measurements import in_order, label, percent
from hfprune_nb.report.questions import POSITIONS, SAME_TEXT, bounded

KINDS = {"one neuron": ("o", 18), "random group": ("s", 26), "lowest group": ("^", 26)}
KIND_COLOURS = {"one neuron": "#0072B2", "random group": "#7F7F7F", "lowest group": "#D55E00"}
SIGNED = "predicted_ce"


def truth(predictions: pd.DataFrame, correlations: pd.DataFrame, model: str) -> Figure:
    """Draw predicted against measured damage, a panel per criterion, and last the signed estimate of cross-entropy.

    `predictions` is `questions.predictions`, `correlations` the long form of `questions.truth_table`.
    """
    rows = predictions[predictions["model"] == model]
    names = in_order(set(rows["predictor"]) - set(SAME_TEXT))
    if not names:
        return message("No criterion was scored on a model with measured ablations: nothing to draw.")
    panels = [*names, SIGNED]
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(down, across, figsize=(0.6 + 3.1 * across, 1 + 2.9 * down), squeeze=False)
        for ax, name in zip(axes.flat, panels, strict=False):
            part = rows[rows["predictor"] == name]
            _truth_panel(ax, part, "ce" if name == SIGNED else "kl")
            ax.set_title(_truth_title(correlations[correlations["model"] == model], name), fontsize=9)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        handles = [
            mpl.lines.Line2D([], [], color=KIND_COLOURS[kind], marker=mark, linestyle="none", label=kind)
            for kind, (mark, _) in KINDS.items()
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=3)
        fig.suptitle(f"{model}: predicted against measured damage of silenced neurons", fontsize=10)
    return closed(fig)


def _truth_panel(ax, rows: pd.DataFrame, target: str) -> None:
    kinds = np.where(rows["size"] == 1, "one neuron", np.where(rows["kind"] == "random group", "random group", "lowest group"))
    for kind, (mark, size) in KINDS.items():
        part = rows[kinds == kind]
        ax.scatter(
            part["predicted"], part[target], s=size, marker=mark, facecolors="none", edgecolors=KIND_COLOURS[kind], linewidths=0.9
        )
    if target == "kl":
        ax.set(xscale="log", yscale="log", xlabel="importance, summed (right: keep)", ylabel="KL, nats (higher: worse)")
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


def _truth_title(correlations: pd.DataFrame, name: str) -> str:
    target = "ce" if name == SIGNED else "kl"
    title = "signed first-order CE, same text" if name == SIGNED else label(name)
    keys = correlations[["predictor", "target", "scope"]].apply(tuple, axis=1)
    row = correlations[keys.isin([(name, target, "within")])]
    if row.empty:
        return title
    return f"{title}\nwithin a layer: {bounded(*row[['spearman', 'low', 'high']].iloc[0], '.2f')}"


def entropy_split(differences: pd.DataFrame, model: str) -> Figure:
    """Draw the difference in KL, entropy minus another criterion, by corpus (row), ratio (column) and kind of position."""
    rows = differences[differences["model"] == model]
    if rows.empty:
        return message("Entropy and another criterion were not evaluated on the same held-out text: nothing to draw.")
    corpora, ratios = list(dict.fromkeys(rows["corpus"])), sorted(rows["ratio"].unique())
    others = in_order(rows["other"].unique())
    with mpl.rc_context(STYLE):
        size = (1.6 + 2.7 * len(ratios), 1.2 + 1.4 * len(corpora))
        fig, axes = plt.subplots(len(corpora), len(ratios), figsize=size, squeeze=False, sharey=True, sharex="row")
        for (line, column), ax in np.ndenumerate(axes):
            here = rows[(rows["corpus"] == corpora[line]) & (rows["ratio"] == ratios[column])]
            _difference_panel(ax, here, others)
            ax.set_title(f"{corpora[line]}, {percent(ratios[column])} removed", fontsize=9)
        for ax in axes[-1]:
            ax.set_xlabel("KL difference, nats\n(left: entropy is closer)")
        handles = [
            mpl.lines.Line2D([], [], color=colour(name), marker=MARKERS.get(name, OTHER_MARKER), label=f"entropy − {label(name)}")
            for name in others
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        title = "KL to the dense model, entropy minus another criterion"
        fig.suptitle(f"{model}: {title}\n(95 % intervals; filled: told apart after Holm's correction)", fontsize=10)
    return closed(fig)


def _difference_panel(ax, rows: pd.DataFrame, others: list[str]) -> None:
    places = [where for where in POSITIONS if where in set(rows["positions"])]
    for row in rows.to_dict("records"):
        height = places.index(row["positions"]) + 0.3 * (others.index(row["other"]) - (len(others) - 1) / 2)
        tone = colour(row["other"])
        ax.errorbar(
            row["difference"],
            height,
            xerr=[[row["difference"] - row["low"]], [row["high"] - row["difference"]]],
            fmt=MARKERS.get(row["other"], OTHER_MARKER),
            color=tone,
            markerfacecolor=tone if row["p_holm"] < 0.05 else "white",
            capsize=2,
            markersize=4.5,
        )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(places)), [POSITIONS[where] for where in places])
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    ax.grid(axis="y", visible=False)


def calibration(converging: pd.DataFrame, texts: pd.DataFrame, model: str) -> Figure:
    """Draw how kept neurons settle with the number of windows (left) and differ between calibration texts (right)."""
    left, right = converging[converging["model"] == model], texts[texts["model"] == model]
    if left.empty and right.empty:
        return message("Neither snapshots of scoring nor several calibration texts: nothing to draw.")
    with mpl.rc_context(STYLE):
        fig, (ax, bars) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
        for (criterion, against), part in left.groupby(["criterion", "against"], sort=False):
            mean = part.groupby("n")["jaccard"].mean()
            own = against == "own total"
            style = {"alpha": 0.35, "linewidth": 1} if own else {"marker": MARKERS.get(criterion, OTHER_MARKER)}
            text = "" if own else label(criterion)
            ax.plot(mean.index, mean, color=colour(criterion), linestyle=DASHES.get(criterion, "solid"), label=text, **style)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set(xlabel="calibration windows (first n of a seed)", ylabel="Jaccard overlap of kept neurons\n(1: same neurons)")
        ax.set_title("against all windows of another seed\n(faint: of the same seed)", fontsize=9)
        _text_bars(bars, right)
        bars.set_ylim(top=1.01)
        handles = {text: line for axis in (ax, bars) for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        fig.suptitle(f"{model}: how much calibration is enough, and which text", fontsize=10)
    return closed(fig)


def _text_bars(ax, rows: pd.DataFrame) -> None:
    names, corpora = in_order(rows["criterion"].unique()), list(dict.fromkeys(rows["corpus"]))
    for index, criterion in enumerate(names):
        part = rows[rows["criterion"] == criterion].set_index("corpus").reindex(corpora)
        places = np.arange(len(corpora)) + 0.36 * (index - (len(names) - 1) / 2)
        ax.bar(places, part["jaccard"], width=0.34, color=colour(criterion), label=label(criterion))
    ax.set_xticks(range(len(corpora)), [name.replace(", ", ",\n") for name in corpora])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("calibration text")
    if len(rows):
        ax.set_title(f"against {rows['first'].iloc[0]}, {rows['n_windows'].iloc[0]} windows each", fontsize=9)


def gradient(frame: pd.DataFrame, model: str) -> Figure:
    """Draw the size of each criterion's logit gradient by what the student has lost (log scale)."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return message("No gradient was measured: nothing to draw.")
    names, ratios = in_order(rows["criterion"].unique()), sorted(rows["student_ratio"].unique())
    positive = rows.loc[rows["gradient"] > 0, "gradient"]
    floor = positive.min() / 5
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 3.6))
        for index, criterion in enumerate(names):
            values = rows[rows["criterion"] == criterion].set_index("student_ratio")["gradient"].reindex(ratios)
            places = np.arange(len(ratios)) + 0.27 * (index - (len(names) - 1) / 2)
            ax.bar(places, values, width=0.25, color=colour(criterion), label=label(criterion))
            for place, value in zip(places, values, strict=True):
                if value < floor:
                    ax.text(
                        place, floor, "0" if value == 0 else f"{value:.0e}", ha="center", va="bottom", color=colour(criterion)
                    )
        ax.set(yscale="log", ylim=(floor, positive.max() * 2), ylabel="mean norm of dC/dz per position")
        ax.set_xticks(range(len(ratios)), ["dense model" if ratio == 0 else percent(ratio) for ratio in ratios])
        ax.set_xlabel("neurons that the scored model has lost (self-distillation: the student)")
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{model}: signal that each criterion has to score neurons with")
        fig.legend(loc="outside lower center", ncols=3)
    return closed(fig)
