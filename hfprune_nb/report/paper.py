"""What the paper's printed numbers support by themselves: sampling error, recomputed averages, contradictions.

Everything here is computed from `data/paper_tables.csv` and the sizes of the public test sets; nothing is measured.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.report import intervals
from hfprune_nb.report.results import Results, percent
from hfprune_nb.report.table import Table

# Items that lm-eval scores: the test split, or validation where the test split has no public answers.
ITEMS = {
    "ARCc": 1172,
    "ARCe": 2376,
    "BoolQ": 3270,
    "Crows": 1677,
    "OBQA": 500,
    "PIQA": 1838,
    "Race": 1045,
    "SiQA": 1954,
    "TfQA": 817,
    "Wino": 1267,
}
NINE = [task for task in ITEMS if task != "TfQA"]  # of Table 8
ROW = ["table", "model", "ratio_pct", "method", "finetuned"]

# Cells and average are printed with one decimal: their rounding explains this much of a difference, in points.
ROUNDING = 0.1
GAPS = (
    ("T1", "LLaMA-2-7B", 20, "HFPrune", "SDMPrune"),
    ("T1", "LLaMA-2-7B", 30, "HFPrune", "SDMPrune"),
    ("T1", "LLaMA-2-7B", 20, "HFPrune", "dense"),
    ("T2", "LLaMA3.2-3.2B", 20, "HFPrune", "SDMPrune"),
    ("T2", "LLaMA3.2-1.2B", 20, "HFPrune", "SDMPrune"),
    ("T6", "LLaMA-2-7B", 20, "IE", "CE"),
    ("T6", "LLaMA-2-7B", 20, "IE", "SD"),
    ("T6", "LLaMA-2-7B", 30, "IE", "CE"),
    ("T6", "LLaMA-2-7B", 30, "IE", "SD"),
)


def read(path: Path | None = None) -> pd.DataFrame:
    """Return the published values (table, model, ratio_pct, method, finetuned, metric, value, unit, sources, note)."""
    path = path or paths.data() / "paper_tables.csv"
    if not path.exists():
        raise UserError(f"{path} is missing: restore data/paper_tables.csv from the repository")
    return pd.read_csv(path)


def standard_error(accuracy: float, items: int) -> float:
    """Return the binomial standard error of an accuracy in per cent, in points: `100 sqrt(p (1 - p) / n)`.

    It is an upper bound for scores between 0 and 1 with the same mean, such as those of TruthfulQA's mc2.
    """
    share = accuracy / 100
    return float(100 * np.sqrt(share * (1 - share) / items))


def average_error(accuracies: dict[str, float]) -> float:
    """Return the standard error of the unweighted mean of task accuracies, in points, the tasks being independent."""
    errors = [standard_error(value, ITEMS[task]) for task, value in accuracies.items()]
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def rows(paper: pd.DataFrame) -> pd.DataFrame:
    """Return one line per published row of Tables 1 and 3 that has all ten tasks.

    average : as printed; recomputed : from the row's cells; difference : printed minus recomputed; standard_error : of the
    average, from the item counts; without_crows : mean of the nine accuracies, CrowS-Pairs being a share of stereotyped
    choices; same_cells_as : other rows with exactly these ten cells; remark. All in per cent or points.
    """
    cells = paper[paper["table"].isin(["T1", "T3"])].pivot_table(index=ROW, columns="metric", values="value", sort=False)
    complete = cells.dropna(subset=list(ITEMS))
    tasks = complete[list(ITEMS)]
    found = pd.DataFrame(
        {
            "average": complete["avg10"],
            "recomputed": tasks.mean(axis=1),
            "difference": complete["avg10"] - tasks.mean(axis=1),
            "standard_error": [average_error(dict(row)) for _, row in tasks.iterrows()],
            "without_crows": tasks.drop(columns="Crows").mean(axis=1),
        }
    ).reset_index()
    found["same_cells_as"] = [_copies(tasks, index) for index in range(len(tasks))]
    found["remark"] = [
        _row_remark(row, cells) for row, (_, cells) in zip(found.to_dict("records"), tasks.iterrows(), strict=True)
    ]
    return found


def _copies(tasks: pd.DataFrame, index: int) -> str:
    equal = (tasks == tasks.iloc[index]).all(axis=1)
    equal.iloc[index] = False
    return "; ".join(f"{model} at {ratio:g} %" for _, model, ratio, *_ in tasks.index[equal])


def _row_remark(row: dict, cells: pd.Series) -> str:
    remarks = [f"all ten cells equal those of {row['same_cells_as']}"] if row["same_cells_as"] else []
    if abs(row["difference"]) > ROUNDING:
        remarks.append(f"the cells average {row['recomputed']:.1f}, not {row['average']:.1f}")
        # A task that repeats its neighbour in the table and whose correction would restore the average is the likely slip.
        for left, right in itertools.pairwise(ITEMS):
            if cells[left] == cells[right]:
                implied = cells[left] + len(ITEMS) * row["difference"]
                remarks.append(f"{left} repeats {right} ({cells[left]:.1f}); the average implies {implied:.1f}")
    return "; ".join(remarks)


def gaps(paper: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of averages on which the paper rests, and what sampling error says about each.

    gap : printed, in points. unpaired_half_width : of the 95 % interval if the two models had answered different items; where
    the paper prints no cells, with every task at 50 %, which is an upper bound. exceeds : whether the gap is larger.
    most_discordant : the largest share of items that the two models may answer differently (one right, one wrong), in per
    cent, for a paired test on the same items to find a gap of this size at 5 %, from
    `var(average) = sum over tasks of share / n / 100`. Calibration and tuning seeds would come on top of either.
    """
    z = stats.norm.ppf((1 + intervals.LEVEL) / 2)
    found = []
    for table, model, ratio, a, b in GAPS:
        place = (paper["table"] == table) & (paper["model"] == model)
        left, right = (_row_values(paper[place], method, 0 if method == "dense" else ratio) for method in (a, b))
        errors = [average_error({task: side.get(task, 50.0) for task in ITEMS}) for side in (left, right)]
        half = z * math.hypot(*errors)
        gap = left["avg10"] - right["avg10"]
        share = (gap * len(ITEMS) / (100 * z)) ** 2 / sum(1 / n for n in ITEMS.values())
        facts = {"table": table, "model": model, "ratio": ratio, "a": a, "b": b, "gap": gap, "unpaired_half_width": half}
        known = {"exceeds": abs(gap) > half, "cells": set(ITEMS) <= set(left) and set(ITEMS) <= set(right)}
        found.append(facts | known | {"most_discordant": 100 * min(1.0, share)})
    return pd.DataFrame(found)


def _row_values(paper: pd.DataFrame, method: str, ratio: float) -> dict[str, float]:
    row = paper[(paper["method"] == method) & (paper["ratio_pct"] == ratio)]
    return dict(zip(row["metric"], row["value"], strict=True))


def contradictions(paper: pd.DataFrame) -> pd.DataFrame:
    """Return where printed numbers disagree with each other: place, printed, computed from the paper's own values, cells.

    `cells` are the index labels of the values of `paper` that are concerned.
    """
    found = [*_row_slips(paper), *_cost(paper), *_order(paper), *_nine_tasks(paper)]
    return pd.DataFrame(found, columns=["place", "printed", "computed", "cells"])


def inconsistent(paper: pd.DataFrame) -> pd.Series:
    """Return for every published value why the paper contradicts it, "" where it does not, with the index of `paper`."""
    reasons: dict[str, list] = {label: [] for label in paper.index}
    for row in contradictions(paper).to_dict("records"):
        for label in row["cells"]:
            reasons[label].append(row["computed"])
    return pd.Series({label: "; ".join(dict.fromkeys(texts)) for label, texts in reasons.items()}, dtype=object)


def _row_slips(paper: pd.DataFrame) -> list[tuple]:
    found = []
    for row in rows(paper).to_dict("records"):
        if row["remark"]:
            cells = paper[(paper[ROW] == pd.Series({name: row[name] for name in ROW})).all(axis=1)]
            if not row["same_cells_as"]:
                cells = cells[[metric == "avg10" or f"{metric} repeats" in row["remark"] for metric in cells["metric"]]]
            place = f"Table {row['table'].removeprefix('T')}, {row['model']} at {row['ratio_pct']:g} %, {row['method']}"
            found.append((place, f"average {row['average']:.1f}", row["remark"], list(cells.index)))
    return found


def _cells(paper: pd.DataFrame, table: str, metric: str, ratio: float, method: str = "") -> pd.DataFrame:
    found = paper[(paper["table"] == table) & paper["metric"].str.startswith(metric) & (paper["ratio_pct"] == ratio)]
    return found[found["method"] == method] if method else found


def _cost(paper: pd.DataFrame) -> list[tuple]:
    """Return speed-ups of Table 4 that are not the quotients of its own latencies and rates."""
    found = []
    latency = {ratio: _cells(paper, "T4", "prefill latency", ratio)["value"].iloc[0] for ratio in (0, 20, 30)}
    for ratio in (20, 30):
        speed_up = latency[0] / latency[ratio]
        for index, row in _cells(paper, "T4", "prefill speed-up", ratio).iterrows():
            if abs(row["value"] - speed_up) > 0.006:
                place = "Section 5.2.2" if "text" in row["metric"] else "Table 4"
                exact = f"{latency[0]:g} ms / {latency[ratio]:g} ms = {speed_up:.3f}x"
                found.append((f"{place}, prefill speed-up at {ratio} %", f"{row['value']:g}x", exact, [index]))
    dense, pruned = (_cells(paper, "T4", "decode throughput", ratio)["value"].iloc[0] for ratio in (0, 20))
    printed, gain = _cells(paper, "T4", "decode gain", 20), 100 * (pruned / dense - 1)
    if abs(printed["value"].iloc[0] - gain) > 0.06:
        text = f"{pruned:g} / {dense:g} tokens/s is +{gain:.1f} %"
        found.append(("Table 4, decode gain at 20 %", f"+{printed['value'].iloc[0]:g} %", text, list(printed.index)))
    return found


def _order(paper: pd.DataFrame) -> list[tuple]:
    """Return what moves the wrong way with the ratio: similarity in Table 7, averages in Table 3."""
    found = []
    for method in ("CE", "IE"):
        metrics = ("JS distance", "Top-15 Jaccard")
        js, jaccard = (pd.concat([_cells(paper, "T7", metric, ratio, method) for ratio in (20, 30)]) for metric in metrics)
        (js_low, js_high), (low, high) = js["value"], jaccard["value"]
        if (js_high > js_low) == (high > low):
            text = f"JS distance rises from {js_low:g} to {js_high:g}, so the overlap of the likeliest tokens should fall"
            printed = f"{low:g} at 20 %, {high:g} at 30 %"
            found.append((f"Table 7, top-15 Jaccard, {method}", printed, text, list(jaccard.index)))
    averages = paper[(paper["table"] == "T3") & (paper["metric"] == "avg10")].sort_values("ratio_pct")
    for (model, method), part in averages.groupby(["model", "method"], sort=False):
        for (index, less), (after, more) in itertools.pairwise(part.iterrows()):
            if more["value"] > less["value"]:
                text = f"the model that lost more scores higher, by {more['value'] - less['value']:.1f} points"
                printed = f"{less['value']:g} at {less['ratio_pct']:g} %, {more['value']:g} at {more['ratio_pct']:g} %"
                found.append((f"Table 3, {model}, {method}", printed, text, [index, after]))
    return found


def _nine_tasks(paper: pd.DataFrame) -> list[tuple]:
    """Return averages of nine tasks that differ from what Table 1 gives for the same model on the same nine."""
    found = []
    for ratio in (20, 30):
        cells = _cells(paper[paper["finetuned"] == "yes"], "T8", "avg9", ratio, "MLP only")
        table_1 = _row_values(paper[paper["table"] == "T1"], "HFPrune", ratio)
        same, printed = float(np.mean([table_1[task] for task in NINE])), cells["value"].iloc[0]
        if abs(printed - same) > ROUNDING:
            text = f"Table 1 gives {same:.1f} for the same model on the same nine tasks (without TruthfulQA)"
            found.append((f"Table 8, MLP only at {ratio} %, tuned", f"average of nine {printed:g}", text, list(cells.index)))
    return found


def discordance(results: Results, a: str, b: str) -> pd.DataFrame:
    """Return how often two criteria's models answer an item differently, in per cent of items, by model and ratio.

    The mean over tasks with answers that are right or wrong, of the same item with the same calibration seed.
    """
    keys = ["model", "ratio", "seed", "task", "doc_id"]
    graded = results.items.groupby("task")["value"].agg(lambda values: not values.isin([0, 1]).all())
    items = results.items[~results.items["task"].isin(graded.index[graded.astype(bool)])]
    left, right = (items[items["criterion"] == criterion][[*keys, "value"]] for criterion in (a, b))
    pairs = left.merge(right, on=keys, suffixes=("", "_b"))
    pairs["share"] = 100.0 * (pairs["value"] != pairs["value_b"])
    by_task = pairs.groupby(["model", "ratio", "task"])["share"].mean()
    return by_task.groupby(["model", "ratio"]).mean().reset_index()


def sentences(paper: pd.DataFrame, results: Results | None = None) -> list[str]:
    """Return what the published values support, generated from `rows`, `gaps`, `contradictions` and `discordance`."""
    printed, compared, wrong = rows(paper), gaps(paper), contradictions(paper)
    errors, inside = printed["standard_error"], (~compared["exceeds"]).sum()
    text = [
        f"Item sampling alone gives a published ten-task average a standard error of {errors.min():.2f} to {errors.max():.2f} "
        f"points; {inside} of the {len(compared)} gaps between averages that the paper rests on are smaller than the 95 % "
        "half-width of an unpaired comparison."
    ]
    # The smallest gap of the criterion ablation is the one that the paper's conclusion needs.
    ablation = compared[compared["table"] == "T6"]
    smallest = ablation.loc[ablation["gap"].abs().idxmin()]
    needed = smallest["most_discordant"]
    text.append(
        f"The gap of {smallest['gap']:.1f} points between {smallest['a']} and {smallest['b']} at {smallest['ratio']} % (Table 6) "
        f"could only be told from zero, paired, if the two models answered fewer than {needed:.1f} % of the items differently; "
        "the paper prints no answers by item and one calibration seed."
    )
    measured = [] if results is None else discordance(results, "entropy", "one_hot_ce").to_dict("records")
    text += [
        f"{row['model']} at {100 * row['ratio']:.4g} %, measured here: the two criteria's models answer {row['share']:.1f} % "
        f"of the items differently, {'more' if row['share'] > needed else 'fewer'} than that."
        for row in measured
    ]
    sound = printed[(printed["table"] == "T1") & printed["ratio_pct"].isin([0, 20]) & (printed["difference"].abs() <= ROUNDING)]
    told = [
        ", ".join(f"{row['method']} {row[column]:.1f}" for row in sound.nlargest(3, column).to_dict("records"))
        for column in ("average", "without_crows")
    ]
    text.append(
        f"Table 1 up to 20 %: the averages are led by {told[0]}; without CrowS-Pairs, which is no accuracy, by {told[1]}."
    )
    copies = (printed["same_cells_as"] != "").sum()
    text.append(
        f"{len(wrong)} printed values or rows contradict others of the paper, among them {copies} rows of Table 3 whose ten "
        "cells stand under another Qwen model as well."
    )
    return text


PAPER_MODEL = "LLaMA-2-7B"
INCONSISTENT = "†"


def published_tables(results: Results | None = None, paper: Path | None = None) -> list[Table]:
    """Return three tables made of the paper's numbers alone: its rows of ten tasks, its gaps, and its contradictions.

    With `results` the gaps are set beside the share of items that our two models answer differently.
    """
    frame = read(paper)
    printed, compared, wrong = rows(frame), gaps(frame), contradictions(frame)
    averages = pd.DataFrame(
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
            "Table": compared["table"].str.removeprefix("T"),
            "Model": compared["model"],
            "Ratio": [percent(ratio / 100) for ratio in compared["ratio"]],
            "A - B": [f"{a} - {b}" for a, b in zip(compared["a"], compared["b"], strict=True)],
            "Gap, paper": compared["gap"].map("{:+.1f}".format),
            "95 % half-width, unpaired": compared["unpaired_half_width"].map("{:.2f}".format)
            + compared["cells"].map({True: "", False: " at most"}),
            "Larger than that": compared["exceeds"].map({True: "yes", False: "no"}),
            "Paired test needs at most": compared["most_discordant"].map("{:.1f} % answered differently".format),
        }
    )
    defects = wrong[["place", "printed", "computed"]].set_axis(["Place", "Printed, paper", "From the paper's own values"], axis=1)
    sizes = ", ".join(f"{task} {count}" for task, count in ITEMS.items())
    origin = "All values are published ones or computed from them; nothing in this table was measured."
    sampling = (
        f"Standard errors are binomial, from the items that lm-eval scores ({sizes}); tasks are independent, and an average "
        "is unweighted. They hold for drawing items; calibration and tuning seeds would add to them."
    )
    paired = (
        "A paired comparison on the same items is sharper than the unpaired half-width. The last column is the largest share of "
        "items that the two models may answer differently (one right, one wrong) for a gap of this size to reach 5 %."
    )
    share = [] if results is None else discordance(results, "entropy", "one_hot_ce").to_dict("records")
    ours = [f"{row['model']} at {percent(row['ratio'])}: {row['share']:.1f} %" for row in share]
    notes = [f"Measured in this study, entropy against one-hot CE: {'; '.join(ours)}."] if ours else []
    return [
        Table("published", "The paper's averages and what its cells give", printed, averages, (origin, sampling)),
        Table(
            "published_gaps",
            "The paper's gaps beside the error of item sampling",
            compared,
            differences,
            (origin, paired, *notes),
        ),
        Table("published_defects", "Where the paper contradicts itself", wrong.drop(columns="cells"), defects, (origin,)),
    ]
