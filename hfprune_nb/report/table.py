"""A table twice, for machines and for readers, and how its numbers are printed."""

import html
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.report import intervals
from hfprune_nb.report.results import LIMITS, MEASURES, UNITS
from hfprune_nb.report.style import DIGITS, Legend

ABSENT = "–"
ONE_SEED = "one seed: no verdict"


@dataclass(frozen=True)
class Table:
    """A table twice: `long` for machines (one row per cell) and `display` for readers, with the notes printed below.

    legend : order, names and looks of its criteria, for the figures and sentences that are made of it.
    """

    name: str
    title: str
    long: pd.DataFrame
    display: pd.DataFrame
    notes: tuple[str, ...]
    legend: Legend = field(default_factory=Legend)

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
        for path, text in zip(
            written, (self.long.to_csv(index=False, float_format=f"%.{DIGITS}g"), self.markdown(), page), strict=True
        ):
            path.write_text(text, encoding="utf-8")
        return written


def format_cell(cell: dict) -> str:
    """Return a cell (mean, low, high, measure) as "46.2 [43.1, 49.0]"; a value without interval stands alone."""
    if pd.isna(cell["mean"]):
        return "not finite" if cell.get("note") == "not finite" else ABSENT
    mean, low, high = (format_value(cell[name], cell["measure"]) for name in ("mean", "low", "high"))
    return mean if pd.isna(cell["low"]) else f"{mean} [{low}, {high}]"


def within_limits(interval: intervals.Interval, measure: str) -> intervals.Interval:
    """Return a cell's interval in the unit of its table, perplexity for log-perplexity, inside the measure's limits."""
    bounds = np.array([interval.mean, interval.low, interval.high])
    with np.errstate(over="ignore"):
        bounds = np.exp(bounds) if measure == "perplexity" else np.clip(bounds, *LIMITS[measure])
    return replace(interval, **dict(zip(("mean", "low", "high"), bounds.tolist(), strict=True)))


def format_value(value: float, measure: str) -> str:
    """Return a value with as many decimals as its measure supports; huge perplexities in powers of ten."""
    if measure == "perplexity":
        return f"{value:.3g}" if value >= 10_000 else f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
    return f"{value:.1f}" if UNITS[measure] == "%" else f"{value:.3f}"


def measure_label(column: str, measure: str) -> str:
    """Return a compared column's name for readers, with its unit: "log-perplexity c4, nats per token"."""
    corpus = column.partition(":")[2]
    if measure == "average":
        return "average without CrowS-Pairs, points" if column != "average" else "average of tasks, points"
    return f"log-perplexity {corpus}, nats per token" if measure == "perplexity" else f"{MEASURES[measure]} {corpus}".strip()


def digits_of(measure: str) -> int:
    """Return how many decimals a difference in `measure` supports."""
    return 1 if UNITS[measure] == "%" else 3


def format_difference(row: dict) -> str:
    """Return a difference (mean, low, high, measure, note) as "+0.8 [-0.4, +2.0]", or its note where there is none."""
    if pd.isna(row["mean"]):
        return row["note"] or ABSENT
    digits = digits_of(row["measure"])
    text = f"{row['mean']:+.{digits}f}"
    return text if pd.isna(row["low"]) else f"{text} [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"


def bounded(value: float, low: float, high: float, form: str) -> str:
    """Return a value with its interval, alone where it has none."""
    return f"{value:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def format_p(p: float) -> str:
    """Return a p-value with three decimals, "< 0.001" below."""
    return ABSENT if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def measure_name(column: str, measure: str) -> str:
    """Return a column's name for sentences: "perplexity on c4"."""
    if measure == "average":
        return measure_label(column, measure).partition(", ")[0]
    corpus = column.partition(":")[2]
    return f"{MEASURES[measure]} on {corpus}" if corpus else MEASURES[measure]
