"""Does entropy keep the distribution? KL to the dense model by kind of position, entropy against others."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import Column, Results, percent, percents, sample
from hfprune_nb.report.style import REFERENCE, STYLE, WIDTH, Legend, closed, message
from hfprune_nb.report.table import Table, bounded, format_p

POSITIONS = {"all": "all positions", "low_entropy": "low-entropy half", "high_entropy": "high-entropy half"}


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
        others = [name for name in results.legend.compared(of_model["criterion"]) if name != REFERENCE]
        for ratio, other, where in itertools.product(sorted(of_model["ratio"].unique()), others, POSITIONS):
            sides = [sample(results, column, model, name, ratio, where) for name in (REFERENCE, other)]
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


def entropy_table(frame: pd.DataFrame, results: Results | None, legend: Legend) -> Table:
    """Return `entropy_split` as a table with the protocol below."""
    display = pd.DataFrame(
        {
            "Model": frame["model"],
            "Corpus": frame["corpus"],
            "Positions": frame["positions"].map(POSITIONS),
            "Ratio": frame["ratio"].map(percent),
            "A - B": [f"{legend.label(REFERENCE)} - {legend.label(other)}" for other in frame["other"]],
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
        f"correction is over all rows of a model. {intervals.FAMILY_ERROR} Negative: entropy stays closer to the dense model."
    )
    notes = (note,) if results is None else (note, protocol_note(results))
    return Table("entropy_split", "KL to the dense model by position, entropy against others (measured)", frame, display, notes)


def entropy_split_figure(differences: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw the difference in KL, entropy minus another criterion, by corpus (row), ratio (column) and kind of position."""
    rows = differences[differences["model"] == model]
    if rows.empty:
        return message("Entropy and another criterion were not evaluated on the same held-out text: nothing to draw.")
    corpora, ratios = list(dict.fromkeys(rows["corpus"])), sorted(rows["ratio"].unique())
    others = legend.in_order(rows["other"])
    with mpl.rc_context(STYLE):
        size = (WIDTH, 1.2 + (1.1 + 0.08 * len(others)) * len(corpora))
        fig, axes = plt.subplots(len(corpora), len(ratios), figsize=size, squeeze=False, sharey=True, sharex="row")
        for (line, column), ax in np.ndenumerate(axes):
            here = rows[(rows["corpus"] == corpora[line]) & (rows["ratio"] == ratios[column])]
            _difference_panel(ax, here, others, legend)
            ax.set_title(f"{corpora[line]}, {percent(ratios[column])}", fontsize=9)
        for ax in axes[-1]:
            ax.set_xlabel("KL difference, nats\n(left: entropy is closer)")
        handles = [
            mpl.lines.Line2D([], [], label=f"entropy − {legend.label(name)}", **legend.look(name) | {"linestyle": "solid"})
            for name in others
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        title = "KL to the dense model, entropy minus another criterion"
        fig.suptitle(f"{model}: {title}\n(95 % intervals; filled: told apart after Holm's correction)", fontsize=10)
    certain = rows[rows["p_holm"] < 1 - intervals.LEVEL]
    closer = int((certain["difference"] < 0).sum())
    told = (
        f"Of {len(rows)} differences entropy is closer to the dense model in {closer} and further away in {len(certain) - closer}"
    )
    return closed(fig, f"{told}; the other {len(rows) - len(certain)} are undecided after Holm's correction.")


def _difference_panel(ax, rows: pd.DataFrame, others: list[str], legend: Legend) -> None:
    heights = [where for where in POSITIONS if where in set(rows["positions"])]
    step = min(0.3, 0.8 / len(others))
    for row in rows.to_dict("records"):
        height = heights.index(row["positions"]) + step * (others.index(row["other"]) - (len(others) - 1) / 2)
        tone = legend.colour(row["other"])
        ax.errorbar(
            row["difference"],
            height,
            xerr=[[row["difference"] - row["low"]], [row["high"] - row["difference"]]],
            marker=legend.look(row["other"])["marker"],
            linestyle="none",
            color=tone,
            markerfacecolor=tone if row["p_holm"] < 0.05 else "white",
            capsize=2,
            markersize=4.5,
        )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(heights)), [POSITIONS[where] for where in heights])
    ax.set_ylim(len(heights) - 0.5, -0.5)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    ax.grid(axis="y", visible=False)


def entropy_sentence(frame: pd.DataFrame, model: str, legend: Legend) -> str:
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
        verdict = f"against {legend.label(other)}, closer in {len(closer)} and further away in {len(further)} of {len(part)}"
        verdict += " comparisons"
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
        f"{corpus}, {POSITIONS[where]} at {percents(part['ratio'])}"
        for (corpus, where), part in rows.groupby(["corpus", "positions"], sort=False)
    ]
