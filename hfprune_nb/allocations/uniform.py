"""How many neurons each layer keeps, in exact integer arithmetic."""

import dataclasses
from fractions import Fraction

from hfprune_nb.errors import UserError


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A number of kept neurons for every layer, and what it means for the whole model.

    `requested` is the ratio that was asked for (of all parameters, or of the neurons when `of_neurons`).
    """

    requested: Fraction
    of_neurons: bool
    width_before: int
    width_after: list[int]
    parameters_per_neuron: int
    dense_parameters: int

    @property
    def removed_neurons(self) -> int:
        """Neurons removed in all layers together."""
        return sum(self.width_before - width for width in self.width_after)

    @property
    def parameters(self) -> int:
        """Parameters left, tied embeddings counted once."""
        return self.dense_parameters - self.removed_neurons * self.parameters_per_neuron

    @property
    def achieved_ratio(self) -> float:
        """Fraction of all parameters removed."""
        return self.removed_neurons * self.parameters_per_neuron / self.dense_parameters

    @property
    def neuron_ratio(self) -> float:
        """Fraction of MLP neurons removed."""
        return self.removed_neurons / (self.width_before * len(self.width_after))


def uniform(
    layers: int,
    width: int,
    parameters_per_neuron: int,
    dense_parameters: int,
    ratio: float = 0.0,
    neuron_ratio: float = 0.0,
    multiple_of: int = 1,
) -> Allocation:
    """Remove the same number of neurons from every layer (the paper's allocation).

    Parameters
    ----------
    layers, width : number of layers and of neurons in each.
    parameters_per_neuron, dense_parameters : parameter counts, tied embeddings counted once.
    ratio : fraction of ALL parameters to remove; neuron_ratio : fraction of the neurons to remove. Exactly one is non-zero.
    multiple_of : the kept width is rounded to the nearest multiple, at least one, for widths that matrix kernels like.

    Without `multiple_of` the achieved ratio is within half a neuron per layer of the request. Raises UserError when the ratio is
    outside (0, 1), cannot be reached with MLP neurons alone, or rounds to nothing removed.
    """
    if bool(ratio) == bool(neuron_ratio):
        raise UserError("ratio, neuron_ratio: give exactly one of the two, and leave the other at 0.")
    name, value = ("neuron_ratio", neuron_ratio) if neuron_ratio else ("ratio", ratio)
    if not 0 < value < 1:
        raise UserError(f"{name} {value} is outside (0, 1): it is the fraction to remove, for example 0.2.")
    if not 1 <= multiple_of <= width:
        raise UserError(f"multiple_of {multiple_of} is outside 1 to {width}, the model's intermediate_size.")
    requested = Fraction(str(value))
    wanted = requested * width if neuron_ratio else requested * dense_parameters / (layers * parameters_per_neuron)
    removed = round(wanted)
    if removed >= width:
        most = (width - 1) * layers * parameters_per_neuron / dense_parameters
        raise UserError(
            f"{name} {value} cannot be reached: all but one MLP neuron of every layer hold {most:.3f} of all parameters."
        )
    kept = width - removed
    if multiple_of > 1:
        kept = max(multiple_of, multiple_of * round(Fraction(kept, multiple_of)))
    if kept >= width:
        raise UserError(f"{name} {value} with multiple_of {multiple_of} removes no neuron: raise {name} or lower multiple_of.")
    return Allocation(requested, bool(neuron_ratio), width, [kept] * layers, parameters_per_neuron, dense_parameters)
