"""Searches over masks: what a criterion of kind `search` asks the model, one forward pass after the other."""

import numpy as np
import torch

from hfprune_nb.models import final_hidden
from hfprune_nb.models.hooks import replaced


@torch.no_grad()
def search(model, head, windows, criterion, start, seed: int, chunk_size: int, progress_bar):
    """Return the importance that `criterion` finds, (neurons,) float64 of each layer, and notes on the search by name.

    head : of `model`, as `models.head` gives it; windows : (windows, seq) token ids; start : the importance to begin with, by
    layer; chunk_size : positions whose logits exist at once; progress_bar : counts the tokens read.
    """
    from scipy import stats  # scoring without a search does without it

    forwards = 0

    def loss(numbers, masks):
        nonlocal forwards
        ids = torch.as_tensor(np.array(windows[numbers]), dtype=torch.long, device=model.device)
        with replaced(model, lambda layer, hidden: hidden * masks[layer].to(hidden)):
            hidden = final_hidden(model, ids)
        states, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        total = 0.0
        for part, own in zip(states.split(chunk_size), labels.split(chunk_size), strict=True):
            logits = head.logits(part)
            total += torch.nn.functional.cross_entropy(logits, own.to(logits.device), reduction="none").double().sum().item()
        forwards += len(ids)
        progress_bar.update(ids.numel())
        return total / len(labels)

    found = criterion.search(loss, start, len(windows), seed)
    ranks = [stats.spearmanr(one, other).statistic for one, other in zip(start, found, strict=True) if len(one) > 1]
    notes = {
        "mean rank correlation with its start in a layer": float(np.mean(ranks)),
        "forward passes of the text": forwards / len(windows),
    }
    return found, notes
