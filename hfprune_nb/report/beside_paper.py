"""The paper's Tables 6 and 7 beside the measured models; published values enter no mean and no interval."""

from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.report import paper
from hfprune_nb.report.paper import INCONSISTENT, PAPER_MODEL
from hfprune_nb.report.results import FIDELITY, MEASURES, UNITS, percent
from hfprune_nb.report.style import DENSE
from hfprune_nb.report.table import ABSENT, Table, format_cell, format_difference

SD = "self_distillation"
PAPER_CRITERIA = {"dense": DENSE, "CE": "one_hot_ce", "SD": SD, "IE": "entropy"}


PAPER_COLUMNS = {
    "avg10": "average",
    "ARCc": "arc_challenge",
    "Wino": "winogrande",
    "TfQA": "truthfulqa_mc2",
    "JS distance": "js:c4",
    "Top-15 Jaccard": "jaccard15:c4",
}


DEFINITIONS = (
    "Compared with the dense model at the same positions of held-out text: JS distance is the square root of the "
    "Jensen-Shannon divergence in base 2 (0 to 1; the paper gives neither root nor base), KL is KL(dense || pruned) in "
    "nats, top-15 Jaccard the overlap of the 15 likeliest tokens, top-1 agreement the share of equal likeliest tokens."
)


def paper_cells(tables: tuple[str, ...], path: Path | None = None) -> pd.DataFrame:
    """Return published LLaMA-2-7B cells in the long layout, ratio as a fraction, source `paper`."""
    frame = paper.read(path)
    frame = frame.assign(mark=paper.inconsistent(frame))
    frame = frame[frame["table"].isin(tables) & (frame["model"] == PAPER_MODEL) & (frame["finetuned"] == "no")]
    frame = frame[frame["method"].isin(PAPER_CRITERIA) & frame["metric"].isin(PAPER_COLUMNS)]
    name = frame["metric"].map(PAPER_COLUMNS)
    measure = name.str.split(":").str[0]
    measure = measure.where(measure.isin(MEASURES), "task")
    return pd.DataFrame(
        {
            "model": PAPER_MODEL,
            "criterion": frame["method"].map(PAPER_CRITERIA),
            "ratio": frame["ratio_pct"].astype(float) / 100,
            "column": name,
            "measure": measure,
            "label": frame["metric"],
            "unit": measure.map(UNITS),
            "mean": frame["value"].astype(float),
            "low": np.nan,
            "high": np.nan,
            "n_seeds": 1,
            "n_items": np.nan,
            "source": "paper",
            "note": frame["mark"].where(frame["mark"] != "", frame["note"].fillna("")),
            "inconsistent": frame["mark"] != "",
        }
    )


def ablation_table(criterion: Table, paper: Path | None = None) -> Table:
    """Return the paper's Table 6 (task accuracy without tuning, by criterion and ratio) beside the measured values.

    `criterion` is the result of `criterion_table`; only the averages and tasks with a published value are shown.
    """
    cells = paper_cells(("T6",), paper)
    dense = paper_cells(("T1",), paper)
    cells = pd.concat([dense[(dense["criterion"] == DENSE) & dense["column"].isin(cells["column"])], cells])
    long = criterion.long
    wanted = long["measure"].eq("average") | (long["measure"].eq("task") & long["column"].isin(cells["column"]))
    title = "Criterion ablation without tuning (paper's Table 6) beside the measured models"
    return _beside_paper("ablation", title, cells, criterion, wanted)


def fidelity_table(criterion: Table, paper: Path | None = None) -> Table:
    """Return the paper's Table 7 (distance to the dense model's next-token distribution), extended, beside ours.

    `criterion` is the result of `criterion_table`. The paper has JS distance and top-15 Jaccard on C4 only, and no
    self-distillation.
    """
    wanted = criterion.long["measure"].isin(FIDELITY) & (criterion.long["criterion"] != DENSE)
    title = "Fidelity to the dense model (paper's Table 7, extended) beside the measured models"
    return _beside_paper("fidelity", title, paper_cells(("T7",), paper), criterion, wanted, DEFINITIONS)


def _beside_paper(name: str, title: str, paper: pd.DataFrame, criterion: Table, wanted: pd.Series, *notes: str) -> Table:
    measured = criterion.long[wanted]
    rows = []
    for model in measured["model"].unique() if len(measured) else [None]:
        ours = measured[measured["model"] == model]
        pairs = set(zip(ours["criterion"], ours["ratio"], strict=True)) | set(
            zip(paper["criterion"], paper["ratio"], strict=True)
        )
        names = {c: text for c, text in zip(ours["column"], ours["label"], strict=True)}
        order = _paper_order(list(names), list(paper["column"].unique()))
        for key in sorted(pairs, key=lambda pair: (pair[1], criterion.legend.order(pair[0]))):
            row = {"Model": model or ABSENT, "Ratio": percent(key[1]), "Criterion": criterion.legend.label(key[0])}
            remarks = []
            for column in order:
                if column in set(paper["column"]):
                    theirs = _at(paper, key, column)
                    heading = paper.loc[paper["column"] == column, "label"].iloc[0].replace("avg10", "average of 10")
                    row[f"{heading}, paper: {PAPER_MODEL}"] = _paper_text(theirs) if theirs else ABSENT
                    remarks += [f"{heading}: {theirs['note']}"] if theirs and theirs["note"] else []
                if column in names:
                    cell = _at(ours, key, column)
                    row[f"{names[column]}, measured"] = format_cell(cell) if cell else ABSENT
            rows.append(row | {"Remark on the paper's value": "; ".join(remarks)})
    all_notes = [
        *notes,
        f"Columns marked paper are published single-run values of {PAPER_MODEL} on the paper's own protocol; they "
        "enter no mean and no interval. Columns marked measured are this study's.",
    ]
    if SD in set(paper["criterion"]) and SD in set(measured["criterion"]):
        own = [criterion.legend.label(name) for name in criterion.legend.variants(SD, measured["criterion"])]
        all_notes.append(
            f"Beside the paper's SD stands {criterion.legend.label(SD)}, activation-wise as HFPrune's own criterion; the paper "
            "does not say whether it took that or SDMPrune's, which is weight-wise"
            + (f": {', '.join(own)}, a row of its own." if own else " and not in this study.")
        )
    if paper["inconsistent"].any():
        all_notes.append(f"{INCONSISTENT} The paper contradicts this value elsewhere: see the remark and published_defects.")
    if measured.empty:
        all_notes.append("Nothing of this table was measured in this study.")
    long = pd.concat([frame for frame in (measured, paper) if len(frame)], ignore_index=True)
    display = pd.DataFrame(rows).fillna(ABSENT)
    return Table(name, title, long, display, (*all_notes, *criterion.notes), criterion.legend)


def _paper_text(cell: dict) -> str:
    return f"{format_cell(cell)} {INCONSISTENT}" if cell["inconsistent"] else format_cell(cell)


def _paper_order(measured: list[str], paper: list[str]) -> list[str]:
    """Return all column names, averages first, a published one before the measured ones of the same task or measure."""
    order = sorted(measured, key=lambda name: not name.startswith("average"))
    kinds = [name.partition(":")[0] for name in order]
    for name in paper:
        kind = name.partition(":")[0]
        if name not in order:
            place = kinds.index(kind) if kind in kinds else len(order)
            order.insert(place, name)
            kinds.insert(place, kind)
    return order


def _at(cells: pd.DataFrame, key: tuple[str, float], column: str) -> dict | None:
    found = cells[(cells["criterion"] == key[0]) & np.isclose(cells["ratio"], key[1]) & (cells["column"] == column)]
    return found.iloc[0].to_dict() if len(found) else None


def paper_sentences(paired: Table, paper: Path | None = None) -> list[str]:
    """Return for each pair of criteria that the paper compares by the average of tasks, its gap beside that of `paired_table`."""
    sentences, legend, cells = [], paired.legend, paper_cells(("T6",), paper)
    theirs = cells[cells["column"] == "average"].set_index(["ratio", "criterion"])["mean"]
    average = paired.long[(paired.long["column"] == "average") & paired.long["low"].notna()]
    for row in average.to_dict("records"):
        sides = [(row["ratio"], row[side]) for side in ("a", "b")]
        if all(side in theirs.index for side in sides):
            gap = theirs[sides[0]] - theirs[sides[1]]
            inside = "inside" if row["low"] <= gap <= row["high"] else "outside"
            sentences.append(
                f"The paper ({PAPER_MODEL}, one run) prints {gap:+.1f} points for {legend.label(row['a'])} minus "
                f"{legend.label(row['b'])} at {percent(row['ratio'])}; measured on {row['model']}: {format_difference(row)}, "
                f"so the published gap lies {inside} our interval."
            )
    return sentences
