"""The study's figures: one function each, tidy frames in, a matplotlib Figure out; no model runs here."""

import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager, ft2font
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hfprune_nb.errors import UserError
from hfprune_nb.report import neurons
from hfprune_nb.report.measurements import CRITERIA, LOWER_IS_BETTER, MEASURES, Results, in_order, label, percent
from hfprune_nb.report.tables import measure_label

# Okabe and Ito's palette, told apart with any colour vision; markers and dashes tell the lines apart in grey print.
COLOURS = {
    "dense": "#000000",
    "one_hot_ce": "#E69F00",
    "self_distillation": "#009E73",
    "entropy": "#0072B2",
    "magnitude": "#CC79A7",
    "random": "#7F7F7F",
}
MARKERS = {"one_hot_ce": "s", "self_distillation": "^", "entropy": "o", "magnitude": "D", "random": "X"}
DASHES = {
    "one_hot_ce": (0, (5, 1.5)),
    "self_distillation": (0, (3, 1, 1, 1)),
    "entropy": "solid",
    "magnitude": (0, (1, 1)),
    "random": (0, (1, 2.5)),
}
OTHER_COLOUR, OTHER_MARKER = "#56B4E9", "v"
PAIR_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PAIR_DASHES = ("solid", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (2, 2)))
PAIR_MARKERS = "os^Dv*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "hfprune_nb",
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}
DOTS_PER_INCH = 180
AXIS_LABELS = {
    "task": "accuracy, % (higher is better)",
    "average": "average of tasks, % (higher is better)",
    "perplexity": "perplexity, log scale (lower is better)",
    "js": "JS distance to dense (lower is better)",
    "kl": "KL to dense, nats (lower is better)",
    "jaccard15": "top-15 Jaccard with dense (higher is better)",
    "top1": "top-1 agreement with dense, % (higher is better)",
}


def colour(criterion: str) -> str:
    """Return the one colour that a criterion has in every figure."""
    return COLOURS.get(criterion, OTHER_COLOUR)


def per_model(name: str, models: Iterable[str], draw: Callable[[str], Figure]) -> dict[str, Figure]:
    """Return `draw(model)` for each model by file name: `name`, or `name-<model>` where there are several models.

    Without any model the one figure says that nothing was computed.
    """
    models = list(models)
    if not models:
        return {name: message(f"{name.replace('_', ' ')}: this study computed nothing of this kind.")}
    if len(models) == 1:
        return {name: draw(models[0])}
    return {f"{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}": draw(model) for model in models}


def forest(paired: pd.DataFrame, model: str) -> Figure:
    """Draw paired differences between criteria with 95 % intervals, a panel per measure (`tables.paired_table().long`).

    Filled markers: the interval excludes zero, also after Holm's correction; hollow ones: it does not. The side where
    the first criterion of a pair is better is written below each panel.
    """
    rows = paired[(paired["model"] == model) & paired["low"].notna()]
    if rows.empty:
        return message("No two criteria were evaluated on the same seeds and items: no paired difference to draw.")
    names, ratios = list(rows["column"].unique()), sorted(rows["ratio"].unique())
    pairs = list(dict.fromkeys(zip(rows["a"], rows["b"], strict=True)))
    across = min(4 if len(names) > 6 else 3, len(names))
    down = -(-len(names) // across)
    height = 0.9 + 0.2 * (len(pairs) + 0.8) * len(ratios)
    with mpl.rc_context(STYLE):
        size = (0.9 + 2.7 * across, 0.6 + down * height)
        fig, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
        for ax, name in zip(axes.flat, names, strict=False):
            _forest_panel(ax, rows[rows["column"] == name], pairs, ratios)
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        handles = [_pair_handle(index, f"{label(a)} − {label(b)}") for index, (a, b) in enumerate(pairs)]
        fig.legend(handles=handles, loc="outside lower center", ncols=min(across, 3))
        title = "paired differences, 95 % intervals (filled: zero excluded, also after Holm)"
        fig.suptitle(f"{model}: {title}" if across > 1 else f"{model}\n{title}", fontsize=10)
    return closed(fig)


def _pair_handle(index: int, text: str):
    style = {"color": PAIR_COLOURS[index % 6], "marker": PAIR_MARKERS[index % 6], "linestyle": "none"}
    return mpl.lines.Line2D([], [], label=text, **style)


def _forest_panel(ax, rows: pd.DataFrame, pairs: list, ratios: list) -> None:
    step = len(pairs) + 0.8
    for row in rows.to_dict("records"):
        index = pairs.index((row["a"], row["b"]))
        height = ratios.index(row["ratio"]) * step + index
        certain = row["verdict"].endswith(" better")
        ax.errorbar(
            row["mean"],
            height,
            xerr=[[row["mean"] - row["low"]], [row["high"] - row["mean"]]],
            fmt=PAIR_MARKERS[index % 6],
            color=PAIR_COLOURS[index % 6],
            markerfacecolor=PAIR_COLOURS[index % 6] if certain else "white",
            elinewidth=1.3,
            capsize=2.5,
        )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks([i * step + (len(pairs) - 1) / 2 for i in range(len(ratios))], [percent(ratio) for ratio in ratios])
    ax.set_ylim(len(ratios) * step - 0.9, -0.9)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    for i in range(1, len(ratios)):
        ax.axhline(i * step - 0.9, color="#BBBBBB", linewidth=0.6)
    first = rows.iloc[0]
    side = "left" if first["measure"] in LOWER_IS_BETTER else "right"
    ax.set_xlabel(f"difference ({side}: first is better)")
    ax.set_title(measure_label(first["column"], first["measure"]).replace(", ", "\n"))
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel("parameters removed")


def importance_heatmap(scoring_folder: Path, n_bins: int = 100) -> Figure:
    """Draw importance by layer, a panel per criterion: neurons sorted within their layer, relative to the model's mean.

    `scoring_folder` is a scoring artifact. Colour is on a log scale common to all panels.
    """
    facts, importance = neurons.scores(scoring_folder)
    if not importance:
        return message("This scoring artifact holds no criterion: nothing to draw.")
    binned = {name: neurons.importance_bins(values, n_bins) for name, values in importance.items()}
    positive = np.concatenate([values[values > 0].ravel() for values in binned.values()])
    if not positive.size:
        return message("No importance is positive: a log scale has nothing to show.")
    low, high = np.quantile(positive, [0.005, 0.995])
    # A flat importance has no range, and a log scale needs one.
    norm = LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)
    across = min(5, len(binned))
    down = -(-len(binned) // across)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            down, across, figsize=(1.5 + 1.9 * across, 0.9 + 2.5 * down), sharex=True, sharey=True, squeeze=False
        )
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
            ax.set_title(label(name))
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
    return closed(fig)


def rank_agreement(agreement: pd.DataFrame, model: str, criteria: Iterable[str] = CRITERIA) -> Figure:
    """Draw the Spearman correlation between criteria by layer, mean and range over seeds (`neurons.rank_agreement`)."""
    criteria = list(criteria)
    rows = agreement[(agreement["model"] == model) & agreement["a"].isin(criteria) & agreement["b"].isin(criteria)]
    if rows.empty:
        return message("Fewer than two criteria were scored: no rank correlation to draw.")
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 4))
        for index, ((a, b), part) in enumerate(rows.groupby(["a", "b"], sort=False)):
            by_layer = part.groupby("layer")["spearman"].agg(["mean", "min", "max"])
            style = {"color": PAIR_COLOURS[index % 6], "linestyle": PAIR_DASHES[index % 6]}
            marker = PAIR_MARKERS[index % 6]
            text = f"{label(a)} / {label(b)}"
            ax.plot(by_layer.index, by_layer["mean"], label=text, marker=marker, markersize=3.5, **style)
            band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
            ax.fill_between(by_layer.index, by_layer["min"], by_layer["max"], **band)
        ax.set(xlabel="layer", ylabel="Spearman rank correlation\n(1: same order of neurons)")
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1.02)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        ax.set_title(f"{model}: agreement of criteria on the order of neurons\n({_seeds(rows)})")
        fig.legend(loc="outside lower center", ncols=2)
    return closed(fig)


def _seeds(rows: pd.DataFrame) -> str:
    count = rows["seed"].nunique(dropna=False)
    return "one seed" if count == 1 else f"mean and range of {count} seeds"


def kept_overlap(overlap: pd.DataFrame, model: str) -> Figure:
    """Draw the overlap of kept sets by layer, a panel per ratio (`neurons.kept_overlap`).

    References: one criterion with two seeds (thin grey-scale lines) and the overlap that chance alone would give.
    """
    rows = overlap[overlap["model"] == model]
    if rows.empty:
        return message("Fewer than two prunings at the same ratio and seed: no kept sets to compare.")
    ratios = sorted(rows["ratio"].unique())
    names = list(dict.fromkeys(rows["comparison"]))
    between = [name for name in names if " / " in name]
    within = [name for name in names if name.endswith("two seeds")]
    with mpl.rc_context(STYLE):
        width = 1 + 3.1 * len(ratios)
        fig, axes = plt.subplots(1, len(ratios), figsize=(max(5, width), 4), sharey=True, squeeze=False)
        for ax, ratio in zip(axes.flat, ratios, strict=True):
            part = rows[rows["ratio"] == ratio]
            for name in [*between, *within, neurons.CHANCE]:
                line = part[part["comparison"] == name]
                if len(line):
                    text = "expected by chance" if name == neurons.CHANCE else name
                    ax.plot(line["layer"], line["jaccard"], label=text, **_overlap_style(name, between, within))
            ax.set(title=f"{percent(ratio)} of parameters removed", xlabel="layer")
            ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("Jaccard overlap of kept neurons\n(1: same neurons)")
        axes[0, 0].set_ylim(top=1.01)
        handles = _handles(axes)
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if width < 8 else 3)
        fig.suptitle(f"{model}: which neurons are kept", fontsize=10)
    return closed(fig)


def _handles(axes) -> dict:
    """Return one legend handle per label of all panels."""
    return {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}


def _overlap_style(name: str, between: list[str], within: list[str]) -> dict:
    if name == neurons.CHANCE:
        return {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 1.2}
    if name in within:
        index = within.index(name)
        grey = ("#444444", "#808080", "#AAAAAA")[index % 3]
        return {"color": grey, "linestyle": PAIR_DASHES[index % 6], "linewidth": 1.1}
    index = between.index(name)
    return {"color": PAIR_COLOURS[index % 6], "marker": PAIR_MARKERS[index % 6], "markersize": 3.5}


def next_tokens(results: Results, model: str, ratio: float, n_prompts: int = 4, n_tokens: int = 10) -> Figure:
    """Draw the most probable next tokens of the dense and the pruned models on sample prompts (paper's Figures 3-6).

    A row per prompt, a column per criterion at `ratio`, first seed. Full bars and black names are tokens that are also
    among the dense model's.
    """
    rows = results.next_tokens
    rows = rows[(rows["model"] == model) & (rows["ratio"] == ratio) & (rows["criterion"] != "dense")]
    if rows.empty:
        return message(f"No next-token distributions of {model} at {percent(ratio)}: nothing to draw.")
    criteria = in_order(rows["criterion"])
    rows = rows[rows["seed"] == rows.groupby("criterion")["seed"].transform("min")]
    prompts = rows.drop_duplicates("prompt_id").sort_values("prompt_id").head(n_prompts)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            len(prompts),
            1 + len(criteria),
            squeeze=False,
            layout="constrained",
            figsize=(0.6 + 1.95 * (1 + len(criteria)), 0.5 + (0.75 + 0.15 * n_tokens) * len(prompts)),
        )
        for line, prompt_id, prompt in zip(axes, prompts["prompt_id"], prompts["prompt"], strict=True):
            here = rows[rows["prompt_id"] == prompt_id]
            dense = here[(here["source"] == "dense") & (here["criterion"] == criteria[0])].nsmallest(n_tokens, "rank")
            known = set(dense["token"])
            highest = here["probability"].max()
            for ax, name in zip(line, ["dense", *criteria], strict=True):
                own = here[(here["criterion"] == name) & (here["source"] == "this")].nsmallest(n_tokens, "rank")
                _token_bars(ax, dense if name == "dense" else own, name, known, highest)
            line[0].set_ylabel(_wrapped(prompt), rotation=0, ha="right", va="center", fontsize=8.5, parse_math=False)
        for ax, name in zip(axes[0], ["dense", *criteria], strict=True):
            ax.set_title(f"{label(name)}\n{ax.get_title()}", fontsize=9)
        fig.supxlabel("probability of the next token (hatched bar, grey name: not among the dense model's)", fontsize=9)
        fig.suptitle(f"{model}: next tokens, {percent(ratio)} of parameters removed", fontsize=10)
    return closed(fig)


def _token_bars(ax, tokens: pd.DataFrame, name: str, known: set[str], highest: float) -> None:
    shared = tokens["token"].isin(known).to_numpy()
    bars = ax.barh(range(len(tokens)), tokens["probability"], edgecolor=colour(name), linewidth=0.8)
    ax.set_yticks(range(len(tokens)), [shown(token) for token in tokens["token"]], parse_math=False, fontsize=7.5)
    for bar, text, full in zip(bars, ax.get_yticklabels(), shared, strict=True):
        bar.set_facecolor(colour(name) if full else "white")
        bar.set_hatch("" if full else "////")
        text.set_color("black" if full else "#8A8A8A")
    ax.set(xlim=(0, highest * 1.05), ylim=(len(tokens) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    ax.tick_params(axis="x", labelsize=7.5)
    if name != "dense":
        ax.set_title(f"{shared.sum()} of {len(tokens)} shared", fontsize=8)


def shown(token: str, longest: int = 12) -> str:
    """Return a token as it can be printed: white space made visible, letters that the font lacks as code points."""
    text = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    glyphs = _glyphs()
    text = "".join(letter if ord(letter) in glyphs else f"U+{ord(letter):04X}" for letter in text) or "(empty)"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _glyphs() -> dict:
    return ft2font.FT2Font(font_manager.findfont(STYLE["font.family"])).get_charmap()


def _wrapped(prompt: str) -> str:
    return "\n".join(textwrap.wrap(textwrap.shorten(prompt, 110, placeholder=" …"), 22))


def against_ratio(criterion: pd.DataFrame, model: str) -> Figure:
    """Draw the average of tasks, perplexity (log axis) and JS against the ratio, a line and band per criterion.

    `criterion` is `tables.criterion_table(...).long`; the dense model is a horizontal line.
    """
    cells = criterion[(criterion["model"] == model) & criterion["mean"].notna()]
    names = [
        name
        for measure in ("average", "perplexity", "js")
        for name in cells.loc[(cells["measure"] == measure) & (cells["criterion"] != "dense"), "column"].unique()
        if name != "average_without_crows"
    ]
    if not names:
        return message(f"No pruned model of {model} was evaluated: nothing to draw against the ratio.")
    across = min(3, len(names))
    down = -(-len(names) // across)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(down, across, figsize=(0.6 + 3.3 * across, 0.9 + 2.8 * down), squeeze=False)
        for ax, name in zip(axes.flat, names, strict=False):
            _ratio_panel(ax, cells[cells["column"] == name])
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        handles = _handles(axes)
        order = [label(name) for name in in_order(cells["criterion"]) if label(name) in handles]
        fig.legend([handles[text] for text in order], order, loc="outside lower center", ncols=min(6, 2 * across))
        fig.suptitle(f"{model}: what is left after pruning, 95 % intervals", fontsize=10)
    return closed(fig)


def _ratio_panel(ax, cells: pd.DataFrame) -> None:
    measure, name = cells["measure"].iloc[0], cells["column"].iloc[0]
    for dense in cells[(cells["criterion"] == "dense") & (measure != "js")].to_dict("records"):
        ax.axhline(dense["mean"], color=colour("dense"), linewidth=1, label=label("dense"))
        ax.axhspan(dense["low"], dense["high"], color=colour("dense"), alpha=0.08, linewidth=0)
    for criterion in in_order(cells.loc[cells["criterion"] != "dense", "criterion"]):
        line = cells[cells["criterion"] == criterion].sort_values("ratio")
        ax.plot(
            100 * line["ratio"],
            line["mean"],
            color=colour(criterion),
            label=label(criterion),
            marker=MARKERS.get(criterion, OTHER_MARKER),
            linestyle=DASHES.get(criterion, "solid"),
        )
        band = {"color": colour(criterion), "alpha": 0.15, "linewidth": 0}
        ax.fill_between(100 * line["ratio"], line["low"], line["high"], **band)
    if measure == "perplexity":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value >= 1e5 else f"{value:,.4g}")
        ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    ax.set_xticks(sorted(100 * cells.loc[cells["criterion"] != "dense", "ratio"].unique()))
    corpus = name.partition(":")[2]
    ax.set(title=f"{MEASURES[measure]}, {corpus}" if corpus else MEASURES[measure])
    ax.set(xlabel="parameters removed, %", ylabel=AXIS_LABELS[measure])


def message(sentence: str) -> Figure:
    """Return an empty figure that says why there is nothing to see."""
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 1.2))
        ax.set_axis_off()
        ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True)
    return closed(fig)


def closed(fig: Figure) -> Figure:
    """Return a figure that pyplot has let go of."""
    # A figure that pyplot still holds would be shown twice by a notebook and kept in memory.
    plt.close(fig)
    return fig


def save(fig: Figure, folder: Path, name: str, data: pd.DataFrame | None = None) -> list[Path]:
    """Write `<name>.png`, `<name>.svg` and, given the data behind it, `<name>.csv`; equal figures give equal bytes."""
    folder = Path(folder)
    if not name or Path(name).name != name:
        raise UserError(f"figure name {name!r} is not a plain file name: use letters, digits, '-' and '_'")
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        fig.savefig(written[0], dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
        fig.savefig(written[1], bbox_inches="tight", metadata={"Date": None})
    if data is not None:
        written.append(folder / f"{name}.csv")
        data.to_csv(written[-1], index=False)
    return written
