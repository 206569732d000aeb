"""What is left of the model under each criterion: the main table, the overview, curves against the ratio."""

import itertools
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.errors import UserError
from hfprune_nb.report import intervals
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import LOWER_IS_BETTER, UNITS, Results, columns, percent, sample
from hfprune_nb.report.style import AXIS_LABELS, CROWD, DENSE, STYLE, UNIFORM, WIDTH, Legend, closed, handles_of, message, series
from hfprune_nb.report.table import ABSENT, Table, format_cell, format_value, measure_name, within_limits

INTERVALS = (
    "Cells are means with 95 % intervals over calibration seeds and items, each with the degrees of freedom that its number "
    "gives (Behrens and Fisher); over items only where there is one seed or none. In simulation they cover 95 % or more with "
    "two seeds and with more, whatever part of the variance is the seeds': few seeds show in the width."
)


MARKS = {"better": "▲", "worse": "▼", "": ""}


def criterion_table(results: Results) -> Table:
    """Return the main table: rows dense and each criterion x ratio, columns tasks, average, perplexity and fidelity.

    `long` has the columns model, criterion, ratio, column, measure, label, unit, mean, low, high, n_seeds, n_items,
    source and note.
    """
    rows = []
    for model in results.model_names:
        of_model = results.models[results.models["model"] == model]
        pairs = set(zip(of_model["criterion"], of_model["ratio"], strict=True))
        ordered = sorted(pairs, key=lambda pair: (pair[1], results.legend.order(pair[0])))
        for (criterion, ratio), column in itertools.product(ordered, columns(results, model)):
            interval = _cell(sample(results, column, model, criterion, ratio), column.measure)
            rows.append(
                {
                    "model": model,
                    "criterion": criterion,
                    "ratio": ratio,
                    "column": column.name,
                    "measure": column.measure,
                    "label": column.label,
                    "unit": UNITS[column.measure],
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "n_seeds": interval.n_seeds,
                    "n_items": interval.n_items,
                    "source": "measured",
                    "note": interval.note,
                }
            )
    if not rows:
        raise UserError("the evaluations hold no task, perplexity or fidelity: rerun stage 05 with one of them")
    long = pd.DataFrame(rows)
    if (allocated := long["criterion"].map(lambda name: results.legend.parts(name.partition("@")[2])[0])).nunique() > 1:
        long.insert(2, "allocation", allocated)
    display = _display(long, format_cell, results.legend).drop(columns=["Model"] if len(results.model_names) == 1 else [])
    title = "Dense and pruned models by criterion and ratio of all parameters removed (measured)"
    notes = (INTERVALS, *_cell_notes(long, results.legend), protocol_note(results))
    return Table("criterion", title, long, display, notes, results.legend)


def _cell(frame: pd.DataFrame, measure: str) -> intervals.Interval:
    if frame.empty:
        return intervals.Interval(np.nan, np.nan, np.nan, 0, 0, "not measured")
    if not np.isfinite(frame["value"]).all():
        return intervals.Interval(np.nan, np.nan, np.nan, frame["seed"].nunique(), len(frame), "not finite")
    return within_limits(intervals.mean_interval(frame), measure)


def _display(long: pd.DataFrame, text: Callable[[dict], str], legend: Legend) -> pd.DataFrame:
    rows = []
    for (model, ratio, criterion), cells in long.groupby(["model", "ratio", "criterion"], sort=False):
        row = {"Model": model, "Ratio": percent(ratio), "Criterion": legend.label(criterion), "Seeds": _seed_count(cells)}
        rows.append(row | {c["label"]: text(c) for c in cells.to_dict("records")})
    return pd.DataFrame(rows).fillna(ABSENT)


def _seed_count(cells: pd.DataFrame) -> str:
    return ABSENT if (cells["criterion"] == DENSE).all() else str(cells["n_seeds"].max())


def _cell_notes(long: pd.DataFrame, legend: Legend) -> list[str]:
    """Return the remarks of single cells as sentences, leaving out what every table says anyway."""
    told = long[long["note"].str.contains("left out|not finite")]
    return [
        f"{cell['model']}, {legend.label(cell['criterion'])} at {percent(cell['ratio'])}, {cell['label']}: {cell['note']}."
        for cell in told.to_dict("records")
    ]


def overview_table(criterion: Table, paired: Table) -> Table:
    """Return the study at a glance: average of tasks, perplexity and JS distance on the first corpus, marked against entropy
    or, without it, the first criterion.

    `criterion` and `paired` are the results of `criterion_table` and `paired_table`. `long` has their cells and the column
    `against_reference`: better, worse, or nothing where the paired difference is not decided after Holm's correction.
    """
    shown = criterion.long[criterion.long["measure"].isin(("average", "perplexity", "js"))]
    firsts = shown.drop_duplicates(["model", "measure"])[["model", "column"]]
    long = shown.merge(firsts, on=["model", "column"])
    verdicts = {
        (row["model"], row["ratio"], row["column"], frozenset([row["a"], row["b"]])): row["verdict"]
        for row in paired.long.to_dict("records")
    }
    legend = criterion.legend
    reference = legend.reference(long["criterion"])
    long["against_reference"] = [_against(reference, cell, verdicts, legend) for cell in long.to_dict("records")]
    display = _display(long, lambda cell: f"{format_cell(cell)} {MARKS[cell['against_reference']]}".rstrip(), legend)
    display = display.drop(columns=["Model"] if long["model"].nunique() == 1 else [])
    note = (
        f"{MARKS['better']} better, {MARKS['worse']} worse than {legend.label(reference)} on the same items and seeds, after "
        f"Holm's correction (paired table). Without a mark: this study cannot tell them apart. {_untested(long, legend)}"
        f" {intervals.FAMILY_ERROR}"
    )
    return Table("overview", "The study at a glance (measured)", long, display, (note.strip(), *criterion.notes), legend)


def _against(reference: str, cell: dict, verdicts: dict, legend: Legend) -> str:
    pair = frozenset([cell["criterion"], series(reference, cell["criterion"].partition("@")[2] or UNIFORM)])
    verdict = verdicts.get((cell["model"], cell["ratio"], cell["column"], pair), "")
    if not verdict.endswith(" better"):
        return ""
    return "better" if verdict == f"{legend.label(cell['criterion'])} better" else "worse"


def _untested(long: pd.DataFrame, legend: Legend) -> str:
    left = set(long["criterion"]) - {DENSE, *legend.compared(long["criterion"])}
    return f"Baselines, which have no test: {', '.join(map(legend.label, legend.in_order(left)))}." if left else ""


def against_ratio(criterion: Table, model: str) -> Figure:
    """Draw the average of tasks, perplexity (log axis) and JS against the ratio, dodged points with intervals per criterion.

    `criterion` is `criterion_table`; the dense model is a horizontal line. The scale is that of the criteria: a baseline that is
    far from them leaves it. Of a crowd those criteria are drawn that are best in the last panel's measure.
    """
    cells, legend = criterion.long[(criterion.long["model"] == model) & criterion.long["mean"].notna()], criterion.legend
    names = [
        name
        for measure, most in (("average", 1), ("perplexity", None), ("js", None))
        for name in cells.loc[(cells["measure"] == measure) & (cells["criterion"] != DENSE), "column"].unique()[:most]
    ]
    if not names:
        return message(f"No pruned model of {model} was evaluated: nothing to draw against the ratio.")
    drawn = _drawn(cells, names[-1], legend)
    # Two panels side by side stay legible, and where their number is odd the legend takes the place of one.
    across = min(2, len(names))
    down = -(-len(names) // across)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(down, across, figsize=(WIDTH, 0.9 + 2.1 * down), squeeze=False)
        for ax, name in zip(axes.flat, names, strict=False):
            _ratio_panel(ax, cells[(cells["column"] == name) & cells["criterion"].isin([DENSE, *drawn])], legend)
        handles = handles_of(axes)
        order = [text for text in map(legend.label, legend.in_order(cells["criterion"])) if text in handles]
        spare = axes.flat[len(names) :]
        place = (
            {"loc": "center"} if len(spare) else {"loc": "outside lower center", "ncols": 3 if max(map(len, order)) < 26 else 2}
        )
        (spare[0] if len(spare) else fig).legend([handles[text] for text in order], order, **place)
        for ax in spare:
            ax.set_axis_off()
        fig.suptitle(f"{model}: what is left after pruning, 95 % intervals", fontsize=10)
    return closed(fig, _caption(cells, names, legend))


def _drawn(cells: pd.DataFrame, column: str, legend: Legend) -> list[str]:
    names = legend.in_order(cells.loc[cells["criterion"] != DENSE, "criterion"])
    if len(names) <= CROWD:
        return names
    means = cells[cells["column"] == column].groupby("criterion")["mean"].mean().drop(DENSE, errors="ignore")
    best = means.sort_values(ascending=cells.loc[cells["column"] == column, "measure"].iloc[0] in LOWER_IS_BETTER)
    return legend.in_order({legend.reference(names), *best.index[: CROWD - 1]})


def _caption(cells: pd.DataFrame, names: list[str], legend: Legend) -> str:
    """Return what the reference loses in the first panel of perplexity, or of what there is, and who leaves the scale."""
    column = next((name for name in names if name.startswith("perplexity")), names[0])
    rows = cells[cells["column"] == column].set_index(["criterion", "ratio"])["mean"]
    name, measure = legend.reference(cells["criterion"]), cells.loc[cells["column"] == column, "measure"].iloc[0]
    if name not in rows.index:
        return ""
    own = rows[name].sort_index()
    told = [f"{measure_name(column, measure)} with {legend.label(name)} is {format_value(own.iloc[-1], measure)} at "
            f"{percent(own.index[-1])}"]  # fmt: skip
    if DENSE in rows.index:
        told[0] += f" ({format_value(rows[DENSE].iloc[0], measure)} before pruning)"
    outside = set(rows.index.get_level_values(0)) - {DENSE, *legend.compared(rows.index.get_level_values(0))}
    told += [f"with {legend.label(other)} {format_value(rows[other].sort_index().iloc[-1], measure)}" for other in
             legend.in_order(outside)]  # fmt: skip
    text = ", ".join(told)
    return text[0].upper() + text[1:] + "."


def _ratio_panel(ax, cells: pd.DataFrame, legend: Legend) -> None:
    measure, name = cells["measure"].iloc[0], cells["column"].iloc[0]
    for dense in cells[(cells["criterion"] == DENSE) & (measure != "js")].to_dict("records"):
        ax.axhline(dense["mean"], color=legend.colour(DENSE), linewidth=1, label=legend.label(DENSE))
        ax.axhspan(dense["low"], dense["high"], color=legend.colour(DENSE), alpha=0.08, linewidth=0)
    pruned = cells[cells["criterion"] != DENSE]
    names, ratios = legend.in_order(pruned["criterion"]), sorted(100 * pruned["ratio"].unique())
    step = min(np.diff(ratios), default=10) * min(0.09, 0.6 / len(names))
    for index, criterion in enumerate(names):
        line = pruned[pruned["criterion"] == criterion].sort_values("ratio")
        ax.errorbar(
            100 * line["ratio"] + step * (index - (len(names) - 1) / 2),
            line["mean"],
            yerr=np.nan_to_num([line["mean"] - line["low"], line["high"] - line["mean"]]),
            label=legend.label(criterion),
            capsize=2,
            elinewidth=1,
            **legend.look(criterion) | {"linewidth": 0.8},
        )
    if measure == "perplexity":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value >= 1e5 else f"{value:,.4g}")
        ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    if len(shown := cells[cells["criterion"].isin([DENSE, *legend.compared(names)])].query("measure != 'js' or ratio > 0")):
        low, high = shown[["low", "mean"]].min(axis=None), shown[["high", "mean"]].max(axis=None)
        margin = (high / low) ** 0.1 if measure == "perplexity" else 0.1 * (high - low)
        if high > low:
            ax.set_ylim((low / margin, high * margin) if measure == "perplexity" else (low - margin, high + margin))
    ax.set_xticks(ratios)
    if len(ratios) == 1:  # by themselves axes would pull the dodged points apart to their edges
        ax.set_xlim(ratios[0] - 5, ratios[0] + 5)
    ax.set(title=measure_name(name, measure), xlabel="parameters removed, %", ylabel=AXIS_LABELS[measure])
