"""Do two criteria differ? Differences paired on the same items and seeds: table and forest plot."""

import itertools
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import LOWER_IS_BETTER, MARGINS, Results, choice_columns, columns, percent, sample
from hfprune_nb.report.style import CROWD, DENSE, REFERENCE, STYLE, UNIFORM, WIDTH, Legend, closed, message
from hfprune_nb.report.table import ABSENT, ONE_SEED, Table, digits_of, format_difference, format_p, measure_label

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


EXCLUDED = "≈"
SIZES = {"average": "points", "perplexity": "nats of log-perplexity", "js": "of JS distance", "kl": "nats of KL"}
MEASURED = ("average", "perplexity", "js", "kl")
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
    "Bound",
    "Seeds",
    "Items",
    "Verdict",
]


def paired_table(results: Results, margins: dict[str, float] = MARGINS, of_choices: bool = False) -> Table:
    """Return the differences A - B of the pairs in `Legend.pairs` by ratio, paired on the same items and calibration seeds.

    Measures: average of the tasks (points), log-perplexity (nats per token), JS and KL; `of_choices` those of
    `results.choice_columns` instead. `p` is over seeds and items,
    `p_holm` its Holm adjustment over all pairs and ratios of one measure on one model, `p_items` over items for these seeds
    (`intervals.paired_difference`); all three test the difference that is printed. `seed_share` is the part of the seeds in
    the variance, `detectable` the true difference that would be found with 80 % chance, `detectable_holm` that at Holm's
    strictest level (`intervals.Errors.detectable`). `bound` is the size beyond which a true difference is excluded,
    `p_equivalent` tests whether one as large as the measure's margin is, with Holm's adjustment over the same family
    (`intervals.Errors.p_equivalent`). With one common seed there is none of these.
    """
    rows = []
    for model in results.model_names:
        of_model = results.models[(results.models["model"] == model) & (results.models["criterion"] != DENSE)]
        headline = [column for column in columns(results, model) if column.measure in MEASURED]
        compared = choice_columns(results, model) if of_choices else headline
        for column, ratio in itertools.product(compared, sorted(of_model["ratio"].unique())):
            for b, a in results.legend.pairs(of_model.loc[of_model["ratio"] == ratio, "criterion"]):
                sides = [sample(results, column, model, criterion, ratio) for criterion in (a, b)]
                row = {"model": model, "ratio": ratio, "column": column.name, "measure": column.measure, "a": a, "b": b}
                rows.append(row | _difference(*sides))
    long = pd.DataFrame(rows, columns=[*PAIRED, "errors"])
    long["p_holm"] = long.groupby(["model", "column"])["p"].transform(lambda p: intervals.holm(p)) if rows else []
    long["verdict"] = [_verdict(row, results.legend) for row in long.to_dict("records")]
    long["source"] = "measured"
    families = long.groupby(["model", "column"])["p"].count()
    sizes = long.groupby(["model", "column"])["p"].transform("count").clip(lower=1)
    long["margin"] = long["measure"].map(margins).astype(float)
    judged = list(zip(long.pop("errors"), long["p"].notna(), sizes, long["mean"], long["margin"], strict=True))
    long["detectable"] = [errors.detectable() if known else np.nan for errors, known, *_ in judged]
    long["detectable_holm"] = [errors.detectable(size) if known else np.nan for errors, known, size, *_ in judged]
    long["bound"] = [errors.bound(mean) if known else np.nan for errors, known, _, mean, _ in judged]
    equivalent = [float(errors.p_equivalent(mean, margin)) if known else np.nan for errors, known, _, mean, margin in judged]
    long["p_equivalent"] = pd.Series(equivalent, long.index, dtype=float)
    long["p_equivalent"] = long.groupby(["model", "column"])["p_equivalent"].transform(lambda p: intervals.holm(p))
    notes = [
        "Differences A - B are paired on the same items and calibration seeds; interval and p are over both, with the degrees of "
        "freedom of the seeds for their part of the variance and those of the items for the rest (Behrens and Fisher). Averages "
        "and probabilities in points, perplexity as difference of log-perplexity in nats per token, all else in its own unit; "
        "higher is better for averages, probabilities and log-probabilities.",
        f"Holm's correction is over the {families.max() if len(families) else 0} comparisons (pairs x ratios) of one "
        f"measure on one model. {intervals.FAMILY_ERROR} "
        "The items p-value holds for these calibration seeds only, Student's t over items of the difference "
        "that is printed, and gives no verdict.",
        "Detectable is the smallest true difference that this study would have found with 80 % chance (two-sided 5 %; after "
        "the slash at Holm's strictest level), with the same degrees of freedom: smaller ones can neither be seen nor excluded.",
        f"Bound: a larger true difference is excluded (one-sided 5 %). {EXCLUDED}: so is one of {margins_in_words(margins)}, "
        "by two one-sided tests after Holm's correction.",
    ]
    if (long["verdict"] == ONE_SEED).any():
        notes.append("One common calibration seed cannot tell a criterion from a lucky text: no p-value, no verdict.")
    if long.empty:
        notes.insert(0, "Fewer than two criteria were evaluated at the same ratio: nothing to compare.")
    display = _paired_display(long, len(results.model_names) > 1, results.legend)
    name, what = ("paired_choices", " in what their choices tell") if of_choices else ("paired", "")
    title = f"Paired differences between criteria{what} (measured)"
    return Table(name, title, long, display, (*notes, *_family_notes(long), protocol_note(results)), results.legend)


def margins_in_words(margins: dict[str, float] = MARGINS) -> str:
    """Return the margins of the equivalence tests as "0.5 points, 0.01 nats of log-perplexity"."""
    return ", ".join(f"{value:g} {SIZES[measure]}" for measure, value in margins.items())


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


def _verdict(row: dict, legend: Legend) -> str:
    if pd.isna(row["low"]):
        return "no interval"
    if pd.isna(row["p"]):
        return ONE_SEED
    if not (row["low"] > 0 or row["high"] < 0):
        return "interval crosses zero"
    better = "b" if (row["mean"] > 0) == (row["measure"] in LOWER_IS_BETTER) else "a"
    return f"{legend.label(row[better])} better" + (", not after Holm" if row["p_holm"] >= 1 - intervals.LEVEL else "")


def _paired_display(long: pd.DataFrame, several_models: bool, legend: Legend) -> pd.DataFrame:
    rows = [
        {
            "Model": row["model"],
            "Measure": measure_label(row["column"], row["measure"]),
            "Ratio": percent(row["ratio"]),
            "A - B": f"{legend.label(row['a'])} - {legend.label(row['b'])}",
            "Difference": format_difference(row),
            "p": format_p(row["p"]),
            "p (Holm)": format_p(row["p_holm"]),
            "p (items)": format_p(row["p_items"]),
            "Detectable": _format_detectable(row),
            "Bound": _format_bound(row),
            "Seeds": str(row["n_seeds"]),
            "Items": str(row["n_items"]),
            "Verdict": row["verdict"],
        }
        for row in long.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=PAIRED_DISPLAY).drop(columns=[] if several_models else ["Model"])


def _format_detectable(row: dict) -> str:
    if pd.isna(row["detectable"]):
        return ABSENT
    digits = digits_of(row["measure"])
    return f"{row['detectable']:.{digits}f} / {row['detectable_holm']:.{digits}f}"


def _format_bound(row: dict) -> str:
    if pd.isna(row["bound"]):
        return ABSENT
    return f"{row['bound']:.{digits_of(row['measure'])}f}" + f" {EXCLUDED}" * (row["p_equivalent"] < 1 - intervals.LEVEL)


def _family_notes(long: pd.DataFrame) -> list[str]:
    notes = long.loc[long["note"].str.contains("left out|common", na=False), "note"]
    return [f"Some comparisons: {note}." for note in notes.unique()]


def with_detectable(table: Table, paired: Table) -> Table:
    """Return `table` with a note on the differences that the study could have found, from `paired_table`.

    Tables made from it (`ablation_table`, `fidelity_table`) keep the note.
    """
    told = []
    for (model, column, measure), part in paired.long.groupby(["model", "column", "measure"], sort=False):
        most = part["detectable"].max()
        if np.isfinite(most):
            told.append(f"{model}, {measure_label(column, measure)}: {most:.{digits_of(measure)}f}")
    if not told:
        return table
    note = (
        "Smallest true difference between two criteria that this study would have found with 80 % chance, the largest over pairs "
        f"and ratios: {'; '.join(told)}. Smaller ones are found less often, so not finding one does not exclude it; the paired "
        "table has each comparison."
    )
    return replace(table, notes=(*table.notes, note))


def forest(paired: Table, model: str) -> Figure:
    """Draw paired differences between criteria with 95 % intervals, a panel per measure; `paired` is `paired_table`.

    Filled markers: the interval excludes zero, also after Holm's correction; hollow ones: it does not. The side where
    the first criterion of a pair is better is written below each panel. Many pairs are drawn for `HEADLINE` alone.
    """
    rows = paired.long[(paired.long["model"] == model) & paired.long["low"].notna()]
    if rows.empty:
        return message("No two criteria were evaluated on the same seeds and items: no paired difference to draw.")
    pairs = list(dict.fromkeys(zip(rows["a"], rows["b"], strict=True)))
    if len(pairs) > CROWD:
        rows = rows[rows["column"].isin(_hero_columns(rows))]
    rows = rows.assign(series=list(zip(rows["a"], rows["b"], strict=True)), certain=rows["verdict"].str.endswith(" better"))
    words = {pair: " − ".join(map(paired.legend.label, pair)) for pair in pairs}
    looks = {pair: paired.legend.pair_look(*pair) for pair in pairs}
    named = words if len(pairs) <= CROWD else {pair: _short(*pair, paired.legend) for pair in pairs}
    fig = _panels(rows, {pair: (named[pair], looks[pair]) for pair in pairs}, "first is better", across=3)
    fig.suptitle(f"{model}: paired differences, 95 % intervals (filled: zero excluded, also after Holm)", fontsize=10)
    surest = rows.sort_values(["p_holm", "p"], kind="stable").iloc[0]
    caption = f"Of {len(rows)} paired differences {rows['certain'].sum()} exclude zero after Holm's correction"
    return closed(fig, f"{caption}; the surest is {_in_words(surest, words[surest['series']])}.")


def _short(a: str, b: str, legend: Legend) -> str:
    (left, _, one), (right, _, two) = a.partition("@"), b.partition("@")
    if left == right:
        return f"{legend.short(left)}: {legend.allocation(one or UNIFORM)} − {legend.allocation(two or UNIFORM)}"
    return f"{legend.short(a)} − {legend.short(b)}"


# On these measures, the first average and the first corpus, a study's verdict and its first picture rest.
HEADLINE = ("average", "perplexity", "js")


def _hero_columns(rows: pd.DataFrame) -> list[str]:
    firsts = rows.drop_duplicates("measure").set_index("measure")["column"]
    return [firsts[measure] for measure in HEADLINE if measure in firsts]


def hero(paired: Table, criterion: Table, model: str) -> Figure:
    """Draw each criterion's difference to entropy with its 95 % interval in the measures of its verdict, by ratio.

    `paired` and `criterion` are `paired_table` and `criterion_table`; a panel for each of `HEADLINE` that there is.
    Baselines, which have no paired test and would hide the others, stand in the caption.
    """
    legend, rows = paired.legend, paired.long[(paired.long["model"] == model) & paired.long["low"].notna()]
    rows = rows[rows["a"].map(_criterion).eq(REFERENCE) != rows["b"].map(_criterion).eq(REFERENCE)]
    if rows.empty:
        return message("No criterion was evaluated on the same seeds and items as entropy: nothing to draw.")
    rows = rows[rows["column"].isin(_hero_columns(rows))]
    turned = rows["a"].map(_criterion).eq(REFERENCE)
    sign = np.where(turned, -1, 1)
    low, high = np.where(turned, -rows["high"], rows["low"]), np.where(turned, -rows["low"], rows["high"])
    rows = rows.assign(series=rows["b"].where(turned, rows["a"]), mean=sign * rows["mean"], low=low, high=high)
    rows["certain"] = rows["verdict"].str.endswith(" better")
    names = legend.in_order(rows["series"])
    fig = _panels(rows, {name: (legend.label(name), legend.look(name)) for name in names}, "better than entropy", across=3)
    fig.suptitle(f"{model}: difference to {legend.label(REFERENCE)}, 95 % intervals (filled: decided after Holm)", fontsize=10)
    told = f"{int(rows['certain'].sum())} of {len(rows)} differences to entropy exclude zero after Holm's correction"
    return closed(fig, f"{told}{_baselines(criterion, rows, model)}.")


def _criterion(name: str) -> str:
    return name.partition("@")[0]


def _baselines(criterion: Table, rows: pd.DataFrame, model: str) -> str:
    """Return how far the baselines, which are not drawn, are from entropy at the middle ratio, as the end of a sentence."""
    ratios = sorted(rows["ratio"].unique())
    ratio = ratios[(len(ratios) - 1) // 2]
    cells = criterion.long[(criterion.long["model"] == model) & (criterion.long["ratio"] == ratio)]
    plain = {name for name in cells["criterion"] if "@" not in name and name != DENSE}
    told = []
    for name in criterion.legend.in_order(plain - set(criterion.legend.compared(plain))):
        sizes = []
        for column, measure in rows[["column", "measure"]].drop_duplicates().itertuples(index=False):
            means = cells[cells["column"] == column].set_index("criterion")["mean"]
            means = np.log(means) if measure == "perplexity" else means
            sizes.append(f"{means[name] - means[REFERENCE]:+.{1 if measure == 'average' else 2}f} {SIZES[measure]}")
        told.append(f"{criterion.legend.label(name)} {' and '.join(filter(None, [', '.join(sizes[:-1]), sizes[-1]]))}")
    return f"; not drawn, at {percent(ratio)}: {', '.join(told)}" if told else ""


def _in_words(row: pd.Series, pair: str) -> str:
    place = row["column"].partition(":")[2]
    text = f"{pair}, {format_difference(row)} {SIZES[row['measure']]}"
    return f"{text}{f' on {place}' if place else ''} at {percent(row['ratio'])}"


def _panels(rows: pd.DataFrame, series: dict, better: str, across: int) -> Figure:
    """Draw a panel per measure of differences with intervals, a height per ratio and, dodged, per series.

    rows : those of `paired_table` with the columns `series` and `certain`; series : its label and look. With one ratio and many
    series the axis names them, otherwise a legend does.
    """
    names, ratios = list(rows["column"].unique()), sorted(rows["ratio"].unique())
    # A spare panel holds the legend, so that none is empty.
    across = min(across, len(names))
    down, named, step = -(-len(names) // across), len(ratios) == 1 and len(series) > 3, len(series) + 0.8
    height = 0.8 + 0.16 * step * len(ratios)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(down, across, figsize=(WIDTH, 0.6 + down * height), sharey=True, squeeze=False)
        for ax, name in zip(axes.flat, names, strict=False):
            _panel(ax, rows[rows["column"] == name], series, ratios, better)
        if named:
            axes[0, 0].set_yticks(range(len(series)), [label for label, _ in series.values()], fontsize=7.5)
        handles = [mpl.lines.Line2D([], [], label=label, **look | {"linestyle": "none"}) for label, look in series.values()]
        spare = axes.flat[len(names) :]
        for ax in spare:
            ax.set_axis_off()
        if len(spare) and not named:
            spare[0].legend(handles=handles, loc="center left")
        elif not named:
            fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def _panel(ax, rows: pd.DataFrame, series: dict, ratios: list, better: str) -> None:
    order, step = list(series), len(series) + 0.8
    for row in rows.to_dict("records"):
        look = series[row["series"]][1]
        ax.errorbar(
            row["mean"],
            ratios.index(row["ratio"]) * step + order.index(row["series"]),
            xerr=[[row["mean"] - row["low"]], [row["high"] - row["mean"]]],
            marker=look["marker"],
            linestyle="none",
            color=look["color"],
            markerfacecolor=look["color"] if row["certain"] else "white",
            elinewidth=1.3,
            capsize=2.5,
        )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks([i * step + (len(order) - 1) / 2 for i in range(len(ratios))], [percent(ratio) for ratio in ratios])
    ax.set_ylim(len(ratios) * step - 0.9, -0.9)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    for i in range(1, len(ratios)):
        ax.axhline(i * step - 0.9, color="#BBBBBB", linewidth=0.6)
    first = rows.iloc[0]
    side = "left" if first["measure"] in LOWER_IS_BETTER else "right"
    ax.set_xlabel(f"{side}: {better}")
    ax.set_title(measure_label(first["column"], first["measure"]).replace(", ", "\n"), fontsize=9)
    if ax.get_subplotspec().is_first_col() and len(ratios) > 1:
        ax.set_ylabel("parameters removed")
