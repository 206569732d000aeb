"""The study in one paragraph: what is better, what is excluded, what it cost, what to take."""

from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.files import write_json
from hfprune_nb.report.paired import HEADLINE, SIZES, margins_in_words
from hfprune_nb.report.results import LOWER_IS_BETTER, NO_ACCURACY, percent
from hfprune_nb.report.style import Legend
from hfprune_nb.report.table import ONE_SEED, Table, digits_of

NAMED = 3  # more criteria or differences than these are counted, not named


def headline(paired: Table) -> pd.DataFrame:
    """Return the rows of `paired_table` that a verdict rests on: a model's first average, log-perplexity and JS."""
    rows = paired.long[paired.long["measure"].isin(HEADLINE) & paired.long["low"].notna()]
    firsts = rows.drop_duplicates(["model", "measure"])[["model", "column"]]
    return rows.merge(firsts, on=["model", "column"])


def verdict(criterion: Table, paired: Table, cost: str = "") -> dict:
    """Return the verdict on a study from `criterion_table` and `paired_table`: `sentences`, at most five, and `comparisons`.

    The sentences say what is better after Holm's correction and by how much; what two one-sided tests exclude, or how large a
    difference remains possible; which task carries an average; `cost`, as it is given; what to take. Comparisons are the rows
    that they rest on (`headline`). Nothing is called better, and nothing excluded, that the paired table does not.
    """
    rows, legend = headline(paired), criterion.legend
    model = rows["model"].iloc[0] if rows["model"].nunique() == 1 else ""
    sentences = [_better(rows, legend, model), _excluded(rows, legend, model), *carried_by_one_task(criterion, rows)[:1], cost]
    sentences.append(_advice(rows, criterion))
    shown = ["model", "ratio", "column", "measure", "a", "b", "mean", "low", "high", "p_holm", "bound", "margin", "p_equivalent"]
    comparisons = rows[[*shown, "verdict"]].round(6).astype(object).where(rows[[*shown, "verdict"]].notna(), None)
    return {"sentences": [text for text in sentences if text], "comparisons": comparisons.to_dict("records")}


def write(found: dict, folder: Path) -> list[Path]:
    """Write `verdict.md`, the paragraph alone, and `verdict.json` into `folder`; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "verdict.md", folder / "verdict.json"]
    written[0].write_text(" ".join(found["sentences"]) + "\n", encoding="utf-8")
    write_json(written[1], found)
    return written


def decided(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `paired_table` that have a verdict after Holm's correction, with their `winner` and `loser`."""
    rows = rows[rows["verdict"].astype(str).str.endswith(" better")]
    a_wins = (rows["mean"] > 0) != rows["measure"].isin(LOWER_IS_BETTER)
    return rows.assign(winner=rows["a"].where(a_wins, rows["b"]), loser=rows["b"].where(a_wins, rows["a"]))


def carried_by_one_task(criterion: Table, average: pd.DataFrame) -> list[str]:
    """Return a sentence for each difference between averages that has a verdict and of which one task makes more than half.

    `criterion` is `criterion_table`, `average` rows of `paired_table`. One task in which all of a model's answers tip over
    together can carry an average of nine.
    """
    sentences, tasks = [], criterion.long[criterion.long["measure"] == "task"]
    for row in decided(average[average["measure"] == "average"]).to_dict("records"):
        a, b = criterion.legend.label(row["a"]), criterion.legend.label(row["b"])
        here = tasks[(tasks["model"] == row["model"]) & (tasks["ratio"] == row["ratio"])]
        if row["column"] != "average":
            here = here[~here["label"].str.contains(NO_ACCURACY)]
        scores = here.pivot(index="column", columns="criterion", values="mean")
        shares = (scores[row["a"]] - scores[row["b"]]) / len(scores)
        task = (shares * np.sign(row["mean"])).idxmax()
        if shares[task] / row["mean"] > 0.5:
            sentences.append(
                f"Of the {row['mean']:+.1f} points between the averages of {a} and {b} on {row['model']} at "
                f"{percent(row['ratio'])}, {task} alone makes {shares[task]:+.1f}."
            )
    return sentences


def _better(rows: pd.DataFrame, legend: Legend, model: str) -> str:
    found = decided(rows)
    if rows.empty:
        return "No two criteria were evaluated at the same ratio on the same items and seeds, so nothing is compared."
    if (rows["verdict"] == ONE_SEED).all():
        return "One calibration seed cannot tell a criterion from a lucky text, so no criterion is called better."
    tested = f"{rows['p'].count()} comparisons of average, log-perplexity and JS distance"
    here = f" on {model}" if model else ""
    if found.empty:
        return f"None of {tested}{here} is decided after Holm's correction, so no criterion is called better."
    surest = found.sort_values(["p_holm", "p"], kind="stable").head(NAMED)
    told = [
        f"{legend.label(row['winner'])} is better than {legend.label(row['loser'])} by {_size(row)} {_place(row, model)}"
        for row in surest.to_dict("records")
    ]
    which = f", the {NAMED} surest" if len(found) > NAMED else ""
    return f"Of {tested}{here}, {len(found)} are decided after Holm's correction{which}: {'; '.join(told)}."


def _size(row: dict) -> str:
    sign, digits = np.sign(row["mean"]), digits_of(row["measure"])
    low, high = sorted((sign * row["low"], sign * row["high"]))
    unit = SIZES[row["measure"]]
    return f"{abs(row['mean']):.{digits}f} {unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _place(row: dict, model: str) -> str:
    """Return where a difference was measured; the model only where `model`, the study's one, is not known."""
    corpus = row["column"].partition(":")[2]
    what = " ".join(f"on {name}" for name in (corpus, row["model"] * (not model)) if name)
    return f"{what} at {percent(row['ratio'])}".strip()


def _excluded(rows: pd.DataFrame, legend: Legend, model: str) -> str:
    known = rows[rows["bound"].notna()]
    if known.empty:
        return ""
    equal = known[known["p_equivalent"] < 0.05]
    margins = margins_in_words(known.drop_duplicates("measure").set_index("measure")["margin"].to_dict())
    if len(equal):
        told = [
            f"{legend.label(row['a'])} and {legend.label(row['b'])} by {row['margin']:g} {SIZES[row['measure']]} "
            + _place(row, model)
            for row in equal.sort_values("p_equivalent", kind="stable").head(NAMED).to_dict("records")
        ]
        more = f", and {len(equal) - NAMED} more" if len(equal) > NAMED else ""
        return f"Excluded is a difference (margins {margins}) of {'; of '.join(told)}{more}."
    ratio = _middle(known)
    worst = known[known["ratio"] == ratio].groupby("measure", sort=False)["bound"].max()
    told = [f"{worst[measure]:.{digits_of(measure)}f} {SIZES[measure]}" for measure in worst.index]
    return (
        f"No difference as small as the margins ({margins}) is excluded: between two criteria at {percent(ratio)} a true one of "
        f"up to {', '.join(told)} remains possible."
    )


def _middle(rows: pd.DataFrame) -> float:
    ratios = sorted(rows["ratio"].unique())
    return ratios[(len(ratios) - 1) // 2]


def _advice(rows: pd.DataFrame, criterion: Table) -> str:
    told = [_advice_on(model, part, criterion) for model, part in rows[rows["p"].notna()].groupby("model", sort=False)]
    return " ".join(told[:1]) if len(told) < 2 else "; ".join(text.rstrip(".") for text in told) + "."


def _advice_on(model: str, rows: pd.DataFrame, criterion: Table) -> str:
    legend, ratio = criterion.legend, _middle(rows)
    found = decided(rows[rows["ratio"] == ratio])
    compared = legend.in_order({*rows.loc[rows["ratio"] == ratio, "a"], *rows.loc[rows["ratio"] == ratio, "b"]})
    left = [name for name in compared if name not in set(found["loser"])]
    where = f"for {model} at {percent(ratio)}"
    if not left:
        return f"Choose by the measure that you need {where}: each criterion is worse than another one on some measure."
    if len(left) == 1:
        return f"Take {legend.label(left[0])} {where}: every other criterion is worse on some measure and it is on none."
    cheapest = [name for name in left if legend.forwards(name) == min(map(legend.forwards, left))]
    worse = [legend.label(name) for name in compared if name not in left]
    besides = f"; leave {_listed(worse)}" if worse else ""
    told = f"Take {_listed(list(map(legend.label, cheapest)), 'or')} {where}"
    if len(cheapest) == len(left):
        return f"{told}: this study cannot tell them apart, and they cost the same to score{besides}."
    names = _listed([legend.label(name) for name in left])
    return f"{told}, the cheapest to score of {names}, which this study cannot tell apart{besides}."


def _listed(names: list[str], word: str = "and") -> str:
    if len(names) > NAMED + 2:
        return f"{', '.join(names[: NAMED + 1])} {word} {len(names) - NAMED - 1} more"
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
