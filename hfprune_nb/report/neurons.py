"""Do the criteria choose different neurons? Importance, rank agreement and overlap of kept sets from stages 02 and 03."""

import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hfprune_nb.report import intervals
from hfprune_nb.report.results import kept, percent, percents, prunings, scores, specs, split_of, way_of
from hfprune_nb.report.style import CROWD, DASHES, GREYS, STYLE, WIDTH, Legend, closed, handles_of, message, series

AGREEMENT = ["model", "seed", "layer", "a", "b", "spearman"]
PAIRS = ["model", "ratio", "layer", "comparison", "a", "b", "seeds", "jaccard"]
OVERLAP = ["model", "ratio", "layer", "comparison", "a", "b", "jaccard", "n_pairs"]
CHANCE = "chance"
CHOICE = ["model", "ratio", "pair", "between", "within", "chance", "difference", "low", "high", "p"]
DEFAULT_NEURON_RATIO = 0.3  # where a study has no pruning to take it from


def neuron_ratio(pruning_folders: Iterable[Path], model: str) -> float:
    """Return the fraction of MLP neurons removed at the middle ratio of `model`, or the default without any pruning."""
    ratios = sorted({facts["neuron_ratio"] for facts, _ in prunings(pruning_folders) if facts["model"] == model})
    return ratios[(len(ratios) - 1) // 2] if ratios else DEFAULT_NEURON_RATIO


def kept_sets(importance: list[np.ndarray], ratio: float) -> list[np.ndarray]:
    """Return each layer's kept neurons when the fraction `ratio` of its neurons goes, the lowest first; importance by layer."""
    return [row.argsort(stable=True)[round(ratio * len(row)) :] for row in importance]


def overlap(a: list[np.ndarray], b: list[np.ndarray], ratio: float) -> float:
    """Return the Jaccard overlap of two importances' kept sets, the mean over layers."""
    pairs = zip(kept_sets(a, ratio), kept_sets(b, ratio), strict=True)
    return float(np.mean([jaccard(left, right) for left, right in pairs]))


def rank_correlation(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Return Spearman's correlation of two importances by layer, the mean over layers."""
    layers = np.repeat(np.arange(len(a)), [len(row) for row in a])
    return intervals.spearman(np.concatenate(a), np.concatenate(b), layers)


def importance_bins(importance: list[np.ndarray], n_bins: int = 100) -> np.ndarray:
    """Return each layer's importance sorted from high to low and averaged in bins, relative to the model's mean.

    `importance` is that of each layer (neurons,), the result (layers, n_bins), fewer where a layer has fewer neurons. Neurons
    without a score (not finite, or negative because the first stage of self-distillation removed them) are left out of the means.
    """
    n_bins = min(n_bins, *map(len, importance))
    finite = [np.where(np.isfinite(row) & (row >= 0), row, np.nan) for row in importance]
    parts = [part for row in finite for part in np.array_split(-np.sort(-row), n_bins)]
    sums, filled = np.array([np.nansum(part) for part in parts]), np.array([np.isfinite(part).sum() for part in parts])
    means = np.divide(sums, filled, out=np.full(len(parts), np.nan), where=filled > 0)
    return means.reshape(len(importance), n_bins) / np.nanmean(np.concatenate(finite))


def importance_heatmap(scoring_folder: Path, n_bins: int = 100) -> Figure:
    """Draw importance by layer, a panel per criterion: neurons sorted within their layer, relative to the model's mean.

    `scoring_folder` is a scoring artifact. Colour is on a log scale common to all panels.
    """
    facts, importance = scores(scoring_folder)
    if not importance:
        return message("This scoring artifact holds no criterion: nothing to draw.")
    binned = {name: importance_bins(values, n_bins) for name, values in importance.items()}
    positive = np.concatenate([values[values > 0].ravel() for values in binned.values()])
    if not positive.size:
        return message("No importance is positive: a log scale has nothing to show.")
    names = Legend(specs(facts))
    low, high = np.quantile(positive, [0.005, 0.995])
    # A flat importance has no range, and a log scale needs one.
    norm = LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)
    across = min(5, len(binned))
    down = -(-len(binned) // across)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(down, across, figsize=(WIDTH, 0.9 + 2.1 * down), sharex=True, sharey=True, squeeze=False)
        for ax, (name, values) in zip(axes.flat, binned.items(), strict=False):
            layers = values.shape[0]
            image = ax.imshow(
                np.ma.masked_invalid(values),
                aspect="auto",
                norm=norm,
                cmap="cividis",
                interpolation="nearest",
                extent=(0, 100, layers - 0.5, -0.5),
            )
            ax.set_title(textwrap.fill(names.label(name), 17), fontsize=8.5)
            ax.set_xticks((0, 50, 100))
            ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=7))
        for ax in axes.flat[len(binned) :]:
            ax.set_axis_off()
        for column in range(across):
            lowest = max(row for row in range(down) if row * across + column < len(binned))
            axes[lowest, column].tick_params(labelbottom=True)
        fig.supxlabel("neurons of the layer, % (most important first)", fontsize=9)
        fig.supylabel("layer", fontsize=9)
        bar = fig.colorbar(image, ax=axes, shrink=0.85, extend="both", pad=0.02)
        bar.set_label("importance / mean of the model")
        seed = "" if facts["seed"] is None else f", seed {facts['seed']}"
        fig.suptitle(f"{facts['model']}{seed}: importance of MLP neurons", fontsize=10)
    name = names.reference(binned) if names.reference(binned) in binned else next(iter(binned))
    means = [float(np.mean(row[np.isfinite(row)])) for row in importance[name]]
    high, low = int(np.argmax(means)), int(np.argmin(means))
    return closed(
        fig,
        f"{names.label(name)} gives a neuron of layer {high} {means[high] / means[low]:.3g} times the importance of one of layer "
        f"{low} on average, the extremes; uniform widths cut both layers at the same place.",
    )


def rank_agreement(scoring_folders: Iterable[Path]) -> pd.DataFrame:
    """Return the Spearman rank correlation of each pair of criteria by model, seed and layer."""
    rows = []
    for facts, importance in sorted(map(scores, scoring_folders), key=lambda pair: (pair[0]["model"], pair[0]["seed"])):
        for a, b in itertools.combinations(importance, 2):
            for layer, (left, right) in enumerate(zip(importance[a], importance[b], strict=True)):
                rho = stats.spearmanr(left, right).statistic
                rows.append([facts["model"], facts["seed"], layer, a, b, rho])
    return pd.DataFrame(rows, columns=AGREEMENT)


def rank_agreement_figure(agreement: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw the Spearman correlation of the pairs that `legend` compares by layer, mean and range over seeds."""
    rows = agreement[agreement["model"] == model].set_index(["a", "b"])
    rows = rows[rows.index.isin(legend.pairs({name for pair in rows.index for name in pair}))]
    if rows.empty:
        return message("Fewer than two criteria were scored: no rank correlation to draw.")
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, 3.6 + 0.09 * rows.index.nunique()))
        for (a, b), part in rows.groupby(["a", "b"], sort=False):
            look = legend.pair_look(a, b) | {"label": f"{legend.label(a)} / {legend.label(b)}", "markersize": 4}
            seaborn.lineplot(part, x="layer", y="spearman", errorbar=("pi", 100), ax=ax, legend=False, mec="none", **look)
        ax.set(xlabel="layer", ylabel="Spearman rank correlation\n(1: same order of neurons)")
        ax.set_ylim(top=1.01)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        ax.set_title(f"{model}: agreement of criteria on the order of neurons\n({_seeds(rows)})")
        fig.legend(loc="outside lower center", ncols=2)
    means = rows.groupby(["a", "b", "layer"], sort=False)["spearman"].mean()
    if means.isna().all():
        return closed(fig)
    a, b, layer = means.idxmin()
    return closed(
        fig,
        f"Least alike are the orders of {legend.label(a)} and {legend.label(b)} in layer {layer}, with a rank correlation of "
        f"{means.min():.2f}; the median of all pairs and layers is {means.median():.2f}.",
    )


def _seeds(rows: pd.DataFrame) -> str:
    count = rows["seed"].nunique(dropna=False)
    return "one seed" if count == 1 else f"mean and range of {count} seeds"


def overlap_map(scoring_folders: Iterable[Path], ratios: dict[str, float]) -> pd.DataFrame:
    """Return the Jaccard overlap of the sets that two criteria keep with uniform widths, the mean over layers and seeds.

    ratios : model -> fraction of its neurons that goes. One row per model and ordered pair (model, a, b, jaccard, n); a pair of
    equal names holds the overlap of two calibration seeds, and is missing where there is one seed.
    """
    kept_by: dict = {}
    for facts, importance in map(scores, scoring_folders):
        for name, rows in importance.items():
            if facts["model"] in ratios:
                kept_by.setdefault((facts["model"], name), {})[facts["seed"]] = kept_sets(rows, ratios[facts["model"]])
    found_rows: list[list] = []
    for (model, a), (other, b) in itertools.product(kept_by, repeat=2):
        if model != other:
            continue
        left, right = kept_by[model, a], kept_by[model, b]
        seeds = itertools.combinations(left, 2) if a == b else ((seed, seed) for seed in left if seed in right)
        found = [np.mean(list(map(jaccard, left[one], right[two]))) for one, two in seeds]
        if found:
            found_rows.append([model, a, b, np.mean(found), len(found)])
    return pd.DataFrame(found_rows, columns=["model", "a", "b", "jaccard", "n"])


def overlap_map_figure(overlaps: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw `overlap_map` as a heat map, criteria that keep similar neurons beside each other (average linkage)."""
    square = overlaps[overlaps["model"] == model].pivot(index="a", columns="b", values="jaccard")
    if len(square) < 2:
        return message("Fewer than two criteria were scored: no overlap to draw.")
    distances = 1 - square.where(~np.eye(len(square), dtype=bool), 1).to_numpy()
    order = hierarchy.leaves_list(hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=True))
    square = square.iloc[order, order]
    words = list(map(legend.label if len(square) <= CROWD else legend.short, square))
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, WIDTH - 0.9))
        seaborn.heatmap(
            square, ax=ax, cmap="cividis", xticklabels=words, yticklabels=words,
            annot=len(square) <= 12, fmt=".2f", annot_kws={"size": 7}, square=True, robust=True,
            cbar_kws={"label": "Jaccard overlap of kept neurons", "shrink": 0.7},
        )  # fmt: skip
        ax.set(xlabel="", ylabel="", title=f"{model}: which criteria keep the same neurons\n(diagonal: two calibration seeds)")
        ax.tick_params(length=0)
        ax.tick_params(axis="y", rotation=0)
        plt.setp(ax.get_xticklabels(), rotation=60 if len(square) > 12 else 40, ha="right", rotation_mode="anchor")
        if len(square) > 12:
            ax.tick_params(labelsize=7)
    names = legend.compared(overlaps["a"])
    apart = square.where(~np.eye(len(square), dtype=bool)).filter(names, axis=0).filter(names).stack()
    if apart.empty:
        return closed(fig)
    like, unlike = (" and ".join(map(legend.label, pair)) for pair in (apart.idxmax(), apart.idxmin()))
    seeds = np.diag(square)
    floor = f"; two seeds of one criterion overlap {np.nanmedian(seeds):.2f} in the median" if np.isfinite(seeds).any() else ""
    return closed(fig, f"Most alike are {like} ({apart.max():.2f}), least {unlike} ({apart.min():.2f}){floor}.")


def kept_pairs(pruning_folders: Iterable[Path], legend: Legend) -> pd.DataFrame:
    """Return the Jaccard overlap of pairs of kept sets by model, ratio and layer; `seeds` is the pair of their seeds.

    Comparisons: two criteria that `legend` compares, with the same seed ("One-hot CE / Entropy (HFPrune)"), one criterion with
    two seeds ("Entropy (HFPrune), two seeds"), and "chance", the exact expectation for two random sets of these sizes.
    """
    points: dict[tuple, list] = {}
    for facts, folder in prunings(pruning_folders):
        if split_of(facts) != "none":  # such models keep other numbers of neurons
            continue
        # Model and ratio must agree; otherwise a pair would compare sets of different sizes.
        ratio = round(float(facts["ratio"] if facts["ratio"] is not None else facts["achieved_ratio"]), 4)
        name, seed = series(facts["criterion"], way_of(facts)), facts["seed"]
        points.setdefault((facts["model"], ratio), []).append(
            (legend.order(name), -1 if seed is None else seed, name, facts, kept(folder))
        )
    rows = []
    for (model, ratio), group in sorted(points.items()):
        asked = legend.pairs({name for _, _, name, _, _ in group})
        for (_, _, a, facts, kept_a), (_, _, b, other, kept_b) in itertools.combinations(sorted(group, key=lambda p: p[:3]), 2):
            seeds = facts["seed"], other["seed"]
            if a == b and seeds[0] != seeds[1] and legend.compared([a]):
                comparison = f"{legend.label(a)}, two seeds"
            elif (a, b) in asked and seeds[0] == seeds[1]:
                comparison = f"{legend.label(a)} / {legend.label(b)}"
            else:
                continue
            for layer, (left, right) in enumerate(zip(kept_a, kept_b, strict=True)):
                rows.append([model, ratio, layer, comparison, a, b, seeds, jaccard(left, right)])
                width = facts["width_before"]
                width = width[layer] if isinstance(width, list) else width
                rows.append([model, ratio, layer, CHANCE, "", "", seeds, chance_jaccard(len(left), len(right), width)])
    return pd.DataFrame(rows, columns=PAIRS)


def kept_overlap(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the Jaccard overlap of `kept_pairs` by model, ratio and layer, the mean of all pairs of one `comparison`."""
    grouped = pairs.groupby(OVERLAP[:-2], sort=False)["jaccard"]
    return grouped.agg(jaccard="mean", n_pairs="size").reset_index()


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return the size of the intersection of two index sets over the size of their union."""
    shared = len(np.intersect1d(left, right))
    union = len(left) + len(right) - shared
    return shared / union if union else 1.0


def chance_jaccard(n_left: int, n_right: int, width: int) -> float:
    """Return the expected Jaccard overlap of two independent random sets of these sizes out of `width` neurons."""
    shared = np.arange(max(0, n_left + n_right - width), min(n_left, n_right) + 1)
    probability = stats.hypergeom.pmf(shared, width, n_left, n_right)
    union = n_left + n_right - shared
    return float(np.sum(probability * np.divide(shared, union, out=np.ones(len(shared)), where=union > 0)))


def kept_overlap_figure(overlap: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw the overlap of kept sets by layer, a panel per ratio (`kept_overlap`).

    References: one criterion with two seeds (thin grey lines) and the overlap that chance alone would give.
    """
    rows = overlap[overlap["model"] == model]
    if rows.empty:
        return message("Fewer than two prunings at the same ratio and seed: no kept sets to compare.")
    ratios = sorted(rows["ratio"].unique())
    between, within = rows[rows["a"] != rows["b"]], rows[(rows["a"] == rows["b"]) & (rows["a"] != "")]
    looks = {
        name: legend.pair_look(a, b) | {"markersize": 3.5}
        for name, a, b in between[["comparison", "a", "b"]].drop_duplicates().itertuples(index=False)
    }
    for index, name in enumerate(within["comparison"].unique()):
        looks[name] = {"color": GREYS[index % 3], "linestyle": (0, DASHES[index % 2]), "linewidth": 1}
    looks[CHANCE] = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 1.2}
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(ratios), figsize=(WIDTH, 3.6), sharey=True, squeeze=False)
        for ax, ratio in zip(axes.flat, ratios, strict=True):
            part = rows[rows["ratio"] == ratio]
            for name, look in looks.items():
                line = part[part["comparison"] == name]
                if len(line):
                    text = "expected by chance" if name == CHANCE else name
                    ax.plot(line["layer"], line["jaccard"], label=text, **look)
            ax.set(title=f"{percent(ratio)} removed", xlabel="layer")
            ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("Jaccard overlap of kept neurons\n(1: same neurons)")
        axes[0, 0].set_ylim(top=1.01)
        handles = handles_of(axes)
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
        fig.suptitle(f"{model}: which neurons are kept", fontsize=10)
    return closed(fig, _overlap_caption(between, within))


def _overlap_caption(between: pd.DataFrame, within: pd.DataFrame) -> str:
    if between.empty:
        return ""
    least = between.loc[between["jaccard"].idxmin()]
    here = within[(within["ratio"] == least["ratio"]) & (within["layer"] == least["layer"])]["jaccard"]
    seeds = f", where two seeds of one criterion overlap {_range(here)}" if len(here) else ""
    return (
        f"{least['comparison']} keep the fewest neurons in common in layer {least['layer']} at {percent(least['ratio'])}, "
        f"{least['jaccard']:.2f} of both together{seeds}."
    )


def choice(kept_pairs: pd.DataFrame) -> pd.DataFrame:
    """Return for each model, ratio and pair of criteria how much less they overlap than two seeds of one criterion.

    `kept_pairs` is `kept_pairs`. between : Jaccard of the two criteria with the same seed; within : the mean of
    both criteria's overlap between two seeds; chance; difference : within minus between with its 95 % interval and p-value,
    from the jackknife over seeds, which three or more can give; p_holm : after Holm's correction over the rows of a model.
    """
    rows = []
    for (model, ratio), part in kept_pairs.groupby(["model", "ratio"], sort=False):
        layers = part.groupby(["comparison", "seeds"], sort=False)["jaccard"].mean()
        for pair in [name for name in layers.index.unique(0) if " / " in name]:
            floors = [f"{side}, two seeds" for side in pair.split(" / ")]
            if not set(floors) <= set(layers.index.unique(0)):
                continue
            between, within = layers[pair], layers[floors].groupby(level="seeds", sort=False).mean()
            row = {"model": model, "ratio": ratio, "pair": pair, "between": between.mean(), "within": within.mean()}
            rows.append(row | {"chance": layers[CHANCE].mean()} | _over_seeds(between, within))
    frame = pd.DataFrame(rows, columns=CHOICE)
    frame["p_holm"] = frame.groupby("model")["p"].transform(lambda p: intervals.holm(p)) if rows else []
    return frame


def _over_seeds(between: pd.Series, within: pd.Series) -> dict:
    """Return within minus between, its interval and p-value; both are indexed by their pair of seeds."""
    difference, seeds = within.mean() - between.mean(), {seed for pair in between.index for seed in pair}
    found = {"difference": difference, "low": np.nan, "high": np.nan, "p": np.nan}
    if len(seeds) < 3:
        return found
    kept = [[side[[seed not in pair for pair in side.index]].mean() for side in (within, between)] for seed in seeds]
    pseudo = [len(seeds) * difference - (len(seeds) - 1) * (without - same) for without, same in kept]
    test = stats.ttest_1samp(pseudo, 0)
    low, high = difference - np.mean(pseudo) + np.array(test.confidence_interval(intervals.LEVEL))
    return found | {"low": low, "high": high, "p": test.pvalue}


def choice_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence on whether the criteria choose different neurons, beyond the noise of calibration."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return f"{model}: two criteria with two seeds each are needed to say whether the criteria choose different neurons."
    told = []
    for pair, part in rows.groupby("pair", sort=False):
        more = ((part["difference"] > 0) & (part["p_holm"] < 1 - intervals.LEVEL)).to_numpy()
        where = "at every ratio" if more.all() else "at " + percents(part.loc[more, "ratio"]) if more.any() else "at no ratio"
        verdict = f"so they differ by more than calibration noise {where}"
        told.append(
            f"{pair} overlap {_range(part['between'])} where two seeds of one criterion overlap {_range(part['within'])}, "
            + (verdict if part["p"].notna().any() else "and two seeds are too few to judge the difference")
        )
    return (
        f"{model}, Jaccard of kept neurons (chance {_range(rows['chance'])}; jackknife over seeds, Holm's correction over "
        f"{len(rows)}): {'; '.join(told)}."
    )


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"
