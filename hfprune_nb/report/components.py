"""Where the variance of a difference comes from: items, calibration seeds, and what each seed makes of each item.

A paired difference of seed s and item i is `mean + seed[s] + item[i] + rest[s, i]`, two crossed random effects (Searle, Casella
and McCulloch, Variance Components, 1992). The components are those of the method of moments, from the mean squares of the two-way
layout. An average over tasks is stratified: items belong to their task, seeds to all of them, and `n` is the number of items of
each task. So the variance of a difference measured with S seeds and n items is

    seed / S + item / n + rest / (S n)

in the squared unit of the measure. Intervals are generalized ones (Weerahandi, JASA 88, 1993): mean squares divided by draws of
the chi-squares that they are distributed as, as if effects were normal.
"""

import itertools
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from hfprune_nb.report import intervals
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import Results, choice_columns, columns, percent, sample
from hfprune_nb.report.style import DENSE, STYLE, WIDTH, Legend, closed, message, neutral
from hfprune_nb.report.table import ABSENT, Table, digits_of, measure_label

KINDS = {"seed": "One seed", "item": "One item", "rest": "Seed x item"}
MEASURED = ("task", "average", "perplexity", "js", "kl", "top1")
DRAWN = ("average", "perplexity", "js", "kl")
DRAWS = 4000
TOGETHER = "⇄"


@dataclass(frozen=True)
class Components:
    """The variances of one seed, of one item (of each task) and of one seed and item, by moments, so that they may be negative.

    low, high : 95 % bounds by the name of the component, from 0. together : the variance between seeds over the one that answers
    have which change one by one; `p` is that of its F test. All but `item` are NaN with one seed, and `item` then holds the rest.
    """

    seed: float
    item: float
    rest: float
    low: dict[str, float]
    high: dict[str, float]
    together: float
    p: float


def components(values: np.ndarray, weights: np.ndarray | None = None, groups: list | None = None) -> Components:
    """Return the components of `values` (seeds, items), as `intervals.estimate` takes them.

    They are NaN where a group has a single item.
    """
    n_seeds, n_items = values.shape
    weights = np.ones(n_items) if weights is None else weights
    groups = [np.arange(n_items)] if groups is None else groups
    per_seed, items, rest, sizes = squares(values, weights, groups)
    draws, free = np.random.default_rng(0), sizes - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        if n_seeds == 1:
            drawn = (items / draws.chisquare(np.maximum(free, 1), (DRAWS, len(groups)))).sum(-1) / len(groups) ** 2
            low, high = np.quantile(drawn, [0.025, 0.975])
            unknown = dict.fromkeys(KINDS, np.nan)
            alone = float((items / free).sum() / len(groups) ** 2)
            return Components(np.nan, alone, np.nan, unknown | {"item": low}, unknown | {"item": high}, np.nan, np.nan)
        between, rest_free = per_seed.var(ddof=1), free * (n_seeds - 1)

        def of(seed_scale, item_scale, rest_scale):
            """Return seed, item and rest where each mean square is divided by the scales given, (..., groups)."""
            error = rest / rest_free / rest_scale
            noise = (error / sizes).sum(-1) / len(groups) ** 2
            item = items / free / item_scale - error / n_seeds
            return between / seed_scale - noise, item.sum(-1) / len(groups) ** 2, error.sum(-1) / len(groups) ** 2

        found = of(1.0, 1.0, 1.0)
        scales = [
            draws.chisquare(np.maximum(degrees, 1), (DRAWS, *np.shape(degrees))) / degrees
            for degrees in (np.float64(n_seeds - 1), free, rest_free)
        ]
        bounds = np.quantile(np.maximum(of(*scales), 0), [0.025, 0.975], axis=-1)
        noise = (rest / rest_free / sizes).sum() / len(groups) ** 2
        together = between / noise
    # Satterthwaite's degrees of freedom of the sum of the tasks' mean squares.
    noise_free = noise**2 / ((rest / rest_free / sizes / len(groups) ** 2) ** 2 / rest_free).sum() if noise > 0 else np.nan
    low, high = (dict(zip(KINDS, map(float, row), strict=True)) for row in bounds)
    p = float(stats.f.sf(together, n_seeds - 1, noise_free)) if np.isfinite(together) else np.nan
    seed, item, residual = map(float, found)
    return Components(seed, item, residual, low, high, float(together), p)


def squares(values: np.ndarray, weights: np.ndarray, groups: list) -> tuple[np.ndarray, ...]:
    """Return the statistic of each seed (seeds,), and of each group the sums of squares of items and of the rest and its size.

    Of unequal weights they are those of what each item adds to the weighted mean, as in `intervals.estimate`.
    """
    per_seed, found = np.zeros(len(values)), []
    for group in groups:
        part, share = values[:, group], weights[group] / weights[group].sum()
        mean = part @ share
        per_seed += mean / len(groups)
        influence = (part - mean[:, None]) * share * len(group)
        by_item = influence.mean(axis=0)
        found.append(((by_item**2).sum(), ((influence - by_item) ** 2).sum(), len(group)))
    return per_seed, *np.array(found, dtype=float).T


def components_table(results: Results | None) -> Table:
    """Return the components of every measure's paired difference by pair of criteria (`Legend.pairs`) and ratio.

    `long` has the columns model, ratio, column, measure, a, b, n_seeds, n_items (of each task), the variances seed, item and
    rest, which may be negative, their bounds (`seed_low`, ...), seed_share (of the variance that was found), together and
    p_together (Holm over the tasks of a model). The table for readers shows standard deviations at each model's middle ratio,
    negative variances as 0. Without results it is empty.
    """
    rows = []
    for model in results.model_names if results else ():
        of_model = results.models[(results.models["model"] == model) & (results.models["criterion"] != DENSE)]
        measured = [column for column in columns(results, model) if column.measure in MEASURED] + choice_columns(results, model)
        for column, ratio in itertools.product(measured, sorted(of_model["ratio"].unique())):
            names = of_model.loc[of_model["ratio"] == ratio, "criterion"]
            frames = {name: sample(results, column, model, name, ratio) for name in results.legend.compared(names)}
            for b, a in results.legend.pairs(names):
                if row := _row(frames[a], frames[b]):
                    place = {"model": model, "ratio": ratio, "column": column.name, "measure": column.measure, "a": a, "b": b}
                    rows.append(place | row)
    bounds = [f"{kind}_{side}" for kind in KINDS for side in ("low", "high")]
    head = ["model", "ratio", "column", "measure", "a", "b", "n_seeds", "n_items", *KINDS, *bounds, "seed_share", "together", "p"]
    long = pd.DataFrame(rows, columns=head)
    tasks = long["measure"] == "task"
    long["p_together"] = long[tasks].groupby("model")["p"].transform(lambda p: intervals.holm(p)) if tasks.any() else np.nan
    long = long.drop(columns="p")
    notes = (
        "Standard deviations of the paired difference in the unit of its measure (points, nats, JS distance), with 95 % "
        "intervals (generalized, as if effects were normal): of one calibration seed, of one item (a window; of an average one "
        "item of each task), and of what one seed makes of one item; 0 where the moments are negative. With S seeds and n items "
        "the difference has the variance seed^2 / S + item^2 / n + (seed x item)^2 / (S n): more items lower the last two parts, "
        "more seeds the first and the last. The last column is the part of the first in this study. Other ratios: "
        "components.csv.",
        f"{TOGETHER}: a task whose answers tip over together: between seeds it varies more than answers do that change one by "
        "one (F test, Holm's correction over the tasks).",
        *([protocol_note(results)] if results else []),
    )
    legend = results.legend if results else Legend()
    title = "Variance components of the differences between criteria (measured)"
    return Table("components", title, long, _display(long, legend), notes, legend)


def _row(a: pd.DataFrame, b: pd.DataFrame) -> dict:
    if a.empty or b.empty or not (np.isfinite(a["value"]).all() and np.isfinite(b["value"]).all()):
        return {}
    if not set(a["seed"]) & set(b["seed"]):
        return {}
    paired = intervals.paired_sample(a, b)
    found = components(paired.values, paired.weights, paired.groups)
    n_items = paired.n_items / len(paired.groups)
    parts = {kind: max(getattr(found, kind), 0) for kind in KINDS}
    total = parts["seed"] / paired.n_seeds + parts["item"] / n_items + parts["rest"] / (paired.n_seeds * n_items)
    bounds = {f"{kind}_{side}": getattr(found, side)[kind] for kind in KINDS for side in ("low", "high")}
    share = parts["seed"] / paired.n_seeds / total if total > 0 else np.nan
    counts = {"n_seeds": paired.n_seeds, "n_items": n_items, "seed_share": share}
    return counts | {kind: getattr(found, kind) for kind in KINDS} | bounds | {"together": found.together, "p": found.p}


def pooled(table: Table, model: str, ratio: float, column: str) -> dict[str, float]:
    """Return the mean of each component over the pairs of criteria at a ratio, 0 where that is negative, from `components_table`.

    Three seeds give a single pair two degrees of freedom: pairs of one study share what they can tell.
    """
    long = table.long
    rows = long[(long["model"] == model) & np.isclose(long["ratio"], ratio) & (long["column"] == column)]
    return {kind: max(float(rows[kind].mean()), 0.0) for kind in KINDS}


def components_figure(table: Table, model: str) -> Figure:
    """Draw the components as standard deviations with 95 % intervals, a panel for each measure, a row for each pair and ratio.

    `table` is `components_table`; of averages and corpora the first is drawn, hollow where the moments are negative.
    """
    long = table.long[(table.long["model"] == model) & table.long["measure"].isin(DRAWN) & table.long["seed"].notna()]
    if long.empty:
        return message("Fewer than two calibration seeds or two criteria: no variance to take apart.")
    names = list(long.drop_duplicates("measure")["column"])
    places = list(dict.fromkeys(zip(long["ratio"], long["a"], long["b"], strict=True)))
    labels = [f"{table.legend.label(a)} − {table.legend.label(b)}, {percent(ratio)}" for ratio, a, b in places]
    with mpl.rc_context(STYLE):
        across = min(2, len(names))
        down = -(-len(names) // across)
        fig, axes = plt.subplots(
            down, across, figsize=(WIDTH, 0.6 + down * (0.8 + 0.42 * len(places))), sharey=True, squeeze=False
        )
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        for ax, name in zip(axes.flat, names, strict=False):
            rows = long[long["column"] == name]
            for row in rows.to_dict("records"):
                place = places.index((row["ratio"], row["a"], row["b"]))
                for index, kind in enumerate(KINDS):
                    _mark(ax, row, kind, place + 0.25 * (index - 1), index)
            ax.set(title=measure_label(name, rows["measure"].iloc[0]).replace(", ", "\n"), xlabel="standard deviation")
            ax.title.set_fontsize(9)
            ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
            ax.set_xlim(left=0)
            ax.grid(axis="y", visible=False)
        axes[0, 0].set_yticks(range(len(places)), labels)
        axes[0, 0].set_ylim(len(places) - 0.5, -0.5)
        handles = [mpl.lines.Line2D([], [], label=text, **_look(index)) for index, text in enumerate(KINDS.values())]
        fig.legend(handles=handles, loc="outside lower center", ncols=3)
        fig.suptitle(f"{model}: where the variance of differences comes from, 95 % intervals", fontsize=10)
    return closed(fig, components_sentence(table, model))


def _look(index: int) -> dict:
    return neutral(index) | {"linestyle": "none"}


def _mark(ax, row: dict, kind: str, height: float, index: int) -> None:
    mean, low, high = (np.sqrt(max(row[name], 0)) for name in (kind, f"{kind}_low", f"{kind}_high"))
    look = _look(index)
    ax.hlines(height, low, high, color=look["color"], linewidth=1.2)
    ax.plot(mean, height, **look, markerfacecolor=look["color"] if row[kind] > 0 else "white", clip_on=False)


def middle_ratio(long: pd.DataFrame, model: str) -> float:
    """Return the middle one of the ratios at which the table has differences on a model."""
    ratios = sorted(long.loc[long["model"] == model, "ratio"].unique())
    return ratios[(len(ratios) - 1) // 2]


def components_sentence(table: Table, model: str) -> str:
    """Return how far seeds and items move a difference at a model's middle ratio, the mean over pairs of `components_table`."""
    long = table.long[(table.long["model"] == model) & table.long["seed"].notna()]
    if long.empty:
        return f"{model}: fewer than two calibration seeds or two criteria, so the variance of no difference can be taken apart."
    ratio, parts = middle_ratio(long, model), []
    for row in long[long["measure"].isin(DRAWN)].drop_duplicates("measure").to_dict("records"):
        digits, found = digits_of(row["measure"]), pooled(table, model, ratio, row["column"])
        sizes = [f"{found[kind] ** 0.5:.{digits}f}" for kind in KINDS]
        label = measure_label(row["column"], row["measure"]).partition(",")[0]
        parts.append(f"{', '.join(sizes)} of the {label}")
    return (
        f"{model} at {percent(ratio)}, mean over pairs of criteria: one seed, one item, and a seed on an item move a difference "
        f"(standard deviations) by {'; by '.join(parts)}."
    )


def _display(long: pd.DataFrame, legend: Legend) -> pd.DataFrame:
    rows, models = [], list(long["model"].unique())
    middle = {model: middle_ratio(long, model) for model in models}
    for row in long[long["ratio"] == long["model"].map(middle)].to_dict("records"):
        mark = f" {TOGETHER}" if row["p_together"] < 1 - intervals.LEVEL else ""
        label = row["column"] if row["measure"] == "task" else measure_label(row["column"], row["measure"])
        shown = {"Model": row["model"], "Measure": label + mark, "Ratio": percent(row["ratio"])}
        shown["A - B"] = f"{legend.label(row['a'])} - {legend.label(row['b'])}"
        shown |= {heading: _deviation(row, kind) for kind, heading in KINDS.items()}
        shown |= {"Seeds": str(row["n_seeds"]), "Items": f"{row['n_items']:.4g}"}
        rows.append(shown | {"Part of the seeds": ABSENT if pd.isna(row["seed_share"]) else f"{100 * row['seed_share']:.0f} %"})
    names = ["Model", "Measure", "Ratio", "A - B", *KINDS.values(), "Seeds", "Items"]
    frame = pd.DataFrame(rows, columns=[*names, "Part of the seeds"])
    return frame.drop(columns=[] if len(models) > 1 else ["Model"])


def _deviation(row: dict, kind: str) -> str:
    if pd.isna(row[kind]):
        return ABSENT
    digits = digits_of(row["measure"])
    mean, low, high = (np.sqrt(max(row[name], 0)) for name in (kind, f"{kind}_low", f"{kind}_high"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
