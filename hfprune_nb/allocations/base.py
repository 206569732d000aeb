"""What an allocation rule is, the budget that it spends, and the one way in which wished widths become whole ones.

Everything is exact: ratios are fractions, and widths add up to the budget to the neuron.
"""

import bisect
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from hfprune_nb.errors import UserError
from hfprune_nb.families import Member


@dataclasses.dataclass(frozen=True)
class Units:
    """What one layer can lose: `width` neurons of `parameters` each."""

    width: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is to be kept: `keep` neurons of all layers together, not yet rounded, in widths that are multiples of `multiple_of`.

    request : how the user put it, for messages; dense_parameters : of the whole model, tied embeddings counted once.
    """

    keep: Fraction
    multiple_of: int = 1
    request: str = "ratio"
    dense_parameters: int = 1

    def widths(self, wished: Sequence, units: list[Units], least: Sequence[int] | None = None) -> list[int]:
        """Return whole widths that add up to the budget, near the `wished` ones: the rounding of every non-uniform rule.

        wished : a real number for each layer; where they do not add up to the budget, or a layer has no more or no fewer to
        give, all others move by a common shift. least : the narrowest that each layer may become, one neuron by default. The
        fractions left are handed out by largest remainder, first layers first. With `multiple_of` m the same is done in units
        of m, and the total misses the budget by at most m / 2 neurons. Raises UserError when the budget is below `least`.
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


class AllocationRule(Member, ABC):
    """A rule that says how many neurons each layer keeps.

    needs_importance : whether it looks at the neurons' importance; needs_comparable : whether that must be comparable between
    layers, which only scores in units of the model's output are.
    """

    noun = "allocation"
    needs_importance: ClassVar[bool] = False
    needs_comparable: ClassVar[bool] = False

    @abstractmethod
    def plan(self, units: list[Units], importance: list | None, budget: Budget) -> list[int]:
        """Return the width of each layer.

        importance : a tensor (neurons,) for each layer, higher = keep; None where the rule needs none.
        """


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A number of kept neurons for every layer, and what it means for the whole model.

    `name` and `spec` are those of the rule that shared the loss out, `requested` is the ratio that was asked for (of all
    parameters, or of the neurons when `of_neurons`). elsewhere : parameters that are removed with other units than neurons.
    """

    name: str
    spec: str | dict
    requested: Fraction
    of_neurons: bool
    width_before: list[int]
    width_after: list[int]
    parameters_per_neuron: int
    dense_parameters: int
    elsewhere: int = 0

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
