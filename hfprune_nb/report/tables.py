"""The paper's tables from a study's evaluations: a mean and a 95 % interval per cell, published values beside ours."""

import html
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.errors import UserError
from hfprune_nb.report import intervals, published
from hfprune_nb.report.measurements import (
    CRITERIA,
    FIDELITY,
    LIMITS,
    LOWER_IS_BETTER,
    MEASURES,
    UNITS,
    Results,
    columns,
    in_order,
    label,
    percent,
    protocol_note,
    sample,
)

PAPER_CRITERIA = {"dense": "dense", "CE": "one_hot_ce", "SD": "self_distillation", "IE": "entropy"}
PAPER_MODEL = "LLaMA-2-7B"
PAPER_COLUMNS = {
    "avg10": "average",
    "ARCc": "arc_challenge",
    "Wino": "winogrande",
    "TfQA": "truthfulqa_mc2",
    "JS distance": "js:c4",
    "Top-15 Jaccard": "jaccard15:c4",
}
PAIRED = [
    "model",
    "ratio",
    "column",
    "measure",
    "a",
    "b",
    "mean",
    "low",
    "high",
    "p",
    "p_items",
    "standard_error",
    "seed_share",
    "n_seeds",
    "n_items",
    "note",
]
PAIRED_DISPLAY = [
    "Model",
    "Measure",
    "Ratio",
    "A - B",
    "Difference",
    "p",
    "p (Holm)",
    "p (items)",
    "Detectable",
    "Seeds",
    "Items",
    "Verdict",
]
ABSENT = "–"
ONE_SEED = "one seed: no verdict"
INCONSISTENT = "†"
MARKS = {"better": "▲", "worse": "▼", "": ""}
DEFINITIONS = (
    "Compared with the dense model at the same positions of held-out text: JS distance is the square root of the "
    "Jensen-Shannon divergence in base 2 (0 to 1; the paper gives neither root nor base), KL is KL(dense || pruned) in "
    "nats, top-15 Jaccard the overlap of the 15 likeliest tokens, top-1 agreement the share of equal likeliest tokens."
)
INTERVALS = (
    "Cells are means with 95 % intervals over calibration seeds and items, each with the degrees of freedom that its number "
    "gives (Behrens and Fisher); over items only where there is one seed or none. In simulation they cover 95 % or more with "
    "two seeds and with more, whatever part of the variance is the seeds': few seeds show in the width."
)


@dataclass(frozen=True)
class Table:
    """A table twice: `long` for machines (one row per cell) and `display` for readers, with the notes printed below."""

    name: str
    title: str
    long: pd.DataFrame
    display: pd.DataFrame
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Return the table for readers as Markdown, title above, notes below."""
        body = self.display.to_markdown(index=False, disable_numparse=True) if len(self.display) else "No rows."
        return "\n\n".join([f"**{self.title}**", body, *self.notes]) + "\n"

    def styler(self):
        """Return the table for readers as a pandas Styler: rules between groups of rows, published columns grey."""
        # Stable identifiers keep the committed HTML free of differences that mean nothing.
        style = self.display.style.hide(axis="index").set_uuid(self.name).set_caption(self.title)
        published = [name for name in self.display if "paper" in name]
        style = style.set_properties(subset=published, **{"color": "#666666", "font-style": "italic"})
        groups = [name for name in ("Model", "Ratio") if name in self.display]
        if groups and len(self.display):
            starts = self.display[groups].ne(self.display[groups].shift()).any(axis=1)
            rules = np.where(starts, "border-top: 1px solid #999999", "")
            style = style.apply(lambda column: rules, axis=0)
        return style.set_table_styles(
            [
                {"selector": "", "props": "border-collapse: collapse; font-size: 13px"},
                {"selector": "caption", "props": "text-align: left; font-weight: bold; padding: 6px 0"},
                {"selector": "th", "props": "text-align: left; vertical-align: bottom; padding: 3px 10px 3px 0"},
                {"selector": "td", "props": "text-align: left; padding: 3px 10px 3px 0; white-space: nowrap"},
                {"selector": "tbody tr:last-child td", "props": "border-bottom: 1px solid #999999"},
            ]
        )

    def _repr_html_(self) -> str:
        notes = "".join(f'<p style="font-size: 12px; max-width: 70em">{html.escape(note)}</p>' for note in self.notes)
        return f'<div style="overflow-x: auto">{self.styler().to_html()}</div>{notes}'

    def write(self, folder: Path) -> list[Path]:
        """Write `<name>.csv` (long), `<name>.md` and `<name>.html` (for readers) into `folder`; return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title></head>"
            f'<body style="font-family: sans-serif; margin: 2em">{self._repr_html_()}</body></html>\n'
        )
        written = [folder / f"{self.name}.{ending}" for ending in ("csv", "md", "html")]
        for path, text in zip(written, (self.long.to_csv(index=False), self.markdown(), page), strict=True):
            path.write_text(text, encoding="utf-8")
        return written


def criterion_table(results: Results) -> Table:
    """Return the main table: rows dense and each criterion x ratio, columns tasks, average, perplexity and fidelity.

    `long` has the columns model, criterion, ratio, column, measure, label, unit, mean, low, high, n_seeds, n_items,
    source and note.
    """
    rows = []
    for model in results.model_names:
        of_model = results.models[results.models["model"] == model]
        pairs = set(zip(of_model["criterion"], of_model["ratio"], strict=True))
        ordered = sorted(pairs, key=lambda pair: (pair[1], in_order(of_model["criterion"]).index(pair[0])))
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
    display = _display(long, format_cell).drop(columns=["Model"] if len(results.model_names) == 1 else [])
    title = "Dense and pruned models by criterion and ratio of all parameters removed (measured)"
    return Table("criterion", title, long, display, (INTERVALS, *_cell_notes(long), protocol_note(results)))


def _cell(frame: pd.DataFrame, measure: str) -> intervals.Interval:
    if frame.empty:
        return intervals.Interval(np.nan, np.nan, np.nan, 0, 0, "not measured")
    if not np.isfinite(frame["value"]).all():
        return intervals.Interval(np.nan, np.nan, np.nan, frame["seed"].nunique(), len(frame), "not finite")
    return within_limits(intervals.mean_interval(frame), measure)


def within_limits(interval: intervals.Interval, measure: str) -> intervals.Interval:
    """Return a cell's interval in the unit of its table, perplexity for log-perplexity, inside the measure's limits."""
    bounds = np.array([interval.mean, interval.low, interval.high])
    with np.errstate(over="ignore"):
        bounds = np.exp(bounds) if measure == "perplexity" else np.clip(bounds, *LIMITS[measure])
    return replace(interval, **dict(zip(("mean", "low", "high"), bounds.tolist(), strict=True)))


def _display(long: pd.DataFrame, text: Callable[[dict], str]) -> pd.DataFrame:
    rows = []
    for (model, ratio, criterion), cells in long.groupby(["model", "ratio", "criterion"], sort=False):
        row = {"Model": model, "Ratio": percent(ratio), "Criterion": label(criterion), "Seeds": _seed_count(cells)}
        rows.append(row | {c["label"]: text(c) for c in cells.to_dict("records")})
    return pd.DataFrame(rows).fillna(ABSENT)


def _seed_count(cells: pd.DataFrame) -> str:
    return ABSENT if (cells["criterion"] == "dense").all() else str(cells["n_seeds"].max())


def format_cell(cell: dict) -> str:
    """Return a cell (mean, low, high, measure) as "46.2 [43.1, 49.0]"; a value without interval stands alone."""
    if pd.isna(cell["mean"]):
        return "not finite" if cell.get("note") == "not finite" else ABSENT
    mean, low, high = (format_value(cell[name], cell["measure"]) for name in ("mean", "low", "high"))
    return mean if pd.isna(cell["low"]) else f"{mean} [{low}, {high}]"


def format_value(value: float, measure: str) -> str:
    """Return a value with as many decimals as its measure supports; huge perplexities in powers of ten."""
    if measure == "perplexity":
        return f"{value:.3g}" if value >= 10_000 else f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
    return f"{value:.1f}" if UNITS[measure] == "%" else f"{value:.3f}"


def _cell_notes(long: pd.DataFrame) -> list[str]:
    """Return the remarks of single cells as sentences, leaving out what every table says anyway."""
    told = long[long["note"].str.contains("left out|not finite")]
    return [
        f"{cell['model']}, {label(cell['criterion'])} at {percent(cell['ratio'])}, {cell['label']}: {cell['note']}."
        for cell in told.to_dict("records")
    ]


def _paper_cells(tables: tuple[str, ...], path: Path | None = None) -> pd.DataFrame:
    """Return published LLaMA-2-7B cells in the long layout, ratio as a fraction, source `paper`."""
    frame = published.read(path)
    frame = frame.assign(mark=published.inconsistent(frame))
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
    cells = _paper_cells(("T6",), paper)
    dense = _paper_cells(("T1",), paper)
    cells = pd.concat([dense[(dense["criterion"] == "dense") & dense["column"].isin(cells["column"])], cells])
    long = criterion.long
    wanted = long["measure"].eq("average") | (long["measure"].eq("task") & long["column"].isin(cells["column"]))
    title = "Criterion ablation without tuning (paper's Table 6) beside the measured models"
    return _beside_paper("ablation", title, cells, criterion, wanted)


def fidelity_table(criterion: Table, paper: Path | None = None) -> Table:
    """Return the paper's Table 7 (distance to the dense model's next-token distribution), extended, beside ours.

    `criterion` is the result of `criterion_table`. The paper has JS distance and top-15 Jaccard on C4 only, and no
    self-distillation.
    """
    wanted = criterion.long["measure"].isin(FIDELITY) & (criterion.long["criterion"] != "dense")
    title = "Fidelity to the dense model (paper's Table 7, extended) beside the measured models"
    return _beside_paper("fidelity", title, _paper_cells(("T7",), paper), criterion, wanted, DEFINITIONS)


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
        for key in sorted(pairs, key=lambda pair: (pair[1], in_order(p[0] for p in pairs).index(pair[0]))):
            row = {"Model": model or ABSENT, "Ratio": percent(key[1]), "Criterion": label(key[0])}
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
    notes = [
        *notes,
        f"Columns marked paper are published single-run values of {PAPER_MODEL} on the paper's own protocol; they "
        "enter no mean and no interval. Columns marked measured are this study's.",
    ]
    if paper["inconsistent"].any():
        notes.append(f"{INCONSISTENT} The paper contradicts this value elsewhere: see the remark and published_defects.")
    if measured.empty:
        notes.append("Nothing of this table was measured in this study.")
    long = pd.concat([frame for frame in (measured, paper) if len(frame)], ignore_index=True)
    display = pd.DataFrame(rows).fillna(ABSENT)
    return Table(name, title, long, display, (*notes, *criterion.notes))


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


def paired_table(results: Results, criteria: tuple[str, ...] = CRITERIA) -> Table:
    """Return the differences A - B of the criteria by ratio, paired on the same items and calibration seeds.

    Measures: average of the tasks (points), log-perplexity (nats per token), JS and KL. `p` is over seeds and items,
    `p_holm` its Holm adjustment over all pairs and ratios of one measure on one model, `p_items` over items for these seeds
    (`intervals.paired_difference`); all three test the difference that is printed. `seed_share` is the part of the seeds in
    the variance, `detectable` the true difference that would be found with 80 % chance, `detectable_holm` that at Holm's
    strictest level (`intervals.Errors.detectable`). With one common seed there is neither p nor detectable.
    """
    rows = []
    for model in results.model_names:
        of_model = results.models[(results.models["model"] == model) & results.models["criterion"].isin(criteria)]
        compared = [c for c in columns(results, model) if c.measure in ("average", *LOWER_IS_BETTER)]
        for column, ratio in itertools.product(compared, sorted(of_model["ratio"].unique())):
            present = in_order(of_model.loc[of_model["ratio"] == ratio, "criterion"])
            for b, a in itertools.combinations(present, 2):
                sides = [sample(results, column, model, criterion, ratio) for criterion in (a, b)]
                row = {"model": model, "ratio": ratio, "column": column.name, "measure": column.measure, "a": a, "b": b}
                rows.append(row | _difference(*sides))
    long = pd.DataFrame(rows, columns=[*PAIRED, "errors"])
    long["p_holm"] = long.groupby(["model", "column"])["p"].transform(lambda p: intervals.holm(p)) if rows else []
    long["verdict"] = [_verdict(row) for row in long.to_dict("records")]
    long["source"] = "measured"
    families = long.groupby(["model", "column"])["p"].count()
    sizes = long.groupby(["model", "column"])["p"].transform("count").clip(lower=1)
    judged = list(zip(long.pop("errors"), long["p"].notna(), sizes, strict=True))
    long["detectable"] = [errors.detectable() if known else np.nan for errors, known, _ in judged]
    long["detectable_holm"] = [errors.detectable(size) if known else np.nan for errors, known, size in judged]
    notes = [
        "Differences A - B are paired on the same items and calibration seeds; interval and p are over both, with the degrees of "
        "freedom of the seeds for their part of the variance and those of the items for the rest (Behrens and Fisher). Averages "
        "in points, perplexity as difference of log-perplexity in nats per token, JS and KL in their own units; lower is better "
        "for all but averages.",
        f"Holm's correction is over the {families.max() if len(families) else 0} comparisons (pairs x ratios) of one "
        "measure on one model: where no criterion differs from another, 5 % of studies or fewer give a verdict on any of them "
        "(simulated). The items p-value holds for these calibration seeds only, Student's t over items of the difference "
        "that is printed, and gives no verdict.",
        "Detectable is the smallest true difference that this study would have found with 80 % chance (two-sided 5 %; after "
        "the slash at Holm's strictest level), with the same degrees of freedom: smaller ones can neither be seen nor excluded.",
    ]
    if (long["verdict"] == ONE_SEED).any():
        notes.append("One common calibration seed cannot tell a criterion from a lucky text: no p-value, no verdict.")
    if long.empty:
        notes.insert(0, "Fewer than two criteria were evaluated at the same ratio: nothing to compare.")
    display = _paired_display(long, len(results.model_names) > 1)
    title = "Paired differences between criteria (measured)"
    return Table("paired", title, long, display, (*notes, *_family_notes(long), protocol_note(results)))


def overview_table(criterion: Table, paired: Table) -> Table:
    """Return the study at a glance: average of tasks, perplexity and JS distance on the first corpus, marked against entropy.

    `criterion` and `paired` are the results of `criterion_table` and `paired_table`. `long` has their cells and the column
    `against_entropy`: better, worse, or nothing where the paired difference is not decided after Holm's correction.
    """
    shown = criterion.long[criterion.long["measure"].isin(("average", "perplexity", "js"))]
    firsts = shown.drop_duplicates(["model", "measure"])[["model", "column"]]
    long = shown.merge(firsts, on=["model", "column"])
    verdicts = {
        (row["model"], row["ratio"], row["column"], frozenset([row["a"], row["b"]])): row["verdict"]
        for row in paired.long.to_dict("records")
    }
    long["against_entropy"] = [_against_entropy(cell, verdicts) for cell in long.to_dict("records")]
    display = _display(long, lambda cell: f"{format_cell(cell)} {MARKS[cell['against_entropy']]}".rstrip())
    display = display.drop(columns=["Model"] if long["model"].nunique() == 1 else [])
    note = (
        f"{MARKS['better']} better, {MARKS['worse']} worse than {label('entropy')} on the same items and seeds, after Holm's "
        "correction (paired table). One-hot CE and self-distillation without a mark: this study cannot tell them from entropy. "
        "Magnitude and random are controls without a test."
    )
    return Table("overview", "The study at a glance (measured)", long, display, (note, *criterion.notes))


def _against_entropy(cell: dict, verdicts: dict) -> str:
    pair = frozenset([cell["criterion"], "entropy"])
    verdict = verdicts.get((cell["model"], cell["ratio"], cell["column"], pair), "")
    if not verdict.endswith(" better"):
        return ""
    return "better" if verdict.startswith(label(cell["criterion"])) else "worse"


def with_detectable(table: Table, paired: Table) -> Table:
    """Return `table` with a note on the differences that the study could have found, from `paired_table`.

    Tables made from it (`ablation_table`, `fidelity_table`) keep the note.
    """
    told = []
    for (model, column, measure), part in paired.long.groupby(["model", "column", "measure"], sort=False):
        most = part["detectable"].max()
        if np.isfinite(most):
            told.append(f"{model}, {measure_label(column, measure)}: {most:.{_digits(measure)}f}")
    if not told:
        return table
    note = (
        "Smallest true difference between two criteria that this study would have found with 80 % chance, the largest over pairs "
        f"and ratios: {'; '.join(told)}. Smaller ones are found less often, so not finding one does not exclude it; the paired "
        "table has each comparison."
    )
    return replace(table, notes=(*table.notes, note))


def _difference(a: pd.DataFrame, b: pd.DataFrame) -> dict:
    unknown = {"n_seeds": 0, "n_items": 0}  # all else is NaN in the frame
    if a.empty or b.empty:
        return unknown | {"note": "not measured"}
    if not (np.isfinite(a["value"]).all() and np.isfinite(b["value"]).all()):
        return unknown | {"note": "not finite"}
    if not set(a["seed"]) & set(b["seed"]):
        return unknown | {"note": "no common seed"}
    difference = intervals.paired_difference(a, b)
    return vars(difference) | {"standard_error": difference.errors.total, "seed_share": difference.errors.seed_share}


def _verdict(row: dict) -> str:
    if pd.isna(row["low"]):
        return "no interval"
    if pd.isna(row["p"]):
        return ONE_SEED
    if not (row["low"] > 0 or row["high"] < 0):
        return "interval crosses zero"
    better = "b" if (row["mean"] > 0) == (row["measure"] in LOWER_IS_BETTER) else "a"
    return f"{label(row[better])} better" + (", not after Holm" if row["p_holm"] >= 1 - intervals.LEVEL else "")


def _paired_display(long: pd.DataFrame, several_models: bool) -> pd.DataFrame:
    rows = [
        {
            "Model": row["model"],
            "Measure": measure_label(row["column"], row["measure"]),
            "Ratio": percent(row["ratio"]),
            "A - B": f"{label(row['a'])} - {label(row['b'])}",
            "Difference": _format_difference(row),
            "p": format_p(row["p"]),
            "p (Holm)": format_p(row["p_holm"]),
            "p (items)": format_p(row["p_items"]),
            "Detectable": _format_detectable(row),
            "Seeds": str(row["n_seeds"]),
            "Items": str(row["n_items"]),
            "Verdict": row["verdict"],
        }
        for row in long.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=PAIRED_DISPLAY).drop(columns=[] if several_models else ["Model"])


def measure_label(column: str, measure: str) -> str:
    """Return a compared column's name for readers, with its unit: "log-perplexity c4, nats per token"."""
    corpus = column.partition(":")[2]
    if measure == "average":
        return "average without CrowS-Pairs, points" if column != "average" else "average of tasks, points"
    return f"log-perplexity {corpus}, nats per token" if measure == "perplexity" else f"{MEASURES[measure]} {corpus}"


def _format_detectable(row: dict) -> str:
    if pd.isna(row["detectable"]):
        return ABSENT
    digits = _digits(row["measure"])
    return f"{row['detectable']:.{digits}f} / {row['detectable_holm']:.{digits}f}"


def _digits(measure: str) -> int:
    return 1 if measure == "average" else 3


def _format_difference(row: dict) -> str:
    if pd.isna(row["mean"]):
        return row["note"] or ABSENT
    digits = _digits(row["measure"])
    text = f"{row['mean']:+.{digits}f}"
    return text if pd.isna(row["low"]) else f"{text} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"


def format_p(p: float) -> str:
    """Return a p-value with three decimals, "< 0.001" below."""
    return ABSENT if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _family_notes(long: pd.DataFrame) -> list[str]:
    notes = long.loc[long["note"].str.contains("left out|common", na=False), "note"]
    return [f"Some comparisons: {note}." for note in notes.unique()]


def published_tables(results: Results | None = None, paper: Path | None = None) -> list[Table]:
    """Return three tables made of the paper's numbers alone: its rows of ten tasks, its gaps, and its contradictions.

    With `results` the gaps are set beside the share of items that our two models answer differently.
    """
    frame = published.read(paper)
    printed, gaps, wrong = published.rows(frame), published.gaps(frame), published.contradictions(frame)
    rows = pd.DataFrame(
        {
            "Table": printed["table"].str.removeprefix("T"),
            "Model": printed["model"],
            "Ratio": [percent(ratio / 100) for ratio in printed["ratio_pct"]],
            "Method": printed["method"],
            "Average, paper": printed["average"].map("{:.1f}".format),
            "Average of the cells": printed["recomputed"].map("{:.1f}".format),
            "Standard error": printed["standard_error"].map("{:.2f}".format),
            "Without CrowS-Pairs": printed["without_crows"].map("{:.1f}".format),
            "Remark": [f"{INCONSISTENT} {text}" if text else "" for text in printed["remark"]],
        }
    )
    differences = pd.DataFrame(
        {
            "Table": gaps["table"].str.removeprefix("T"),
            "Model": gaps["model"],
            "Ratio": [percent(ratio / 100) for ratio in gaps["ratio"]],
            "A - B": [f"{a} - {b}" for a, b in zip(gaps["a"], gaps["b"], strict=True)],
            "Gap, paper": gaps["gap"].map("{:+.1f}".format),
            "95 % half-width, unpaired": gaps["unpaired_half_width"].map("{:.2f}".format)
            + gaps["cells"].map({True: "", False: " at most"}),
            "Larger than that": gaps["exceeds"].map({True: "yes", False: "no"}),
            "Paired test needs at most": gaps["most_discordant"].map("{:.1f} % answered differently".format),
        }
    )
    defects = wrong[["place", "printed", "computed"]].set_axis(["Place", "Printed, paper", "From the paper's own values"], axis=1)
    sizes = ", ".join(f"{task} {count}" for task, count in published.ITEMS.items())
    origin = "All values are published ones or computed from them; nothing in this table was measured."
    sampling = (
        f"Standard errors are binomial, from the items that lm-eval scores ({sizes}); tasks are independent, and an average "
        "is unweighted. They hold for drawing items; calibration and tuning seeds would add to them."
    )
    paired = (
        "A paired comparison on the same items is sharper than the unpaired half-width. The last column is the largest share of "
        "items that the two models may answer differently (one right, one wrong) for a gap of this size to reach 5 %."
    )
    share = [] if results is None else published.discordance(results, "entropy", "one_hot_ce").to_dict("records")
    ours = [f"{row['model']} at {percent(row['ratio'])}: {row['share']:.1f} %" for row in share]
    notes = [f"Measured in this study, entropy against one-hot CE: {'; '.join(ours)}."] if ours else []
    return [
        Table("published", "The paper's averages and what its cells give", printed, rows, (origin, sampling)),
        Table(
            "published_gaps", "The paper's gaps beside the error of item sampling", gaps, differences, (origin, paired, *notes)
        ),
        Table("published_defects", "Where the paper contradicts itself", wrong.drop(columns="cells"), defects, (origin,)),
    ]


def findings(criterion: Table, paired: Table, paper: Path | None = None) -> list[str]:
    """Return what the study found as sentences, each generated from `criterion_table` and `paired_table`.

    No sentence calls one criterion better unless the paired interval excludes zero, also after Holm's correction.
    """
    sentences = []
    for model in criterion.long["model"].unique():
        cells = criterion.long[(criterion.long["model"] == model) & criterion.long["mean"].notna()]
        for measure in ("average", "perplexity"):
            shown = cells[cells["measure"] == measure]
            # The first average holds all tasks; the first corpus stands for perplexity, the table has the others.
            sentences += _level_sentences(model, shown[shown["column"] == shown["column"].min()])
        differences = paired.long[(paired.long["model"] == model) & paired.long["low"].notna()]
        sentences += [_pair_sentence(model, a, b, part) for (a, b), part in differences.groupby(["a", "b"], sort=False)]
        sentences += _detectable_sentences(model, differences)
    average = paired.long[(paired.long["column"] == "average") & paired.long["low"].notna()]
    sentences += carried_by_one_task(criterion.long, average)
    return sentences + _paper_sentences(average, _paper_cells(("T6",), paper))


def _level_sentences(model: str, cells: pd.DataFrame) -> list[str]:
    if cells.empty:
        return []
    column, measure = cells[["column", "measure"]].iloc[0]
    name = _measure_name(column, measure)
    unit = " %" if UNITS[measure] == "%" else ""
    dense = cells[cells["criterion"] == "dense"].to_dict("records")
    against = f" (dense {format_cell(dense[0])}{unit})" if dense else ""
    return [
        f"{model}, {percent(ratio)} of all parameters removed: {name} is "
        + ", ".join(f"{format_cell(cell)}{unit} for {label(cell['criterion'])}" for cell in part.to_dict("records"))
        + f"{against}."
        for ratio, part in cells[cells["criterion"] != "dense"].groupby("ratio")
    ]


def _measure_name(column: str, measure: str) -> str:
    if measure == "average":
        return measure_label(column, measure).partition(", ")[0]
    corpus = column.partition(":")[2]
    return f"{MEASURES[measure]} on {corpus}" if corpus else MEASURES[measure]


def carried_by_one_task(cells: pd.DataFrame, average: pd.DataFrame) -> list[str]:
    """Return a sentence for each difference between averages that has a verdict and of which one task makes more than half.

    `cells` is the long frame of `criterion_table`, `average` that of `paired_table`, the rows of the average of tasks.

    One task in which all of a model's answers tip over together can carry an average of nine.
    """
    sentences, tasks = [], cells[cells["measure"] == "task"]
    for row in average.to_dict("records"):
        if not row["verdict"].endswith(" better"):
            continue
        here = tasks[(tasks["model"] == row["model"]) & (tasks["ratio"] == row["ratio"])]
        scores = here.pivot(index="column", columns="criterion", values="mean")
        shares = (scores[row["a"]] - scores[row["b"]]) / len(scores)
        task = (shares * np.sign(row["mean"])).idxmax()
        if shares[task] / row["mean"] > 0.5:
            sentences.append(
                f"{row['model']} at {percent(row['ratio'])}: of the {row['mean']:+.1f} points between the averages of "
                f"{label(row['a'])} and {label(row['b'])}, {task} alone makes {shares[task]:+.1f}."
            )
    return sentences


def _pair_sentence(model: str, a: str, b: str, differences: pd.DataFrame) -> str:
    """Return one sentence on a pair of criteria: where which one is better, where the data leave it open."""
    verdicts = differences["verdict"].where(differences["verdict"].str.endswith(" better"), "undecided")
    parts = []
    for verdict in sorted(verdicts.unique(), key=lambda text: text == "undecided"):
        rows = differences[verdicts == verdict]
        where = [
            f"{_measure_name(column, measure)} at {', '.join(map(percent, part['ratio']))}"
            for (column, measure), part in rows.groupby(["column", "measure"], sort=False)
        ]
        parts.append(f"{verdict} in {'; '.join(where)}")
    return f"{model}, {label(a)} against {label(b)}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _detectable_sentences(model: str, differences: pd.DataFrame) -> list[str]:
    """Return for the average of tasks and the first corpus' perplexity what the study could have found, at its worst."""
    sentences = []
    for measure in ("average", "perplexity"):
        rows = differences[differences["measure"] == measure]
        rows = rows[rows["column"] == rows["column"].iloc[0]] if len(rows) else rows
        rows = rows.dropna(subset=["detectable"])
        if rows.empty:
            continue
        least, most, holm = rows["detectable"].min(), rows["detectable"].max(), rows["detectable_holm"].max()
        digits, found = _digits(measure), rows["verdict"].str.endswith(" better").sum()
        name, _, unit = measure_label(rows["column"].iloc[0], measure).partition(", ")
        sentences.append(
            f"{model}, {name}: a true difference of {most:.{digits}f} {unit} or more between two criteria would have been found "
            f"with 80 % chance at every ratio ({least:.{digits}f} in the most precise comparison, {holm:.{digits}f} at Holm's "
            f"strictest level); {found} of {len(rows)} comparisons found one, and smaller differences cannot be excluded."
        )
    return sentences


def _paper_sentences(average: pd.DataFrame, paper: pd.DataFrame) -> list[str]:
    sentences = []
    theirs = paper[paper["column"] == "average"].set_index(["ratio", "criterion"])["mean"]
    for row in average.to_dict("records"):
        sides = [(row["ratio"], row[side]) for side in ("a", "b")]
        if all(side in theirs.index for side in sides):
            gap = theirs[sides[0]] - theirs[sides[1]]
            inside = "inside" if row["low"] <= gap <= row["high"] else "outside"
            sentences.append(
                f"The paper ({PAPER_MODEL}, one run) prints {gap:+.1f} points for {label(row['a'])} minus "
                f"{label(row['b'])} at {percent(row['ratio'])}; measured on {row['model']}: {_format_difference(row)}, "
                f"so the published gap lies {inside} our interval."
            )
    return sentences
