"""Did it reproduce? Every number of a study's tables against those of another run."""

from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.report.style import DIGITS

EQUAL, ROUNDED, INSIDE, OUTSIDE, LOST, NEW = "equal", "equal to rounding", "inside the interval", "outside", "lost", "new"
STATES = (EQUAL, ROUNDED, INSIDE, OUTSIDE, LOST, NEW)
# Two in the last digit written: each side may have been rounded the other way.
_ROUNDING = 2 * 10.0 ** (1 - DIGITS)


def compare(ours: Path, theirs: Path) -> pd.DataFrame:
    """Return every number of the tables (CSV) in the folder `ours` with its counterpart in `theirs`.

    Columns: table, row (what its other columns say), column, ours, theirs, state. A row is found by its words and whole numbers.
    A state is `equal`, `equal to rounding` (in the last digit that tables are written with), `inside the interval` (of the row in
    `theirs`, from its columns low and high, or the number is that of such an interval and the two overlap), `outside`, `lost` or
    `new` where one side lacks the row or the table.
    """
    names = sorted({path.name for folder in (ours, theirs) for path in Path(folder).glob("*.csv")})
    parts = [_compare(name, *(_read(Path(folder) / name) for folder in (ours, theirs))) for name in names]
    found = [row for part in parts for row in part]
    return pd.DataFrame(found, columns=["table", "row", "column", "ours", "theirs", "state"])


def summary(compared: pd.DataFrame) -> pd.DataFrame:
    """Return how many numbers of each table are in which state, a row per table."""
    counts = compared.groupby(["table", "state"], sort=False).size().unstack(fill_value=0)
    return counts.reindex(columns=STATES, fill_value=0).reset_index()


def reproduced(compared: pd.DataFrame) -> bool:
    """Return whether every number is there and none lies outside."""
    return not compared["state"].isin([OUTSIDE, LOST, NEW]).any()


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""]) if path.is_file() else pd.DataFrame()


def _compare(name: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> list[list]:
    table = Path(name).stem
    numbers = [c for c in {**ours, **theirs} if any(c in side and side[c].dtype.kind == "f" for side in (ours, theirs))]
    words = [c for c in theirs if c in ours and c not in numbers and c not in ("note", "verdict")]
    # A ratio is a number that names a row.
    words += [c for c in ("ratio",) if c in ours and c in theirs and c not in words]
    numbers = [c for c in numbers if c not in words]
    left, right = _by_words(ours, words), _by_words(theirs, words)
    rows = [[table, key, "", np.nan, np.nan, LOST] for key in right if key not in left]
    rows += [[table, key, "", np.nan, np.nan, NEW] for key in left if key not in right]
    for key in left:
        if key in right:
            one, two = left[key], right[key]
            rows += [[table, key, c, one.get(c, np.nan), two.get(c, np.nan), _state(c, one, two)] for c in numbers]
    return rows


def _by_words(frame: pd.DataFrame, words: list[str]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for row in frame.to_dict("records"):
        key = ", ".join(str(row[name]) for name in words if not pd.isna(row[name]))
        while key in found:
            key += "'"
        found[key] = row
    return found


def _state(column: str, ours: dict, theirs: dict) -> str:
    one, two = ours.get(column, np.nan), theirs.get(column, np.nan)
    if one == two or (pd.isna(one) and pd.isna(two)):
        return EQUAL
    if abs(one - two) <= _ROUNDING * max(abs(one), abs(two)):
        return ROUNDED
    bounds = [side.get(bound, np.nan) for side in (theirs, ours) for bound in ("low", "high")]
    if any(pd.isna(bound) for bound in bounds) or pd.isna(one) or pd.isna(two):
        return OUTSIDE
    if column in ("low", "high"):
        return INSIDE if bounds[0] <= bounds[3] and bounds[2] <= bounds[1] else OUTSIDE
    within = bounds[0] <= _estimate(ours) <= bounds[1]
    return INSIDE if within else OUTSIDE


def _estimate(row: dict) -> float:
    """Return the number that a row's interval is about."""
    return next((row[name] for name in ("mean", "times", "difference", "spearman", "jaccard") if name in row), np.nan)
