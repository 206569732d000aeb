"""Iterated scoring: a part of the removal at a time, what is left being scored again before the next one.

Scores of the dense model say what the first neuron costs; when many are gone, others have become important. GISP (arXiv
2510.18030) prunes in many rounds; here any criterion does, on the same text in every round.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch

from hfprune_nb import criteria
from hfprune_nb.allocations import Allocation
from hfprune_nb.errors import UserError
from hfprune_nb.method.pruning import narrow
from hfprune_nb.method.scoring import score
from hfprune_nb.method.selection import kept_neurons, rank_last


def in_rounds(
    model,
    importance,
    rounds: int,
    plan: Callable[[list[torch.Tensor], float], Allocation],
    windows: np.ndarray,
    criterion: str | dict,
    **settings,
) -> list[torch.Tensor]:
    """Return the importance after `rounds` rounds, each of which removes as much: with one round that which was given.

    importance : of the dense `model`, which stays as it is, (neurons,) for each layer, by `criterion`, a spec. plan : what
    importance and a share of the removal give. windows, settings : as `scoring.score` takes them, of narrowed copies of the
    model. Neurons removed in a round rank below all that stay. Raises UserError for fewer than one round, and what `plan` and
    `scoring.score` raise.
    """
    if rounds < 1:
        raise UserError(f"rounds {rounds} is too small: 1 scores once, more score again after each part of the removal.")
    (variant,) = criteria.variants(criterion)
    for number in range(1, rounds):
        kept = kept_neurons(importance, plan(importance, number / rounds).width_after)
        found = score(narrow(copy.deepcopy(model), kept), windows, [variant], **settings).importance[variant.name]
        rows = [row.new_zeros(row.shape).index_copy(0, own, new) for row, own, new in zip(importance, kept, found, strict=True)]
        importance = rank_last(rows, kept, importance)
    return importance
