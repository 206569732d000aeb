"""Which study would decide? The cheapest seeds and items that find a stated difference, from measured variances and costs.

A design of S seeds and n items has the standard errors that the variance components say (`components`), with S - 1 and n - 1
degrees of freedom; its detectable difference is that of the kit's own test at 80 % power (`intervals.Errors.detectable`).
Variances are means over the pairs of criteria at one ratio, of each task on its own, 0 where the moments are negative.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.report import intervals
from hfprune_nb.report.components import squares
from hfprune_nb.report.paired import SIZES
from hfprune_nb.report.results import MARGINS, Column, Results, columns, percent, sample
from hfprune_nb.report.style import GREYS, STYLE, WIDTH, Legend, closed, message, neutral
from hfprune_nb.report.table import ABSENT, Table, digits_of, measure_label

DETECT = {measure: MARGINS[measure] for measure in ("average", "perplexity", "js")}
MOST_SEEDS = 2000
MOST_WINDOWS = 20_000
FEWEST_TASKS = 3
PRUDENCE = 0.8
FIELDS = ("model", "ratio", "column", "measure", "detect", "design", "tasks", "seeds", "items", "detectable", "hours")


@dataclass(frozen=True)
class Variances:
    """The variances of a difference: of one seed; of one item, and of one seed on one item, of each group (groups,)."""

    seed: float
    item: np.ndarray
    rest: np.ndarray

    def errors(self, seeds: int, items) -> intervals.Errors:
        """Return the standard errors of a design with so many seeds and items, a number or one for each group."""
        items = np.broadcast_to(np.asarray(items, dtype=float), self.item.shape)
        alone = (self.item + self.rest / seeds) / items
        df = alone.sum() ** 2 / (alone**2 / (items - 1)).sum() if alone.sum() > 0 else (items - 1).sum()
        by_seed = np.sqrt(self.seed / seeds + (self.rest / items).sum() / seeds)
        return intervals.Errors(by_seed, np.sqrt((self.item / items).sum()), np.float64(seeds - 1), df, np.sqrt(alone.sum()))


@dataclass(frozen=True)
class Costs:
    """The hours that a study takes of one job after another.

    fixed : for the dense model. seed : for each seed, to calibrate, score, prune and start. window, item : of one model for a
    held-out window and for an item of each task. models : how many a seed makes. workers : how many jobs run at a time.
    """

    fixed: float
    seed: float
    window: float
    item: dict[str, float]
    models: int
    workers: int = 1

    def hours(self, seeds: int, windows: float = 0, items: dict[str, float] | None = None) -> float:
        """Return the hours of a study with so many seeds, held-out windows of one corpus and items of each task."""
        each = windows * self.window + sum(self.item[task] * n for task, n in (items or {}).items())
        return (self.fixed + seeds * self.seed + (seeds * self.models + 1) * each) / self.workers


@dataclass(frozen=True)
class Question:
    """One measure at one ratio: what its differences vary by, which tasks it has, how many items there are, what it costs.

    most_seed : the upper limit of the variance of a seed, one-sided at `PRUDENCE`, from the chi-square of all pairs together.
    """

    variances: Variances
    most_seed: float
    costs: Costs
    tasks: tuple[str, ...]
    available: np.ndarray
    family: int

    def prudent(self) -> "Question":
        """Return the same question if seeds vary as much as this study leaves possible."""
        return replace(self, variances=replace(self.variances, seed=self.most_seed))

    def taken(self, n: float) -> np.ndarray:
        """Return how many items of each group a limit of `n` takes."""
        return np.minimum(n, self.available)

    def detectable(self, seeds: int, n: float) -> float:
        """Return the difference that a design finds with 80 % chance, at Holm's strictest level."""
        return self.variances.errors(seeds, self.taken(n)).detectable(self.family)

    def hours(self, seeds: int, n: float) -> float:
        """Return what a design costs."""
        if self.tasks:
            return self.costs.hours(seeds, items=dict(zip(self.tasks, self.taken(n), strict=True)))
        return self.costs.hours(seeds, n)

    def cheapest(self, detect: float) -> tuple[int, int] | None:
        """Return the seeds and items that find `detect` for the fewest hours, or None where all items and seeds do not."""
        best, most = None, int(self.available.max())
        for seeds in _steps(2, MOST_SEEDS):
            sizes = range(2, most + 1)
            if best:
                sizes = sizes[: bisect.bisect_left(sizes, self.hours(*best), key=functools.partial(self.hours, seeds))]
            if not sizes:
                break
            if self.detectable(seeds, sizes[-1]) <= detect:
                # A larger one finds less.
                best = (seeds, sizes[bisect.bisect_left(sizes, -detect, key=functools.partial(self._fineness, seeds))])
        return best

    def _fineness(self, seeds: int, n: int) -> float:
        return -self.detectable(seeds, n)

    def seeds_for(self, detect: float) -> int | None:
        """Return how many seeds find `detect` with all items that there are, or None where that takes too many."""
        return next((seeds for seeds in _steps(2, MOST_SEEDS) if self.detectable(seeds, np.inf) <= detect), None)


def _steps(first: int, last: int) -> Iterator[int]:
    """Yield whole numbers that grow by a twelfth, each one at first."""
    value = first
    while value <= last:
        yield value
        value = max(value + 1, round(value * 13 / 12))


def question(
    results: Results, model: str, ratio: float, column: Column, costs: Costs, family: int = 0, most: int = MOST_WINDOWS
) -> Question | None:
    """Return the question of a column (`results.columns`) at a ratio, None where fewer than two seeds or criteria tell nothing.

    family : comparisons that Holm's correction counts, 0: the pairs of criteria. most : how many held-out windows there are.
    """
    at = (results.models["model"] == model) & np.isclose(results.models["ratio"], ratio)
    names = results.legend.compared(results.models.loc[at, "criterion"])
    frames = {name: sample(results, column, model, name, ratio) for name in names}
    between, noise, items, rests = [], [], [], []
    for b, a in results.legend.pairs(names):
        if any(frames[side].empty or not np.isfinite(frames[side]["value"]).all() for side in (a, b)):
            continue
        if len(set(frames[a]["seed"]) & set(frames[b]["seed"])) < 2:
            continue
        paired = intervals.paired_sample(frames[a], frames[b])
        per_seed, of_items, of_rest, sizes = squares(paired.values, paired.weights, paired.groups)
        if (sizes < 2).any():
            continue
        rest = of_rest / (sizes - 1) / (paired.n_seeds - 1) / len(sizes) ** 2
        between.append(per_seed.var(ddof=1))
        noise.append((rest / sizes).sum())
        free = (paired.n_seeds - 1) * (len(names) - 1)
        items.append(of_items / (sizes - 1) / len(sizes) ** 2 - rest / paired.n_seeds)
        rests.append(rest)
    if not between:
        return None
    spread, rest = np.mean(between), np.mean(noise)
    most_seed = max(spread_limit(spread, free) - rest, 0.0)
    found = Variances(max(spread - rest, 0.0), np.maximum(np.mean(items, axis=0), 0), np.mean(rests, axis=0))
    # Groups are those of the frame in the order of their names.
    tasks = tuple(sorted(column.tasks))
    facts = results.tasks[results.tasks["model"] == model].set_index("task")
    known = [facts.loc[task, ["available", "items", "evaluated"]].dropna().iloc[0] for task in tasks]
    return Question(found, most_seed, costs, tasks, np.array(known or [most], dtype=float), family or len(between))


def spread_limit(spread: float, free: int) -> float:
    """Return the upper limit, one-sided at `PRUDENCE`, of a variance that was measured with `free` degrees of freedom."""
    return spread * free / stats.chi2.ppf(1 - PRUDENCE, free)


def fewer_tasks(results: Results, model: str, ratio: float, column: Column, costs: Costs, detect: float, **options):
    """Return the question, and its design, of the tasks whose average finds `detect` for the fewest hours; None where none does.

    Tasks are left out one by one, down to `FEWEST_TASKS`, the one first whose items tell least for their cost.
    """
    whole, best = question(results, model, ratio, column, costs, **options), None
    if whole is None:
        return None
    noise = np.sqrt((whole.variances.item + whole.variances.rest) * [costs.item[task] for task in whole.tasks])
    order = [whole.tasks[index] for index in np.argsort(noise)]
    for count in range(min(FEWEST_TASKS, len(order)), len(order) + 1):
        part = Column(column.name, "average", column.label, tuple(sorted(order[:count])))
        asked = question(results, model, ratio, part, costs, **options)
        design = asked.cheapest(detect) if asked else None
        if design and (best is None or asked.hours(*design) < best[0].hours(*best[1])):
            best = (asked, design)
    return best


def power_table(
    results: Results | None,
    costs: dict[str, Costs],
    detect: dict[str, float] = DETECT,
    ratio: float = 0.0,
    family: int = 0,
    most: int = MOST_WINDOWS,
) -> Table:
    """Return for each measure the study as it is and the cheapest design that finds `detect` (measure -> difference).

    costs : model -> `Costs`; of other models nothing is said. ratio : 0 takes each model's middle one. family, most : as in
    `question`. `long` has the columns FIELDS; `design` is today, cheapest, prudent, fewer tasks (an average's) or whole test
    sets. Raises UserError for a ratio without a pruned model.
    """
    rows = []
    for model in [name for name in results.model_names if name in costs] if results else ():
        at = ratio or results.middle_ratio(model)
        if not np.isclose(results.models.loc[results.models["model"] == model, "ratio"], at).any():
            raise UserError(f"ratio {at:g}: no model was pruned by it in this study, choose one of its ratios")
        for column in firsts(results, model, detect):
            options = {"family": family, "most": most}
            asked = question(results, model, at, column, costs[model], **options)
            if asked is None:
                continue
            place = {"model": model, "ratio": at, "column": column.name, "measure": column.measure}
            rows += [place | row for row in _designs(asked, detect[column.measure], _today(results, model, at, column))]
            if column.tasks and (found := fewer_tasks(results, model, at, column, costs[model], detect["average"], **options)):
                fewer, design = found
                rows += [place | _design("fewer tasks", fewer, design, detect["average"])] * (fewer.tasks != asked.tasks)
    long = pd.DataFrame(rows, columns=list(FIELDS))
    notes = (
        "Designs that find the difference with 80 % chance by the kit's own test, at Holm's strictest level over the pairs of "
        "criteria at one ratio; hours by measured rates for the criteria that are compared, at one ratio and for this measure "
        "alone. Items are windows of one corpus, or the limit on items of each task; there may be fewer. The variances are those "
        "that this study measured, means over pairs.",
        f"Prudent: the cheapest design if seeds vary by the upper limit ({percent(PRUDENCE)}, one-sided) of what this study "
        "leaves possible. Few seeds measure that badly: look again when some new ones are done.",
        "Fewer tasks: another average, in which criteria may differ by more or by less, of tasks whose variances came out small, "
        "some by chance. Whole test sets: with all items of each task.",
    )
    legend = results.legend if results else Legend()
    title = "Which study would decide (from measured variances and costs)"
    return Table("power", title, long, _display(long), notes, legend)


def firsts(results: Results, model: str, measures) -> list[Column]:
    """Return the first column of each of the measures."""
    return [
        next(part)
        for measure, part in itertools.groupby(columns(results, model), lambda column: column.measure)
        if measure in measures
    ]


def _today(results: Results, model: str, ratio: float, column: Column) -> tuple[int, int]:
    at = (results.models["model"] == model) & np.isclose(results.models["ratio"], ratio)
    name = results.legend.compared(results.models.loc[at, "criterion"])[0]
    frame = sample(results, column, model, name, ratio)
    return frame["seed"].nunique(), frame.groupby("group")["item"].nunique().max() if column.tasks else frame["item"].nunique()


def _designs(asked: Question, detect: float, today: tuple[int, int]) -> list[dict]:
    wary = asked.prudent()
    rows = [_design("today", asked, today, detect), _design("cheapest", asked, asked.cheapest(detect), detect)]
    rows.append(_design("prudent", wary, wary.cheapest(detect), detect))
    if asked.tasks:
        seeds = asked.seeds_for(detect)
        rows.append(_design("whole test sets", asked, (seeds, int(asked.available.max())) if seeds else None, detect))
    return rows


def _design(name: str, asked: Question, design: tuple[int, int] | None, detect: float) -> dict:
    row = {"detect": detect, "design": name, "tasks": " ".join(asked.tasks)}
    if design is None:
        return row
    seeds, n = design
    return row | {"seeds": seeds, "items": n, "detectable": asked.detectable(seeds, n), "hours": asked.hours(seeds, n)}


def _display(long: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "Model": row["model"],
            "Measure": measure_label(row["column"], row["measure"]),
            "Ratio": percent(row["ratio"]),
            "To detect": f"{row['detect']:g}",
            "Design": row["design"] + (f": {row['tasks']}" if row["design"] == "fewer tasks" else ""),
            "Seeds": ABSENT if pd.isna(row["seeds"]) else f"{row['seeds']:.0f}",
            "Items": ABSENT if pd.isna(row["items"]) else f"{row['items']:.0f}",
            "Detects": ABSENT if pd.isna(row["detectable"]) else f"{row['detectable']:.{digits_of(row['measure']) + 1}f}",
            "Hours": "not with what there is" if pd.isna(row["hours"]) else f"{row['hours']:.3g}",
        }
        for row in long.to_dict("records")
    ]
    names = ["Model", "Measure", "Ratio", "To detect", "Design", "Seeds", "Items", "Detects", "Hours"]
    return pd.DataFrame(rows, columns=names).drop(columns=[] if long["model"].nunique() > 1 else ["Model"])


def paper_sentence(table: Table, model: str) -> str:
    """Return what a gap between averages such as the paper's 0.5 points would have taken it, from `power_table`."""
    long = table.long
    rows = long[(long["model"] == model) & (long["measure"] == "average") & (long["design"] == "whole test sets")]
    if rows.empty:
        return f"{model}: fewer than two seeds or no tasks, so what the paper's gap would have needed is not known."
    row = rows.iloc[0]
    needed = "more seeds than anyone has" if pd.isna(row["seeds"]) else f"{row['seeds']:.0f} calibration seeds"
    return (
        f"If the paper's models vary from seed to seed as {model} does at {percent(row['ratio'])}, a difference of "
        f"{row['detect']:g} points between averages needs {needed} with all items of these {len(row['tasks'].split())} tasks; "
        "with its one seed no number of items can tell it from a lucky text."
    )


def power_sentence(table: Table, model: str) -> str:
    """Return what the study finds today and what the cheapest design that finds more costs."""
    rows = table.long[table.long["model"] == model]
    if rows.empty:
        return f"{model}: no design can be given without two seeds, two criteria and what their models were made from."
    parts = []
    for _, part in rows.groupby("column", sort=False):
        today, best = (part[part["design"] == name].iloc[0] for name in ("today", "cheapest"))
        digits, unit = digits_of(today["measure"]), SIZES[today["measure"]]
        takes = (
            "is out of reach with the items that there are"
            if pd.isna(best["hours"])
            else f"takes {best['seeds']:.0f} seeds, {best['items']:.0f} items and {best['hours']:.3g} hours"
        )
        wary = part.loc[part["design"] == "prudent", "hours"].iloc[0]
        takes += f", {wary:.3g} to be prudent" if wary > best["hours"] else ""
        parts.append(f"{today['detectable']:.{digits}f} {unit} can be found today, {best['detect']:g} {takes}")
    return f"{model} at {percent(rows['ratio'].iloc[0])}: {'; '.join(parts)}."


def frontier(asked: Question, reach: float) -> pd.DataFrame:
    """Return the designs than which no cheaper one finds as much: seeds, items, hours, detectable, down to `reach`."""
    most, last = int(asked.available.max()), asked.cheapest(reach)
    top = asked.hours(*last) if last else asked.hours(MOST_SEEDS, most)
    sizes, seeds = sorted({int(n) for n in np.geomspace(4, most, 14)}), list(_steps(2, MOST_SEEDS))
    designs = [(s, n, asked.hours(s, n)) for s in seeds[:10] + seeds[10::3] for n in sizes]
    rows = [(*design, asked.detectable(*design[:2])) for design in designs if design[2] <= top]
    frame = pd.DataFrame(rows, columns=["seeds", "items", "hours", "detectable"]).sort_values(["hours", "detectable"])
    return frame[frame["detectable"] < frame["detectable"].cummin().shift(fill_value=np.inf)]


def power_figure(results: Results, costs: dict[str, Costs], table: Table, model: str) -> Figure:
    """Draw the detectable difference against hours, a panel per measure: the best designs, today's study and the cheapest one.

    `table` is `power_table` of the same results and costs.
    """
    rows = table.long[table.long["model"] == model]
    if rows.empty:
        return message("Fewer than two calibration seeds or two criteria, or not all that the models were made from: no design.")
    wanted = [column for column in firsts(results, model, set(rows["measure"])) if column.name in set(rows["column"])]
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(wanted), figsize=(WIDTH, 3.4), squeeze=False)
        for ax, column in zip(axes.flat, wanted, strict=True):
            part = rows[rows["column"] == column.name].set_index("design")
            asked = question(results, model, part["ratio"].iloc[0], column, costs[model])
            best = frontier(asked, 0.7 * part["detect"].iloc[0])
            best = best[best["detectable"] < 3 * part.loc["today", "detectable"]]
            ax.plot(best["hours"], best["detectable"], color=GREYS[1], label="best designs")
            for index, name in enumerate(("today", "cheapest")):
                look = neutral(index) | {"linestyle": "none"}
                ax.plot(part.loc[name, "hours"], part.loc[name, "detectable"], **look, label=_point(name), markersize=8)
            ax.axhline(part["detect"].iloc[0], color="black", linewidth=0.8, linestyle=":")
            ax.set(
                xscale="log",
                yscale="log",
                xlabel="hours",
                ylabel="" if ax is not axes[0, 0] else "detectable difference (80 % chance)",
            )
            ax.set_title(measure_label(column.name, column.measure).replace(", ", "\n"), fontsize=9)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(mpl.ticker.NullFormatter())
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        fig.suptitle(f"{model} at {percent(rows['ratio'].iloc[0])}: what more hours would find", fontsize=10)
    return closed(fig, power_sentence(table, model))


def _point(name: str) -> str:
    return {"today": "this study", "cheapest": "cheapest design for the dotted difference"}[name]
