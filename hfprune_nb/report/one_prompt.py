"""What models make of one prompt: next tokens side by side, KL over the text, which neurons go. HTML that needs no script."""

from html import escape

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hfprune_nb.report.neurons import jaccard
from hfprune_nb.report.next_tokens import shown
from hfprune_nb.report.style import DENSE, STYLE, Legend, closed, message

# The scale of the strip is the same for every prompt and ratio, so that its colours mean the same while a slider moves.
DARKEST = 4.0  # nats
STEPS = (0.0, 0.1, 0.5, 1.0, 2.0, DARKEST)
_STRIP = "line-height:2.1;margin:2px 0 10px 0;white-space:pre-wrap;overflow-wrap:anywhere"
_TOKEN = "padding:3px 0;border-radius:3px;color:{text};background:{colour}"
_BAR = "flex:none;height:0.8em;margin-right:4px;box-sizing:border-box;border:1px solid {colour};background:{fill};width:{width}px"
_NAME = "flex:none;width:7.5em;overflow:hidden;white-space:nowrap;font-family:monospace;opacity:{opacity}"


def summary(positions: pd.DataFrame, neurons_gone: dict[str, float], legend: Legend) -> pd.DataFrame:
    """Return a row for each model: perplexity of the prompt, mean KL to the dense model, agreement on the likeliest token.

    positions : `Answer.positions`; neurons_gone : criterion -> fraction of the MLP neurons removed.
    """
    by_name = positions.groupby("name", sort=False)
    table = pd.DataFrame(
        {
            "perplexity of the prompt": np.exp(by_name["nll"].mean()),
            "KL to dense, nats": by_name["kl"].mean(),
            "same likeliest token, %": 100 * by_name["top1"].mean(),
            "neurons removed, %": [100 * neurons_gone.get(name, 0.0) for name in by_name.groups],
        }
    )
    return table.rename(index=legend.label).rename_axis(index="model")


def next_tokens_html(rows: pd.DataFrame, legend: Legend) -> str:
    """Return the likeliest next tokens of each model side by side: name, rank, token, probability.

    Full bars are tokens that are also among the dense model's, as in `next_tokens.next_tokens`.
    """
    known, highest = set(rows.loc[rows["name"] == DENSE, "token"]), rows["probability"].max()
    columns = []
    for name, part in rows.groupby("name", sort=False):
        lines = []
        for token, probability in zip(part["token"], part["probability"], strict=True):
            shared, colour = token in known, legend.colour(name)
            bar = _BAR.format(
                colour=colour, fill=colour if shared else "transparent", width=round(1 + 90 * probability / highest)
            )
            lines.append(
                f'<div style="display:flex;align-items:center"><span style="{_NAME.format(opacity=1 if shared else 0.55)}" '
                f'title="{escape(repr(token))}">{escape(shown(token))}</span><span style="{bar}"></span>'
                f"<span>{probability:.3f}</span></div>"
            )
        title = f"<b>{escape(legend.label(name))}</b>"
        columns.append(f'<div style="margin:0 18px 8px 0">{title}{"".join(lines)}</div>')
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(columns)}</div>'


def strip_html(positions: pd.DataFrame, written: dict[str, str], legend: Legend) -> str:
    """Return the prompt once for each pruned model, each token coloured by the KL of the next token's distribution behind it.

    positions, written : as in `Answer`. What a model goes on to write follows in italics; a token's title says what both models
    think comes next.
    """
    dense = positions[positions["name"] == DENSE]
    lines = []
    for name, part in positions.groupby("name", sort=False):
        prompt = escape("".join(dense["token"])) if name == DENSE else _coloured(part, dense)
        own = escape(written[name].replace("\n", "↵"))
        lines.append(f'<div style="{_STRIP}"><b>{escape(legend.label(name))}</b> {prompt}<i>{own}</i></div>')
    scale = "".join(f'<span style="{_token(step)};padding:3px 8px">{step:g}{"+" * (step == DARKEST)}</span>' for step in STEPS)
    return "".join(lines) + f"<div>KL(dense, pruned) of what comes next, nats: {scale}</div>"


def _coloured(part: pd.DataFrame, dense: pd.DataFrame) -> str:
    told = []
    for own, whole in zip(part.itertuples(), dense.itertuples(), strict=True):
        title = (
            f"KL {own.kl:.3f} nats; next: dense {shown(whole.likeliest)} {whole.probability:.2f}, "
            f"pruned {shown(own.likeliest)} {own.probability:.2f}"
        )
        told.append(f'<span style="{_token(own.kl)}" title="{escape(title)}">{escape(own.token)}</span>')
    return "".join(told)


def _token(kl: float) -> str:
    share = min(kl / DARKEST, 1) ** 0.5  # small divergences differ visibly too
    return _TOKEN.format(colour=to_hex(mpl.colormaps["YlOrRd"](0.85 * share)), text="#FFFFFF" if share > 0.8 else "#000000")


def removed_figure(kept: dict[str, list], importance: list[np.ndarray], legend: Legend, n_bins: int = 50) -> Figure:
    """Draw which neurons go in which layer, a panel for each criterion, in the order of the first criterion's importance.

    kept : criterion -> for each layer the indices of the neurons that stay; importance : the first one's, (neurons,) for each
    layer. Each cell is the share removed of 1 / `n_bins` of a layer's neurons.
    """
    if not kept:
        return message("No criterion is chosen: no neuron goes.")
    order, first = [row.argsort(stable=True) for row in importance], next(iter(kept))
    n_bins = min(n_bins, *map(len, importance))
    gone = {name: [np.setdiff1d(np.arange(len(row)), stay) for row, stay in zip(order, rows, strict=True)]
            for name, rows in kept.items()}  # fmt: skip
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(1, len(kept), figsize=(1.6 + 2.3 * len(kept), 2.9), sharey=True, squeeze=False)
        for ax, (name, rows) in zip(axes.flat, gone.items(), strict=True):
            removed = [np.isin(layer, row) for layer, row in zip(order, rows, strict=True)]
            image = [[part.mean() for part in np.array_split(row, n_bins)] for row in removed]
            extent = (0, 100, len(image) - 0.5, -0.5)
            drawn = ax.imshow(image, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=extent)
            overlap = np.mean([jaccard(*pair) for pair in zip(rows, gone[first], strict=True)])
            ax.set_title(legend.label(name) + ("" if name == first else f"\nJaccard {overlap:.2f}"), fontsize=9)
            ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=7))
        fig.supxlabel(f"neurons of the layer, % (least important by {legend.label(first)} first)", fontsize=8.5)
        fig.supylabel("layer", fontsize=9)
        fig.colorbar(drawn, ax=axes, shrink=0.85, pad=0.02).set_label("share removed")
    return closed(fig)
