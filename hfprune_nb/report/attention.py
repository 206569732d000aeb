"""Is it better to remove attention as well? The same number of parameters out of the MLPs alone, or out of both (Table 8)."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals
from hfprune_nb.report.paper import PAPER_MODEL, read
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import columns, percent, read_summary, split_of
from hfprune_nb.report.style import DENSE, STYLE, WIDTH, closed, handles_of, neutral
from hfprune_nb.report.table import ABSENT, ONE_SEED, Table, format_cell, format_difference, measure_label, within_limits
from hfprune_nb.report.tuning import STATES, Recovered

MEASURES = ("average", "perplexity", "kl")
SPLITS = {"none": "MLP only", "proportional": "attention + MLP, proportional", "measured": "attention + MLP, measured"}
READING = (
    "All rows of one ratio remove the same number of parameters, to within half a neuron per layer. A group is a key and a value "
    "head with the query heads that read them; every layer loses the same whole number of them, so a split is rounded: with "
    "three groups in a layer the attention can give a third or two thirds of itself, and nothing between; where it is rounded to "
    "none, the model is that of the MLPs alone. 'Proportional' wants the same fraction of attention and MLPs, 'measured' what "
    "one ranking of all neurons and groups by importance per parameter gives."
)
COMPARED = (
    "'- MLP only' is paired by item and calibration seed, with 95 % intervals: points for tasks, nats per token for "
    "log-perplexity, nats for KL. Holm's correction is over all differences of one measure on one model; one seed gives no "
    "p-value and no verdict."
)
PAPER_REMARK = (
    f"Paper: average of nine tasks, without TruthfulQA, as its Table 8 prints them for {PAPER_MODEL}. It states neither how its "
    "heads were scored nor how the ratio was shared out, so its one row of attention and MLP stands beside both splits."
)


def attention_table(evaluation_folders: Iterable[Path]) -> Table | None:
    """Return the models that lost attention groups beside those that lost neurons alone; None where a study has none.

    `long` has the columns model, ratio, criterion, split, state (untuned, tuned), groups_removed (of each layer), neuron_ratio,
    column, measure, label, mean, low, high, change (to the split `none`) with change_low and change_high, p, p_holm, n_seeds,
    n_items, source and note. Compensated models are left out.
    """
    folders = [Path(folder) for folder in evaluation_folders]
    given = {split_of(read_summary(folder)) for folder in folders} - {DENSE}
    if not given - {"none"} or "none" not in given:
        return None
    by_split = {split: Recovered(folders, split) for split in SPLITS if split in given}
    plain = by_split["none"].plain
    rows = []
    for split, recovered in by_split.items():
        for tuned, state in STATES.items():
            results = recovered.by_treatment.get((tuned, "none"))
            if results is None:
                continue
            found = results.models[results.models["criterion"] != DENSE]
            for point in found.drop_duplicates(["model", "criterion", "ratio"]).to_dict("records"):
                keys = {name: point[name] for name in ("model", "ratio", "criterion", "groups_removed", "neuron_ratio")}
                for column in columns(plain, point["model"]):
                    if column.measure in MEASURES:
                        both = (recovered, by_split["none"])
                        own, without = (each.sample(tuned, "none", column, *_place(point)) for each in both)
                        named = {"column": column.name, "measure": column.measure, "label": column.label}
                        rows.append(
                            keys
                            | {"split": split, "state": state}
                            | named
                            | _cell(own, without, point["groups_removed"], column.measure)
                        )
    long = pd.DataFrame(rows)
    long["p_holm"] = long.groupby(["model", "column"])["p"].transform(lambda p: intervals.holm(p))
    order = {name: place for place, name in enumerate((*STATES.values(), *SPLITS))}
    long = long.sort_values(
        ["model", "ratio", "criterion", "state", "split"], key=_ranked(order), kind="stable", ignore_index=True
    )
    title = "Attention and MLPs pruned to the same number of parameters (paper's Table 8 beside the measured models)"
    notes = (READING, COMPARED, PAPER_REMARK, protocol_note(plain))
    return Table("attention", title, long, _display(long, plain.legend), notes, plain.legend)


def attention_figure(table: Table, model: str) -> Figure:
    """Draw the average of tasks and KL against the ratio, a column per criterion and a marker per split; hollow: untuned."""
    cells = table.long[(table.long["model"] == model) & ((table.long["measure"] == "kl") | (table.long["column"] == "average"))]
    names, criteria = list(dict.fromkeys(cells["column"])), list(dict.fromkeys(cells["criterion"]))
    splits = [split for split in SPLITS if split in set(cells["split"])]
    with plt.rc_context(STYLE):
        size = WIDTH, 0.9 + 2 * len(names)
        fig, axes = plt.subplots(len(names), len(criteria), figsize=size, sharex=True, sharey="row", squeeze=False)
        for (row, name), (column, criterion) in itertools.product(enumerate(names), enumerate(criteria)):
            ax, part = axes[row][column], cells[(cells["column"] == name) & (cells["criterion"] == criterion)]
            for (split, state), line in part.groupby(["split", "state"], sort=False):
                place, tuned = splits.index(split), state == STATES[True]
                shift = 0.8 * (place - (len(splits) - 1) / 2) + 0.3 * (tuned - 0.5)
                look = neutral(place) | {"linestyle": "none", "mfc": None if tuned else "white"}
                error = np.nan_to_num([line["mean"] - line["low"], line["high"] - line["mean"]])
                ax.errorbar(
                    100 * line["ratio"] + shift, line["mean"], yerr=error, label=f"{SPLITS[split]}, {state}", capsize=2, **look
                )
            ax.set(ylabel=part["label"].iloc[0] if column == 0 else "", title=table.legend.label(criterion) if row == 0 else "")
        for ax in axes[-1]:
            ax.set_xlabel("parameters removed, %")
        handles = handles_of(axes)
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
        fig.suptitle(f"{model}: the same number of parameters out of MLPs alone, or out of attention and MLPs", fontsize=10)
    changes = cells[cells["change"].notna()]
    told = int((changes["p_holm"] < 1 - intervals.LEVEL).sum())
    return closed(fig, f"Giving up attention in place of neurons changes {told} of {len(changes)} cells after Holm's correction.")


def sentences(table: Table) -> list[str]:
    """Return for each model that lost attention what that changed in the average of tasks and in KL, and whether it is told."""
    told = []
    rows = table.long[(table.long["split"] != "none") & table.long["change"].notna()]
    for row in rows[(rows["measure"] == "kl") | (rows["column"] == "average")].to_dict("records"):
        better = (row["change"] < 0) == (row["measure"] == "kl")
        verdict = ONE_SEED if pd.isna(row["p_holm"]) else "not told apart"
        if row["p_holm"] < 1 - intervals.LEVEL:
            verdict = "better" if better else "worse"
        groups = f"{row['groups_removed']:.0f} attention group" + ("s" if row["groups_removed"] != 1 else "")
        told.append(
            f"{row['model']} at {percent(row['ratio'])}, {table.legend.label(row['criterion'])}, {row['state']}: {groups} fewer "
            f"in each layer ({row['split']} split) in place of neurons change {measure_label(row['column'], row['measure'])} by "
            f"{_change(row)}: {verdict}."
        )
    return told


def _place(point: dict) -> tuple[str, str, float]:
    return point["model"], point["criterion"], point["ratio"]


def _ranked(order: dict):
    return lambda values: values.map(order) if values.name in ("state", "split") else values


def _cell(own: pd.DataFrame, without: pd.DataFrame, removed: int, measure: str) -> dict:
    cell = {
        "change": float("nan"),
        "change_low": float("nan"),
        "change_high": float("nan"),
        "p": float("nan"),
        "source": "measured",
    }
    level = within_limits(intervals.mean_interval(own), measure)
    cell |= {name: getattr(level, name) for name in ("mean", "low", "high", "n_seeds", "n_items", "note")}
    if removed and len(without):
        change = intervals.paired_difference(own, without)
        cell |= {"change": change.mean, "change_low": change.low, "change_high": change.high, "p": change.p}
    return cell


def _change(row: dict) -> str:
    if pd.isna(row["change"]):
        return ABSENT
    return format_difference(row | {"mean": row["change"], "low": row["change_low"], "high": row["change_high"]})


def _display(long: pd.DataFrame, legend) -> pd.DataFrame:
    paper, several, rows = read(), long["model"].nunique() > 1, []
    for (model, ratio, criterion, state, split), cells in long.groupby(
        ["model", "ratio", "criterion", "state", "split"], sort=False
    ):
        first = cells.iloc[0]
        row = {"Model": model} if several else {}
        row |= {"Ratio": percent(ratio), "Criterion": legend.label(criterion), "State": state, "Removed from": SPLITS[split]}
        row |= {"groups per layer": str(-int(first["groups_removed"])), "MLP neurons": f"-{percent(first['neuron_ratio'])}"}
        for cell in cells.to_dict("records"):
            row[cell["label"]] = format_cell(cell)
            row[f"{measure_label(cell['column'], cell['measure'])} - MLP only"] = _change(cell)
        rows.append(row | {f"average of 9, paper: {PAPER_MODEL}, %": _paper_value(paper, ratio, state, split)})
    return pd.DataFrame(rows).fillna(ABSENT)


def _paper_value(paper: pd.DataFrame, ratio: float, state: str, split: str) -> str:
    found = paper[
        (paper["table"] == "T8")
        & (paper["metric"] == "avg9")
        & (paper["method"] == ("MLP only" if split == "none" else "attention+MLP"))
        & (paper["ratio_pct"].astype(float) == round(100 * ratio, 4))
        & (paper["finetuned"] == ("yes" if state == STATES[True] else "no"))
    ]
    return f"{float(found['value'].iloc[0]):.1f}" if len(found) else ABSENT
