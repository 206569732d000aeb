"""Which neurons stay: from importance and an allocation to the indices that each layer keeps."""

import torch

from hfprune_nb import allocations, criteria
from hfprune_nb.allocations import Allocation, Units
from hfprune_nb.errors import UserError
from hfprune_nb.models import count_parameters, gated_mlps


def allocate(
    model,
    ratio: float = 0.0,
    neuron_ratio: float = 0.0,
    multiple_of: int = 1,
    allocation: str | dict = "uniform",
    importance=None,
    criterion: str | dict | None = None,
) -> Allocation:
    """Return the `Allocation` for `model`; arguments and errors as in `allocations.allocate`.

    importance : (neurons,) for each layer, checked as `kept_neurons` does. criterion : the spec of the one that it comes from;
    raises UserError when the allocation compares layers and its scores cannot be compared.
    """
    (variant,) = allocations.variants(allocation)
    if criterion is not None:
        allocations.check(variant, criteria.variants(criterion)[0])
    if importance is not None:
        importance = check_importance(importance)
    units = [Units(mlp.width, mlp.parameters_per_neuron) for mlp in gated_mlps(model)]
    return allocations.allocate(units, count_parameters(model), ratio, neuron_ratio, multiple_of, variant, importance)


def kept_neurons(importance, width_after: list[int]) -> list[torch.Tensor]:
    """Return for each layer the indices, ascending, of its most important neurons.

    importance : (neurons,) for each layer, higher = keep; of equals, the one with the lower index is removed first. Raises
    UserError when it holds NaN or is the same everywhere in a layer.
    """
    rows = check_importance(importance)
    orders = (torch.argsort(row, stable=True) for row in rows)
    return [order[len(order) - width :].sort().values for order, width in zip(orders, width_after, strict=True)]


def check_importance(importance, criterion: str = "importance") -> list[torch.Tensor]:
    """Return importance as a tensor (neurons,) for each layer; raise UserError where it is not finite or ranks nothing."""
    rows = [torch.as_tensor(row) for row in importance]
    for layer, row in enumerate(rows):
        if not torch.isfinite(row).all():
            raise UserError(
                f"{criterion}: scores of layer {layer} are NaN or infinite: score with dtype float32, or check the weights."
            )
        if len(row) > 1 and (row == row[0]).all():
            raise UserError(
                f"{criterion}: all scores of layer {layer} are equal (no gradient reached it), so nothing can be ranked."
            )
    return rows
