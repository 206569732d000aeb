"""Measured sensitivity: every neuron goes where the model is measured to lose least by it."""

import itertools
from fractions import Fraction

from hfprune_nb.allocations.base import MeasuredRule, lowest

# Of a layer's neurons, at which its loss is measured; the last is the whole layer, so that no budget is out of the curve.
FRACTIONS = (Fraction(1, 10), Fraction(1, 5), Fraction(2, 5), Fraction(3, 5), Fraction(1))


class Sensitivity(MeasuredRule):
    """The widths that cost least, if the losses of layers add up: KL to the dense model, measured in each layer alone.

    The criterion orders a layer's neurons; the KL of removing its lowest 10, 20, 40, 60 and 100 % is a curve, of which the
    greatest convex minorant is taken. Then the budget is spent by least KL per neuron. `predicted_kl` is the sum over layers.
    """

    name = "sensitivity"
    label = "Measured sensitivity"
    source = "our own: measured KL in place of a trace, after sensitivity-aware mixed sparsity (arXiv 2310.09499)"
    measurements = len(FRACTIONS)

    def plan(self, units, importance, budget, measure):
        counts = [sorted({round(share * unit.width) for share in FRACTIONS} - {0}) for unit in units]
        ablations = [{layer: lowest(row, n)} for layer, row in enumerate(importance) for n in counts[layer]]
        measured = iter(measure.divergence(ablations, self.windows))
        curves = [minorant([(0, 0.0), *((n, next(measured)) for n in own)]) for own in counts]
        pieces = sorted(
            ((right[1] - left[1]) / (right[0] - left[0]), layer, right[0] - left[0])
            for layer, curve in enumerate(curves)
            for left, right in itertools.pairwise(curve)
        )
        wished, left = [Fraction(unit.width) for unit in units], sum(unit.width for unit in units) - budget.keep
        for _, layer, neurons in pieces:
            taken = min(left, neurons, wished[layer] - 1)  # one stays in any case
            wished[layer] -= taken
            left -= taken
        widths = budget.widths(wished, units)
        self.found["predicted_kl"] = sum(
            height(curve, unit.width - width) for curve, unit, width in zip(curves, units, widths, strict=True)
        )
        return widths


def minorant(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the corners of the greatest convex function below `points` (x, y), which ascend in x."""
    corners: list = []
    for x, y in points:
        while len(corners) > 1:
            (first, low), (second, high) = corners[-2:]
            if (high - low) * (x - first) < (y - low) * (second - first):
                break
            corners.pop()
        corners.append((x, y))
    return corners


def height(curve: list[tuple[int, float]], x: float) -> float:
    """Return the value at `x` of the line through the corners of `curve`."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return curve[-1][1]
