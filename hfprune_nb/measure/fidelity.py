"""How far a model's next-token distribution is from the dense model's (the paper's Table 7, extended)."""

import numpy as np
import pandas as pd
import torch

TOP = 15
METRICS = ("js", "kl", "jaccard15", "top1")
ENTROPIES = ("entropy_dense", "entropy_model")
SPLITS = ("all", "low_entropy", "high_entropy")


def positions(seq_len: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced positions of a window of `seq_len` tokens, the last one included."""
    count = min(count, seq_len)
    return (np.arange(1, count + 1) * seq_len) // count - 1


def compare(logits: torch.Tensor, dense_logits: torch.Tensor) -> pd.DataFrame:
    """Compare two sets of logits, (positions, vocabulary) float32 or wider, position by position.

    Returns one row per position with columns
    js : Jensen-Shannon distance, the square root of the divergence with base-2 logarithms, 0 (equal) to 1. The paper gives
        neither root nor base.
    kl : divergence KL(dense || model) in nats.
    jaccard15 : Jaccard index of the two sets of 15 likeliest tokens, 0 to 1 (equal).
    top1 : 1 where both have the same likeliest token, else 0.
    entropy_dense, entropy_model : entropy of each distribution in nats.
    """
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(dense_logits, -1)
    p, q = log_p.exp(), log_q.exp()
    log_middle = torch.logaddexp(log_p, log_q).sub_(np.log(2))
    divergence = 0.5 * ((p * (log_p - log_middle)).sum(-1) + (q * (log_q - log_middle)).sum(-1)) / np.log(2)
    top = min(TOP, logits.shape[-1])
    ours, theirs = logits.topk(top, -1).indices, dense_logits.topk(top, -1).indices
    shared = (ours[:, :, None] == theirs[:, None, :]).sum((1, 2)).double()
    return pd.DataFrame(
        {
            "js": divergence.clamp(min=0, max=1).sqrt().double().cpu(),
            "kl": (q * (log_q - log_p)).sum(-1).clamp(min=0).double().cpu(),
            "jaccard15": (shared / (2 * top - shared)).cpu(),
            "top1": (ours[:, 0] == theirs[:, 0]).double().cpu(),
            "entropy_dense": -(q * log_q).sum(-1).double().cpu(),
            "entropy_model": -(p * log_p).sum(-1).double().cpu(),
        }
    )


def by_window(positions: pd.DataFrame) -> pd.DataFrame:
    """Average rows of `compare`, which have a column `window` as well, over the compared positions of each window.

    Returns one row per window and split with columns window, positions (a name of SPLITS), compared (how many positions the
    means are over), METRICS, ENTROPIES. The dense model's distributions at `low_entropy` positions have at most the median
    entropy of all positions given, those at `high_entropy` positions more; a window without such positions has no row of it.
    """
    high = positions["entropy_dense"] > positions["entropy_dense"].median()
    parts = []
    for name, part in zip(SPLITS, (positions, positions[~high], positions[high]), strict=True):
        windows = part.groupby("window")
        means = windows[[*METRICS, *ENTROPIES]].mean()
        means.insert(0, "positions", name)
        means.insert(1, "compared", windows.size())
        parts.append(means.reset_index())
    return pd.concat(parts, ignore_index=True)
