"""How much calibration is enough: how far a kept set agrees with that of infinitely many windows, from two independent halves.

A neuron's score from n windows is taken as a true score plus noise that the windows share out evenly, both normal after a
monotone transformation. The overlap of the sets that two halves keep then has one parameter, the tetrachoric correlation of the
halves (Pearson 1900; its integral by Owen's T function), which is the reliability of one half; that of more windows follows from
Spearman and Brown (1910), and the correlation with the true score is its square root. Only ranks near the cut enter, so heavy
tails do not matter.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, special

from hfprune_nb import criteria
from hfprune_nb.errors import UserError
from hfprune_nb.report.neurons import overlap

Layers = list[np.ndarray]
# Sums of fewer windows are skewed, so that their halves promise too much: with SmolLM2-135M by .02 to .05 of overlap from 8
# windows and by .01 from 32, against the kept sets of two other seeds.
FEWEST = 32
# What is scored beyond the prediction, so that one more round is rarely needed.
MARGIN = 1.1


def jaccard(correlation: float, kept: float) -> float:
    """Return the Jaccard overlap of the shares `kept` of two standard normal variables with this correlation, 0 to 1."""
    cut = special.ndtri(kept)
    slope = np.sqrt((1 - correlation) / (1 + correlation))
    both = kept - 2 * special.owens_t(cut, slope)
    return float(both / (2 * kept - both))


def correlation(overlap: float, kept: float) -> float:
    """Return the correlation at which `jaccard` is `overlap`; 0 for one at chance or below, the largest below 1 for 1."""
    if overlap <= jaccard(0.0, kept):
        return 0.0
    highest = 1 - 1e-9
    if overlap >= jaccard(highest, kept):
        return highest
    return float(optimize.brentq(lambda value: jaccard(value, kept) - overlap, 0.0, highest))


def more(reliability: float, factor: float) -> float:
    """Return the reliability of `factor` times as many windows (Spearman and Brown)."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def halves(snapshots: dict[int, Layers]) -> tuple[Layers, Layers, int] | None:
    """Return the scores of two sets of windows that share none, and how many windows each has; None where there are too few.

    snapshots : number of first windows -> scores (neurons,) of each layer that are sums over windows, as scoring keeps them of
    criteria that are a function of the logits.
    """
    sizes = [n for n in snapshots if 2 * n in snapshots]
    if not sizes:
        return None
    first, both = snapshots[max(sizes)], snapshots[2 * max(sizes)]
    return first, [total - own for total, own in zip(both, first, strict=True)], max(sizes)


def predicted(snapshots: dict[int, Layers], ratio: float, windows: float = 0) -> float:
    """Return the overlap with infinitely many windows that `windows` (0: all that were scored) are predicted to reach.

    ratio : the share of each layer's neurons that goes. NaN where the snapshots have no halves.
    """
    found = halves(snapshots)
    if found is None:
        return np.nan
    first, second, size = found
    reliability = correlation(overlap(first, second, ratio), 1 - ratio)
    return jaccard(np.sqrt(more(reliability, (windows or max(snapshots)) / size)), 1 - ratio)


def needed(snapshots: dict[int, Layers], ratio: float, overlap_with_all: float) -> float:
    """Return how many windows are predicted to reach an overlap with infinitely many; NaN without halves, inf without signal.

    Raises UserError for an overlap that is not between 0 and 1.
    """
    if not 0 < overlap_with_all < 1:
        raise UserError(f"overlap {overlap_with_all:g} is not between 0 and 1: give the share of kept neurons to agree on.")
    found = halves(snapshots)
    if found is None:
        return np.nan
    first, second, size = found
    own = correlation(overlap(first, second, ratio), 1 - ratio)
    wanted = correlation(overlap_with_all, 1 - ratio) ** 2
    return size * wanted * (1 - own) / (own * (1 - wanted)) if own > 0 else np.inf


def agreement(snapshots: dict[str, dict[int, Layers]], specs: list, ratios: Iterable[float], target: float) -> pd.DataFrame:
    """Return criterion, ratio, windows, predicted overlap, and how many windows are needed for the overlap `target`.

    snapshots : criterion -> number of first windows -> scores by layer. specs : of the criteria; only those whose scores are
    sums over windows and that have halves can be predicted and are in the frame. ratios : shares of a layer's neurons that go.
    """
    sums = {variant.name for variant in criteria.variants(specs) if variant.create().kind == "logits"}
    rows = [
        {
            "criterion": name,
            "ratio": ratio,
            "windows": max(found),
            "predicted": predicted(found, ratio),
            "needed": needed(found, ratio, target),
        }
        for name, found in snapshots.items()
        if name in sums and halves(found)
        for ratio in ratios
    ]
    return pd.DataFrame(rows, columns=["criterion", "ratio", "windows", "predicted", "needed"])


def score_until(
    score: Callable, model, ids: np.ndarray, specs: list, ratios: Iterable[float], target: float, *, folder: Path, **settings
) -> tuple:
    """Score ever more windows until every criterion reaches the overlap `target` at every ratio, or all are scored.

    score : `scoring.distributed.score`, or what takes its arguments (model, ids, specs, folder=, **settings); each number of
    windows has a folder of its own in `folder`. ids : (windows, seq); other arguments as in `agreement`. Returns the last scores
    and their `agreement`. The numbers of windows follow from the scores alone, so that neither batches nor processes nor a run
    that was killed change them. Raises UserError where no criterion can be predicted.
    """
    windows = min(FEWEST, len(ids))
    while True:
        scores = score(model, ids[:windows], specs, folder=folder / str(windows), **settings)
        snapshots: dict = {}
        for n, by_name in scores.snapshots.items():
            for name, rows in by_name.items():
                snapshots.setdefault(name, {})[n] = [np.asarray(row) for row in rows]
        found = agreement(snapshots, specs, ratios, target)
        if found.empty:
            raise UserError(
                "stop_at: scores of these criteria are no sums over windows, so nothing says when to stop: set it to 0."
            )
        if windows == len(ids) or (found["predicted"] >= target).all():
            return scores, found
        windows = min(len(ids), int(np.clip(np.ceil(MARGIN * found["needed"].max()), 1.25 * windows, 4 * windows)))
