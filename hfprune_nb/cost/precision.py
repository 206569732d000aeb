"""What summing importance in bfloat16 does to the ranking, as the published loops do, against the same sums in float64.

bfloat16 has eight significant bits: a sum stops growing once what is added is less than about 1/256 of it.
"""

import numpy as np
import torch

from hfprune_nb.errors import UserError

PAPER_WINDOWS = 43_128  # calibration sequences of the paper


def study(
    contributions: list, counts: list[int], kept: list[int], streams: int = 3, seed: int = 0, importance_dtype=torch.bfloat16
) -> list[dict]:
    """Sum streams of contributions in half precision and in float64, and compare the two at each of `counts`.

    contributions : (windows, neurons) of each layer, what each scored window adds to the importance. Streams are drawn from them
    with replacement, seeded, so a long stream repeats windows. kept : neurons kept in each layer.

    Returns rows with stream, windows, layer, changed (fraction of the kept neurons that are others), spearman, and sum_fraction
    (median over neurons of the half-precision sum over the float64 one). Raises UserError when `kept` does not fit the width.
    """
    for rows, width in zip(contributions, kept, strict=True):
        if not 0 < width < rows.shape[1]:
            raise UserError(
                f"kept {width} does not fit a width of {rows.shape[1]}: it must be between 1 and {rows.shape[1] - 1}."
            )
    wide, found = [rows.double().cpu() for rows in contributions], []
    narrow, total = [rows.to(importance_dtype) for rows in wide], len(wide[0])
    for stream in range(streams):
        drawn = torch.from_numpy(np.random.default_rng((seed, stream)).integers(0, total, max(counts)))
        running = [torch.zeros(rows.shape[1], dtype=importance_dtype) for rows in narrow]
        for index, window in enumerate(drawn.tolist(), start=1):
            for sums, rows in zip(running, narrow, strict=True):
                sums += rows[window]
            if index in counts:
                occurrences = torch.bincount(drawn[:index], minlength=total).double()
                for layer, (sums, rows, width) in enumerate(zip(running, wide, kept, strict=True)):
                    compared = _compare(sums.double(), occurrences @ rows, width)
                    found.append({"stream": stream, "windows": index, "layer": layer, **compared})
    return found


def rank_correlation(a, b) -> list[float]:
    """Return Spearman's rank correlation of a and b, (neurons,) tensors of each layer; ties share their mean rank."""
    return [_spearman(x.double().cpu(), y.double().cpu()) for x, y in zip(a, b, strict=True)]


def others(a, b, kept: list[int]) -> list[int]:
    """Return for each layer how many of the `kept` most important neurons by a are not among those by b, (neurons,) each.

    Of equals the lower index goes first, as in pruning; half precision has many equals.
    """
    return [width - len(_best(x, width) & _best(y, width)) for x, y, width in zip(a, b, kept, strict=True)]


def _best(values, kept):
    return set(torch.argsort(values, stable=True)[-kept:].tolist())


def _spearman(a, b):
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _compare(sums, exact, kept):
    return {
        "changed": others([sums], [exact], [kept])[0] / kept,
        "spearman": _spearman(sums, exact),
        "sum_fraction": float((sums / exact).nanmedian()),
    }


def _ranks(values):
    _, positions, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[positions]
