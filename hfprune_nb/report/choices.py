"""What the log-likelihoods of an item's choices tell, beyond whether the likeliest is right."""

import numpy as np
import pandas as pd
from scipy.special import log_softmax

MEASURES = {
    "p_right": "probability of the right choice",
    "log_p_right": "log-probability of the right choice",
    "bits_per_byte": "bits per byte of the right answer",
}
UNITS = {"p_right": "%", "log_p_right": "nat", "bits_per_byte": "bit"}
LIMITS = {"p_right": (0, 100), "log_p_right": (-np.inf, 0), "bits_per_byte": (0, np.inf)}
COLUMNS = ("loglikelihoods", "characters", "bytes", "right")


def known(items: pd.DataFrame) -> pd.DataFrame:
    """Return the items of an evaluation that have one right choice; those of evaluations that kept no choices have none."""
    return items[items["right"] >= 0]


def measures(items: pd.DataFrame) -> pd.DataFrame:
    """Return the `known` items with `chosen` and `right` (places of choices) and the measures in place of `COLUMNS`.

    `chosen` is what the harness takes for the item's metric: the largest log-likelihood, for `acc_norm` that per character.
    The probability of the right choice is the softmax over log-likelihoods per character, so that long choices are as likely as
    short ones; bits per byte are those of the right choice alone.
    """
    found, names = [], [name for name in items if name not in COLUMNS]
    some = known(items)
    for _, part in some.groupby(some["loglikelihoods"].map(len)):
        likelihoods, characters, sizes = (np.stack(part[name].to_numpy()) for name in COLUMNS[:3])
        right, each = part["right"].to_numpy(int), np.arange(len(part))
        by_character = likelihoods / characters
        log_p = log_softmax(by_character, axis=1)[each, right]
        normed = part["metric"].to_numpy() == "acc_norm"
        values = {
            "chosen": np.where(normed, by_character.argmax(1), likelihoods.argmax(1)),
            "right": right,
            "p_right": np.exp(log_p),
            "log_p_right": log_p,
            "bits_per_byte": -(likelihoods / sizes)[each, right] / np.log(2),
        }
        found.append(part[names].assign(**values))
    empty = pd.DataFrame(columns=[*names, "chosen", "right", *MEASURES])
    return pd.concat(found).sort_index() if found else empty


def balanced_accuracy(chosen: pd.Series, right: pd.Series) -> float:
    """Return the mean, over the places at which right choices stand, of the share of them that was chosen; 0 to 1."""
    return float((chosen == right).groupby(right).mean().mean())
