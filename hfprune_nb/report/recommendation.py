"""Which recipe should a user take? Criteria, allocations and compensations in one ranking by KL, with what they cost."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals
from hfprune_nb.report.apart import told_apart
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import Results, collect, model_row, percent, prunings, read_summary, split_of, treatment
from hfprune_nb.report.style import CROWD, DENSE, REFERENCE, STYLE, WIDTH, Legend, closed, handles_of, message
from hfprune_nb.report.table import ABSENT, ONE_SEED, Table, bounded, format_p

NONE, PLAIN = "none", "plain"
# What a user accepts or can afford: whether one width is wanted, whether forward passes alone, and how a sentence says it.
NEEDS = {
    "plain": (True, False, "for a plain checkpoint of one width"),
    "any": (False, False, "where layers may have different widths"),
    "forward": (True, True, "for a plain checkpoint, if only forward passes can be afforded"),
}
_MEASURED = ["kl", "kl_low", "kl_high", "times", "low", "high", "p", "n_seeds", "n_items"]
_COLUMNS = ["model", "ratio", "criterion", "compensation", "loads_with", "forwards", *_MEASURED]


def recommendation_table(evaluation_folders: Iterable[Path], pruning_folders: Iterable[Path] = ()) -> Table:
    """Return for each recipe the KL to the dense model, and its ratio to that of HFPrune: entropy, uniform, uncompensated.

    A recipe is a criterion with its allocation (`style.series`) and a compensation. KL is the geometric mean over held-out
    windows, so that ratios are differences of logarithms, paired on the same windows and calibration seeds; corpora count alike.
    `times` below 1 is closer to the dense model than HFPrune; `forwards` counts forward passes over the calibration text, a
    backward pass as two, for scoring in all rounds and for what the allocation measures, of which the prunings know the numbers.
    `p_holm` : Holm's adjustment over the recipes of one model and ratio. Errors as `results.collect`.
    """
    summaries = {Path(folder): read_summary(folder) for folder in evaluation_folders}
    summaries = {folder: summary for folder, summary in summaries.items() if split_of(summary) in (DENSE, NONE)}
    read = told_apart((summary, folder) for folder, summary in summaries.items() if not treatment(summary)[0])
    kinds = sorted({treatment(summary)[1] for summary, _ in read} - {NONE})
    untuned = [folder for _, folder in read]
    by_kind = {kind: collect(untuned, compensation=kind) for kind in (NONE, *kinds)}
    loads = {_place(summary): summary.get("loads_with", PLAIN) for summary, _ in read}
    texts = {_place(summary): summary["protocol"].get("calibration", {}).get("n_windows", 1) for summary, _ in read}
    pruned_by = {_place(facts): facts for facts, _ in prunings(pruning_folders)}
    results = by_kind[NONE]
    rows = []
    for kind, part in by_kind.items():
        pruned = part.models[part.models["criterion"] != DENSE].drop_duplicates(["model", "criterion", "ratio"])
        for model, criterion, ratio in pruned[["model", "criterion", "ratio"]].itertuples(index=False):
            own = _log_kl(part, model, criterion, ratio)
            row = {"model": model, "ratio": ratio, "criterion": criterion, "compensation": kind}
            place = model, criterion, ratio, kind
            facts = pruned_by.get(place, {"widths": []})
            passes = results.legend.forwards(criterion, facts.get("rounds", 1), len(facts["widths"]), texts[place])
            row |= {"forwards": passes, "loads_with": loads[place]}
            rows.append(row | _measured(own, _log_kl(results, model, REFERENCE, ratio)))
    long = pd.DataFrame(rows, columns=_COLUMNS)
    families = long.groupby(["model", "ratio"])["p"]
    long["p_holm"] = families.transform(lambda p: intervals.holm(p)) if rows else []
    long = long.sort_values(["model", "ratio", "kl"], ignore_index=True)
    title, legend = "Recipes by KL to the dense model (measured)", results.legend
    return Table("recommendation", title, long, _display(long, legend), _notes(long, results), legend)


def _place(summary: dict) -> tuple:
    row = model_row(summary)
    return row["model"], row["criterion"], row["ratio"], treatment(summary)[1]


def _log_kl(results: Results, model: str, criterion: str, ratio: float) -> pd.DataFrame:
    frame = results.fidelity
    frame = frame[(frame["model"] == model) & (frame["criterion"] == criterion) & (frame["ratio"] == ratio)]
    frame = frame.rename(columns={"window": "item", "corpus": "group"})
    # A window at which nothing changed has no logarithm.
    return frame.assign(value=np.log(frame["kl"].astype(float).clip(lower=1e-12)))[["seed", "item", "group", "value"]]


def _measured(own: pd.DataFrame, reference: pd.DataFrame) -> dict:
    """Return KL with its interval, and its ratio to the reference's; what cannot be compared is NaN."""
    if own.empty:
        return {"n_seeds": 0, "n_items": 0}
    level = intervals.mean_interval(own)
    found = {"kl": np.exp(level.mean), "kl_low": np.exp(level.low), "kl_high": np.exp(level.high)}
    if not set(own["seed"]) & set(reference["seed"]):
        return found | {"n_seeds": own["seed"].nunique(), "n_items": level.n_items}
    if own.reset_index(drop=True).equals(reference.reset_index(drop=True)):
        return found | {"times": 1.0, "n_seeds": level.n_seeds, "n_items": level.n_items}
    change = intervals.paired_difference(own, reference)
    bounds = dict(zip(("times", "low", "high"), np.exp([change.mean, change.low, change.high]), strict=True))
    return found | bounds | {"p": change.p, "n_seeds": change.n_seeds, "n_items": change.n_items}


def chosen(table: Table, need: str, ratio: float, model: str) -> pd.Series | None:
    """Return the row of the recipe with the lowest KL among those that meet a need of `NEEDS`, or None where none does."""
    plain, forward_only, _ = NEEDS[need]
    rows = table.long[(table.long["model"] == model) & (table.long["ratio"] == ratio) & table.long["kl"].notna()]
    if plain:
        rows = rows[rows["loads_with"] == PLAIN]
    if forward_only:
        rows = rows[rows["forwards"] <= 1]
    return None if rows.empty else rows.loc[rows["kl"].idxmin()]


def recommendation(table: Table) -> pd.DataFrame:
    """Return what is recommended for each need, at each ratio and for each model, as rows of the table with the need."""
    rows = []
    for (model, ratio), _ in table.long.groupby(["model", "ratio"]):
        found = {need: chosen(table, need, ratio, model) for need in NEEDS}
        rows += [row.to_dict() | {"need": need} for need, row in found.items() if row is not None]
    return pd.DataFrame(rows, columns=["need", *table.long.columns])


def sentences(table: Table) -> list[str]:
    """Return one sentence for each need at the middle ratio of each model: what to take, what it gains and what it costs."""
    told, rows = [], recommendation(table)
    for model, part in rows.groupby("model", sort=False):
        ratios = sorted(part["ratio"].unique())
        for row in part[part["ratio"] == ratios[(len(ratios) - 1) // 2]].to_dict("records"):
            name = _recipe(row["criterion"], row["compensation"], table.legend)
            gain = bounded(row["times"], row["low"], row["high"], ".2f")
            told.append(
                f"{model} at {percent(row['ratio'])}, {NEEDS[row['need']][2]}: {name}; its KL is {gain} times that of HFPrune's "
                f"recipe ({_verdict(row)}), and scoring takes {_forwards_words(row['forwards'])} of the calibration text."
            )
    return told


def pareto_figure(table: Table, model: str) -> Figure:
    """Draw KL against the forward passes that a recipe takes, a panel per compensation; a line joins the front."""
    rows = table.long[(table.long["model"] == model) & table.long["kl"].notna() & np.isfinite(table.long["forwards"])]
    if rows.empty:
        return message("No pruned model was evaluated: nothing to weigh against its cost.")
    ratios = sorted(rows["ratio"].unique())
    rows = rows[rows["ratio"] == ratios[(len(ratios) - 1) // 2]]
    kinds, told = list(dict.fromkeys([NONE, *rows["compensation"]])), []
    with mpl.rc_context(STYLE):
        height = 4.2 + 0.13 * rows["criterion"].nunique() / 2
        fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, height), sharey=True, squeeze=False)
        for ax, kind in zip(axes.flat, kinds, strict=True):
            part = rows[rows["compensation"] == kind].sort_values(["forwards", "kl"])
            steps = sorted(part["forwards"].unique())
            places = {count: place for place, count in enumerate(steps)}
            for _, same in part.groupby("forwards", sort=False):
                # What takes the same passes stands side by side.
                shifts = np.linspace(-0.3, 0.3, len(same)) if len(same) > 1 else [0]
                for shift, row in zip(shifts, same.to_dict("records"), strict=True):
                    look = table.legend.look(row["criterion"]) | {"linestyle": "none", "markersize": 5}
                    error = [[row["kl"] - row["kl_low"]], [row["kl_high"] - row["kl"]]]
                    look |= {"label": table.legend.label(row["criterion"]), "capsize": 1.5, "elinewidth": 0.8}
                    ax.errorbar(places[row["forwards"]] + shift, row["kl"], yerr=np.nan_to_num(error), **look)
            front = part[(part["kl"] <= part["kl"].cummin()) & ~part.duplicated("forwards")]
            if len(front):
                told.append(" → ".join(_point(row, table.legend) for row in front.to_dict("records")))
                ax.step(front["forwards"].map(places), front["kl"], where="post", color="#999999", linewidth=1, zorder=0)
            ax.set(xlabel="forward passes over the calibration text", title=f"compensation: {kind.replace('_', ' ')}")
            ax.set_xticks(range(len(steps)), [f"{count:,.4g}" for count in steps])
            ax.set(yscale="log", xlim=(-0.5, len(steps) - 0.5))
            ax.grid(axis="x", visible=False)
            ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes[0, 0].set_ylabel("KL to the dense model, nats (lower is better)")
        _legend(fig, axes, table)
        fig.suptitle(f"{model}: what a recipe costs and what it leaves, {percent(rows['ratio'].iloc[0])} removed", fontsize=10)
    return closed(fig, f"From none to many passes, what no cheaper recipe beats: {'; '.join(told)}.")


def _point(row: dict, legend: Legend) -> str:
    return f"{_recipe(row['criterion'], row['compensation'], legend)} ({row['kl']:.2f} nats, {_forwards_words(row['forwards'])})"


def _legend(fig: Figure, axes: np.ndarray, table: Table) -> None:
    handles = handles_of(axes)
    order = [text for text in map(table.legend.label, table.legend.in_order(table.long["criterion"])) if text in handles]
    many = len(order) > CROWD
    ncols = 2 if many or max(map(len, order)) > 25 else 3
    fig.legend([handles[text] for text in order], order, loc="outside lower center", ncols=ncols, fontsize=7.5 if many else None)


def against_ratio_figure(table: Table, model: str) -> Figure:
    """Draw each recipe's KL as a multiple of HFPrune's with 95 % intervals, against the ratio or, at one, as a list.

    Of a crowd those criteria are drawn against the ratio that have the lowest multiple.
    """
    rows = table.long[(table.long["model"] == model) & table.long["times"].notna()]
    if rows.empty:
        return message("HFPrune's own recipe was not evaluated beside others: nothing to compare with.")
    kinds = list(dict.fromkeys([NONE, *rows["compensation"]]))
    with mpl.rc_context(STYLE):
        draw = _multiples if rows["ratio"].nunique() == 1 else _lines
        fig = draw(rows, kinds, table)
        fig.suptitle(f"{model}: recipes beside HFPrune's", fontsize=10)
    certain = rows[rows["p_holm"] < 1 - intervals.LEVEL]
    better = int((certain["times"] < 1).sum())
    best = rows.loc[rows["times"].idxmin()]
    return closed(
        fig,
        f"Of {len(rows)} recipes at all ratios {better} have a lower KL than HFPrune's after Holm's correction and "
        f"{len(certain) - better} a higher one; the lowest multiple is {best['times']:.2f}, "
        f"{_recipe(best['criterion'], best['compensation'], table.legend)} at {percent(best['ratio'])}.",
    )


def _lines(rows: pd.DataFrame, kinds: list[str], table: Table) -> Figure:
    best = rows.groupby("criterion")["times"].min().nsmallest(CROWD).index
    fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 4.4), sharey=True, squeeze=False)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        part = rows[(rows["compensation"] == kind) & rows["criterion"].isin(best)]
        names = table.legend.in_order(part["criterion"])
        for index, name in enumerate(names):
            line = part[part["criterion"] == name].sort_values("ratio")
            shift = 100 * line["ratio"] + 0.5 * (index - (len(names) - 1) / 2)
            error = [line["times"] - line["low"], line["high"] - line["times"]]
            ax.errorbar(shift, line["times"], yerr=np.nan_to_num(error), label=table.legend.label(name), capsize=2,
                        elinewidth=0.8, **table.legend.look(name))  # fmt: skip
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xlabel="parameters removed, %", title=f"compensation: {kind.replace('_', ' ')}", yscale="log")
        ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0, 0].set_ylabel("KL / KL of HFPrune's recipe (below 1 is better)")
    _legend(fig, axes, table)
    return fig


def _multiples(rows: pd.DataFrame, kinds: list[str], table: Table) -> Figure:
    order = list(rows.groupby("criterion")["times"].min().sort_values().index)
    size = (WIDTH, 1.2 + 0.17 * len(order))
    fig, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, sharex=True, squeeze=False)
    for ax, kind in zip(axes.flat, kinds, strict=True):
        for row in rows[rows["compensation"] == kind].to_dict("records"):
            look = table.legend.look(row["criterion"]) | {"linestyle": "none"}
            error = np.nan_to_num([[row["times"] - row["low"]], [row["high"] - row["times"]]])
            face = look["color"] if row["p_holm"] < 1 - intervals.LEVEL else "white"
            ax.errorbar(row["times"], order.index(row["criterion"]), xerr=error, mfc=face, capsize=2, elinewidth=0.8, **look)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", title=f"compensation: {kind.replace('_', ' ')}", ylim=(len(order) - 0.5, -0.5))
        ax.set_xlabel("KL / KL of HFPrune's recipe (left is better; filled: after Holm)")
        ax.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0, 0].set_yticks(range(len(order)), map(table.legend.label, order), fontsize=7.5)
    return fig


def _recipe(criterion: str, compensation: str, legend: Legend) -> str:
    return legend.label(criterion) + ("" if compensation == NONE else f", compensation {compensation.replace('_', ' ')}")


def _forwards_words(forwards: float) -> str:
    return "no pass" if not forwards else "one forward pass" if forwards == 1 else f"{forwards:,.4g} forward passes"


def _verdict(row: dict) -> str:
    if row["times"] == 1 and pd.isna(row["low"]):
        return "it is that recipe"
    if pd.isna(row["p"]):
        return ONE_SEED
    if row["p_holm"] < 1 - intervals.LEVEL:
        return "better" if row["times"] < 1 else "worse"
    return "undecided" if row["low"] <= 1 <= row["high"] else "not after Holm"


def _display(long: pd.DataFrame, legend: Legend) -> pd.DataFrame:
    rows = [
        {
            "Model": row["model"],
            "Ratio": percent(row["ratio"]),
            "Criterion": legend.label(row["criterion"]),
            "Compensation": row["compensation"].replace("_", " "),
            "Loads with": row["loads_with"],
            "Forward passes": f"{row['forwards']:,.4g}",
            "KL, nats": bounded(row["kl"], row["kl_low"], row["kl_high"], ".3f"),
            "Times HFPrune's": ABSENT if pd.isna(row["times"]) else bounded(row["times"], row["low"], row["high"], ".2f"),
            "p (Holm)": format_p(row["p_holm"]),
            "Seeds": str(row["n_seeds"]),
            "Verdict": ABSENT if pd.isna(row["times"]) else _verdict(row),
        }
        for row in long.to_dict("records")
    ]
    columns = ["Model", "Ratio", "Criterion", "Compensation", "Loads with", "Forward passes", "KL, nats", "Times HFPrune's",
               "p (Holm)", "Seeds", "Verdict"]  # fmt: skip
    several = long["model"].nunique() > 1
    return pd.DataFrame(rows, columns=columns).drop(columns=[] if several else ["Model"])


def _notes(long: pd.DataFrame, results: Results) -> tuple[str, ...]:
    family = long.groupby(["model", "ratio"])["p"].count().max() if len(long) else 0
    return (
        "KL(dense, pruned) on held-out text, the geometric mean over windows; corpora count alike. Its ratio to HFPrune's recipe "
        "(entropy, uniform widths, no compensation) is paired on the same windows and calibration seeds; interval and p are over "
        f"both (Behrens and Fisher), and Holm's correction over the {family} recipes of one model and ratio. "
        f"{intervals.FAMILY_ERROR}",
        "Forward passes over the calibration text, a backward pass counted as two: scoring, in all rounds, and what the "
        "allocation measures on some of its windows. Not counted: a compensation's one over its own windows.",
        protocol_note(results),
    )
