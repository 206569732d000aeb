"""What the models say next: the likeliest tokens on sample prompts, as in the paper's Figures 3-6."""

import textwrap

import matplotlib as mpl
import pandas as pd
from matplotlib import font_manager, ft2font
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.results import Results, percent
from hfprune_nb.report.style import DENSE, STYLE, WIDTH, closed, message

# Beside the dense model; more are too narrow to be read.
N_CRITERIA = 3


def next_tokens(results: Results, model: str, ratio: float, n_prompts: int = 4, n_tokens: int = 10) -> Figure:
    """Draw the most probable next tokens of the dense and the pruned models on sample prompts (paper's Figures 3-6).

    A row per prompt, a column for each of the first three criteria, baselines last, at `ratio`, first seed. Full bars and black
    names are tokens that are also among the dense model's.
    """
    rows = results.next_tokens
    rows = rows[(rows["model"] == model) & (rows["ratio"] == ratio) & (rows["criterion"] != DENSE)]
    if rows.empty:
        return message(f"No next-token distributions of {model} at {percent(ratio)}: nothing to draw.")
    found = results.legend.in_order(rows["criterion"])
    criteria = sorted(found, key=lambda name: name not in results.legend.compared(found))[:N_CRITERIA]
    rows = rows[rows["seed"] == rows.groupby("criterion")["seed"].transform("min")]
    prompts = rows.drop_duplicates("prompt_id").sort_values("prompt_id").head(n_prompts)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            len(prompts),
            1 + len(criteria),
            squeeze=False,
            layout="constrained",
            figsize=(WIDTH, 0.6 + (0.6 + 0.13 * n_tokens) * len(prompts)),
        )
        shares: dict = {}
        for line, prompt_id, prompt in zip(axes, prompts["prompt_id"], prompts["prompt"], strict=True):
            here = rows[rows["prompt_id"] == prompt_id]
            dense = here[(here["source"] == "dense") & (here["criterion"] == criteria[0])].nsmallest(n_tokens, "rank")
            known = set(dense["token"])
            highest = here["probability"].max()
            for ax, name in zip(line, [DENSE, *criteria], strict=True):
                own = here[(here["criterion"] == name) & (here["source"] == "this")].nsmallest(n_tokens, "rank")
                shown_tokens = dense if name == DENSE else own
                _token_bars(ax, shown_tokens, name, results.legend.colour(name), known, highest)
                shares.setdefault(name, []).append(len(known & set(shown_tokens["token"])))
            line[0].set_ylabel(_wrapped(prompt), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
        for ax, name in zip(axes[0], [DENSE, *criteria], strict=True):
            ax.set_title(f"{results.legend.label(name)}\n{ax.get_title()}", fontsize=9)
        fig.supxlabel("probability (hatched, grey: not among the dense model's)", fontsize=9)
        fig.suptitle(f"{model}: next tokens, {percent(ratio)} of parameters removed", fontsize=10)
    means = ", ".join(f"{results.legend.label(name)} {sum(shares[name]) / len(prompts):.1f}" for name in criteria)
    return closed(fig, f"Of the dense model's {n_tokens} likeliest tokens there are still, on average over {len(prompts)} "
                  f"prompts: {means}.")  # fmt: skip


def _token_bars(ax, tokens: pd.DataFrame, name: str, colour: str, known: set[str], highest: float) -> None:
    shared = tokens["token"].isin(known).to_numpy()
    bars = ax.barh(range(len(tokens)), tokens["probability"], edgecolor=colour, linewidth=0.8)
    ax.set_yticks(range(len(tokens)), [shown(token) for token in tokens["token"]], parse_math=False, fontsize=7)
    for bar, text, full in zip(bars, ax.get_yticklabels(), shared, strict=True):
        bar.set_facecolor(colour if full else "white")
        bar.set_hatch("" if full else "////")
        text.set_color("black" if full else "#8A8A8A")
    ax.set(xlim=(0, highest * 1.05), ylim=(len(tokens) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(2))
    ax.tick_params(axis="x", labelsize=7.5)
    if name != DENSE:
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
    return "\n".join(textwrap.wrap(textwrap.shorten(prompt, 110, placeholder=" …"), 15))
