"""What an allocation rule is, the budget that it spends, and the one way in which wished widths become whole ones.

Everything is exact: ratios are fractions, and widths add up to the budget to the neuron.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from hfprune_nb.errors import UserError
from hfprune_nb.families import Member, Setting


@dataclasses.dataclass(frozen=True)
class Units:
    """What one layer can lose: `width` neurons of `parameters` each."""

    width: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is to be kept: `keep` neurons of all layers together, not yet rounded, in widths that are multiples of `multiple_of`.

    request : how the user put it, for messages; dense_parameters : of the whole model, tied embeddings counted once. levels : how
    many different widths, of layers that keep anything, there may be; 0: any number.
    """

    keep: Fraction
    multiple_of: int = 1
    request: str = "ratio"
    dense_parameters: int = 1
    levels: int = 0

    def widths(self, wished: Sequence, units: list[Units], least: Sequence[int] | None = None) -> list[int]:
        """Return whole widths that add up to the budget, near the `wished` ones: the rounding of every non-uniform rule.

        wished : a real number for each layer; where they do not add up to the budget, or a layer has no more or no fewer to
        give, all others move by a common shift. least : the narrowest that each layer may become, one neuron by default. The
        fractions left are handed out by largest remainder, first layers first. With `multiple_of` m the same is done in units
        of m, and the total misses the budget by at most m / 2 neurons. Where there are more different widths than `levels`,
        the layers are grouped, nearest widths together, and those of a group get one: the total is then near the budget.
        Raises UserError when the budget is below `least`.
        """
        step = self.multiple_of
        most = [unit.width // step for unit in units]
        least = [min(high, max(1, -(-low // step))) for low, high in zip(least or [1] * len(units), most, strict=True)]
        total = min(round(self.keep / step), sum(most))
        if total < sum(least):
            raise self.out_of_reach(units, [step * low for low in least])
        exact = _shifted([Fraction(wish) / step for wish in wished], total, least, most)
        whole = [int(width) for width in exact]
        by_remainder = sorted(range(len(whole)), key=lambda layer: whole[layer] - exact[layer])
        for layer in by_remainder[: total - sum(whole)]:
            whole[layer] += 1
        if self.levels and len({*whole} - {0}) > self.levels:
            whole = _levelled(exact, total, least, most, self.levels)
        return [step * width for width in whole]

    def out_of_reach(self, units: list[Units], least: Sequence[int]) -> UserError:
        """Return the error of a budget that would leave a layer with fewer neurons than `least`."""
        most = sum((unit.width - low) * unit.parameters for unit, low in zip(units, least, strict=True)) / self.dense_parameters
        return UserError(
            f"{self.request} cannot be reached: the MLP neurons that can go hold {most:.3f} of all parameters, as every layer "
            "keeps at least one neuron, or what multiple_of or a floor asks for."
        )


def _shifted(wished: list[Fraction], total: int, least: list[int], most: list[int]) -> list[Fraction]:
    """Return `wished` plus the common shift with which they add up to `total`, none outside its bounds."""

    def bounded(shift):
        return [min(max(wish + shift, low), high) for wish, low, high in zip(wished, least, most, strict=True)]

    # The sum grows piecewise linearly with the shift, and bends where a layer meets one of its bounds.
    bends = sorted({bound - wish for bounds in (least, most) for wish, bound in zip(wished, bounds, strict=True)})
    after = bisect.bisect_left(bends, total, key=lambda shift: sum(bounded(shift)))
    if after == 0:
        return bounded(bends[0])
    left, right = bends[after - 1], bends[after]
    low, high = sum(bounded(left)), sum(bounded(right))
    return bounded(left + (right - left) * (total - low) / (high - low))


def _levelled(exact: list[Fraction], total: int, least: list[int], most: list[int], levels: int) -> list[int]:
    """Return whole widths near the `exact` ones, with so many different ones, that add up to nearly `total`.

    The groups are those with the smallest sum of squares about their means; layers that can keep nothing are none.
    """
    order = sorted((layer for layer, high in enumerate(most) if high), key=exact.__getitem__)
    values = [float(exact[layer]) for layer in order]
    sums, squares = ([0, *itertools.accumulate(v**power for v in values)] for power in (1, 2))

    @functools.cache
    def best(first, groups):
        if first == len(order):
            return 0.0, ()
        options = [(math.inf, ())]
        for last in range(first + 1, len(order) + 1) if groups else ():
            if max(least[layer] for layer in order[first:last]) <= min(most[layer] for layer in order[first:last]):
                rest, ends = best(last, groups - 1)
                spread = squares[last] - squares[first] - (sums[last] - sums[first]) ** 2 / (last - first)
                options.append((max(0.0, spread) + rest, (last, *ends)))
        return min(options)

    cost, ends = best(0, levels)
    if cost == math.inf:
        raise UserError(f"levels {levels}: layers of such different widths cannot share so few: raise levels or lower the floor.")
    groups = [order[first:last] for first, last in itertools.pairwise((0, *ends))]
    means = [sum(exact[layer] for layer in group) / len(group) for group in groups]
    bounds = [(max(least[layer] for layer in group), min(most[layer] for layer in group)) for group in groups]
    widths = [min(max(int(mean), low), high) for mean, (low, high) in zip(means, bounds, strict=True)]
    left = total - sum(width * len(group) for width, group in zip(widths, groups, strict=True))
    for index in sorted(range(len(groups)), key=lambda index: widths[index] - means[index]):
        if widths[index] < bounds[index][1] and abs(left - len(groups[index])) < abs(left):
            widths[index] += 1
            left -= len(groups[index])
    found = {layer: width for width, group in zip(widths, groups, strict=True) for layer in group}
    return [found.get(layer, 0) for layer in range(len(exact))]


class AllocationRule(Member, ABC):
    """A rule that says how many neurons each layer keeps.

    needs_importance : whether it looks at the neurons' importance; needs_comparable : whether that must be comparable between
    layers, which only scores in units of the model's output are. in_rounds : whether it can share out what is left after a part
    has gone; false where it looks at how scores are spread. reads : specs of criteria whose scores it looks at beside.

    needs : the further arguments of `plan`, handed over by name: `scores`, by spec of `reads` a tensor (neurons,) for each layer;
    `down`, the weights (hidden, neurons) of each layer's down_proj; `measure`, what `method.measurement.Measurement` offers.
    """

    noun = "allocation"
    needs_importance: ClassVar[bool] = False
    needs_comparable: ClassVar[bool] = False
    in_rounds: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **settings):
        super().__init__(**settings)
        self.found: dict = {}

    @abstractmethod
    def plan(self, units: list[Units], importance: list | None, budget: Budget, **needed) -> list[int]:
        """Return the width of each layer, and leave in `found` what else is worth reporting, by name.

        importance : a tensor (neurons,) for each layer, higher = keep; None where the rule needs none.
        """


class SpreadRule(AllocationRule):
    """A rule that spreads the kept fractions linearly in a quantity of the layers, with the uniform one as their mean."""

    settings = {"reach": Setting(0.1, "half of the range between the layers' kept fractions", low=0, high=0.5)}

    @abstractmethod
    def protection(self, units: list[Units], importance: list | None, budget: Budget, **needed) -> list[float]:
        """Return a number for each layer: the higher, the more of its neurons stay."""

    def plan(self, units, importance, budget, **needed):
        values = self.protection(units, importance, budget, **needed)
        low, high = min(values), max(values)
        added = [2 * self.reach * (value - low) / (high - low) if high > low else 0.0 for value in values]
        uniform, mean = float(budget.keep / sum(unit.width for unit in units)), math.fsum(added) / len(added)
        return budget.widths([(uniform + more - mean) * unit.width for more, unit in zip(added, units, strict=True)], units)


class MeasuredRule(AllocationRule):
    """A rule that measures on calibration windows what layers' losses do to the model, by forward passes.

    measurements : how many it makes in each layer, of which each computes half of the layers on average.
    """

    needs_importance = True
    needs = ("measure",)
    measurements: ClassVar[int] = 1
    settings = {"windows": Setting(4, "the number of calibration windows that each measurement reads", low=1)}


def wanda_elements(row, weight):
    """Return Wanda's scores `|D_ji| * rms(h_i)` of single weights D (hidden, neurons), which a neuron's score (neurons,) sums."""
    size = weight.detach().abs().float()
    return size * (row.to(size) / size.sum(0).clamp(min=1e-30))


def lowest(row, count: int) -> list[int]:
    """Return the neurons that go first when `count` go, by their importance (neurons,): of equals those with lower index."""
    return row.argsort(stable=True)[:count].tolist()


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A number of kept neurons for every layer, and what it means for the whole model.

    `name` and `spec` are those of the rule that shared the loss out, `requested` is the ratio that was asked for (of all
    parameters, or of the neurons when `of_neurons`). `width_exact` are the widths before `multiple_of` and `levels` changed them;
    `found` is what else the rule reports. elsewhere : parameters that are removed with other units than neurons.
    """

    name: str
    spec: str | dict
    requested: Fraction
    of_neurons: bool
    width_before: list[int]
    width_after: list[int]
    width_exact: list[int]
    parameters_per_neuron: int
    dense_parameters: int
    elsewhere: int = 0
    found: dict = dataclasses.field(default_factory=dict)

    @property
    def removed_parameters(self) -> int:
        """Parameters removed, with neurons and elsewhere."""
        return self.removed_neurons * self.parameters_per_neuron + self.elsewhere

    @property
    def removed_neurons(self) -> int:
        """Neurons removed in all layers together."""
        return sum(self.width_before) - sum(self.width_after)

    @property
    def missed_neurons(self) -> float:
        """Neurons removed beyond the request, with a uniform width at most half a neuron per layer."""
        if self.of_neurons:
            return float(self.removed_neurons - self.requested * sum(self.width_before))
        return float((self.removed_parameters - self.requested * self.dense_parameters) / self.parameters_per_neuron)

    @property
    def parameters(self) -> int:
        """Parameters left, tied embeddings counted once."""
        return self.dense_parameters - self.removed_parameters

    @property
    def achieved_ratio(self) -> float:
        """Fraction of all parameters removed."""
        return self.removed_parameters / self.dense_parameters

    @property
    def neuron_ratio(self) -> float:
        """Fraction of MLP neurons removed."""
        return self.removed_neurons / sum(self.width_before)
