"""What a picture of one run shows, in one generated sentence: for the notebooks of the stages that make and measure models."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from hfprune_nb.report.results import percent
from hfprune_nb.report.style import Legend


def lengths(documents: pd.Series, seq_len: int) -> str:
    """Return how long the used documents are, in tokens, beside a window of `seq_len`."""
    low, middle, high = documents.quantile([0.1, 0.5, 0.9])
    return (
        f"Half of the {len(documents)} documents are longer than {middle:,.0f} tokens, {middle / seq_len:.1f} windows; one in "
        f"ten is shorter than {low:,.0f} and one in ten longer than {high:,.0f}."
    )


def tokens(cumulative_share: Sequence[float]) -> str:
    """Return how many distinct tokens make up half of a text; the shares are cumulated from the most frequent one."""
    shares = np.asarray(cumulative_share)
    half = int(np.searchsorted(shares, 0.5)) + 1
    first = percent(round(shares[0], 3))
    return f"{half} of {len(shares):,} distinct tokens make up half of the text, the most frequent one {first}."


def layers(importance: Mapping[str, Sequence], legend: Legend) -> str:
    """Return in which layer most of each compared criterion's importance lies; `importance` is (neurons,) by layer."""
    told = []
    for name in legend.compared(importance):
        sums = np.array([float(row.clip(min=0).sum()) for row in importance[name]])
        told.append(f"{legend.label(name)} layer {sums.argmax()} ({percent(round(float(sums.max() / sums.sum()), 3))})")
    return f"Most of its importance has {', '.join(told)}." if told else "Baselines alone were scored."


def losses(curve: pd.DataFrame) -> str:
    """Return the held-out loss before and after tuning; columns split, step and loss (nats)."""
    loss = curve.loc[curve["split"] == "held_out", "loss"]
    steps = curve["step"].max()
    return f"The held-out loss goes from {loss.iloc[0]:.3f} to {loss.iloc[-1]:.3f} nats per response token in {steps} steps."


def spread(perplexity: pd.DataFrame) -> str:
    """Return how much windows differ, by corpus; columns corpus, nll (nats, summed over a window) and tokens."""
    nats = (perplexity["nll"] / perplexity["tokens"]).groupby(perplexity["corpus"], sort=False)
    told = [f"{corpus} {values.mean():.2f} ± {values.std():.2f}" for corpus, values in nats]
    return f"Mean and standard deviation over windows, nats per token: {', '.join(told)}."


def depth(ablations: pd.DataFrame) -> str:
    """Return which single neuron changes most when silenced, beside the median; columns layer, size and kl (nats)."""
    one = ablations[ablations["size"] == 1]
    most = one.loc[one["kl"].idxmax()]
    return (
        f"The single neuron that counts most is in layer {most['layer']:.0f}, with a KL of {most['kl']:.2g} nats; the median of "
        f"{len(one)} is {one['kl'].median():.2g}."
    )
