"""What summing importance in bfloat16 does to the ranking, as the published loops do, against the same sums in float64.

bfloat16 has eight significant bits: a sum stops growing once what is added is less than about 1/256 of it.
"""

import numpy as np
import torch

from hfprune_nb.errors import UserError

PAPER_WINDOWS = 43_128  # calibration sequences of the paper


def study(
    contributions: torch.Tensor, counts: list[int], kept: int, streams: int = 3, seed: int = 0, importance_dtype=torch.bfloat16
) -> list[dict]:
    """Sum streams of contributions in half precision and in float64, and compare the two at each of `counts`.

    contributions : (windows, layers, neurons), what each scored window adds to the importance. Streams are drawn from them with
    replacement, seeded, so a long stream repeats windows. kept : neurons kept in each layer.

    Returns rows with stream, windows, layer, changed (fraction of the kept neurons that are others), spearman, and sum_fraction
    (median over neurons of the half-precision sum over the float64 one). Raises UserError when `kept` does not fit the width.
    """
    total, layers, width = contributions.shape
    if not 0 < kept < width:
        raise UserError(f"kept {kept} does not fit a width of {width}: it must be between 1 and {width - 1}.")
    wide = contributions.double().cpu()
    narrow = wide.to(importance_dtype)
    rows = []
    for stream in range(streams):
        drawn = torch.from_numpy(np.random.default_rng((seed, stream)).integers(0, total, max(counts)))
        running = torch.zeros(layers, width, dtype=importance_dtype)
        for index, window in enumerate(drawn.tolist(), start=1):
            running += narrow[window]
            if index in counts:
                occurrences = torch.bincount(drawn[:index], minlength=total).double()
                exact = torch.einsum("w,wln->ln", occurrences, wide)
                found = _compare(running.double(), exact, kept)
                rows += [{"stream": stream, "windows": index, "layer": layer, **row} for layer, row in enumerate(found)]
    return rows


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Return Spearman's rank correlation of each row of a and b, both (layers, neurons); ties share their mean rank."""
    return [float(np.corrcoef(_ranks(x), _ranks(y))[0, 1]) for x, y in zip(a.double().cpu(), b.double().cpu(), strict=True)]


def _compare(sums, exact, kept):
    same = (_top(sums, kept) & _top(exact, kept)).sum(dim=1) / kept
    fraction = (sums / exact).nanmedian(dim=1).values
    spearman = rank_correlation(sums, exact)
    return [
        {"changed": float(1 - share), "spearman": rho, "sum_fraction": float(part)}
        for share, rho, part in zip(same, spearman, fraction, strict=True)
    ]


def _top(importance, kept):
    # Of equals the lower index goes first, as in pruning; half precision has many equals.
    best = torch.argsort(importance, dim=1, stable=True)[:, -kept:]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, best, True)


def _ranks(values):
    _, positions, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[positions]
