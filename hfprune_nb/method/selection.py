"""Which neurons stay: from importance and an allocation to the indices that each layer keeps."""

import torch

from hfprune_nb.allocations import uniform
from hfprune_nb.errors import UserError
from hfprune_nb.models import count_parameters, gated_mlps


def allocate(model, ratio: float = 0.0, neuron_ratio: float = 0.0, multiple_of: int = 1, rule: str = "uniform"):
    """Return the `Allocation` for `model`; arguments and errors as in `allocation.uniform`, `rule` names the allocation."""
    if rule != "uniform":
        raise UserError(f"allocation '{rule}' is unknown: the only one is uniform.")
    mlps = gated_mlps(model)
    widths, sizes = {mlp.width for mlp in mlps}, {mlp.parameters_per_neuron for mlp in mlps}
    if len(widths) > 1 or len(sizes) > 1:
        raise UserError(f"model: layers have different MLP widths ({sorted(widths)}), which a uniform allocation cannot narrow.")
    return uniform.uniform(len(mlps), widths.pop(), sizes.pop(), count_parameters(model), ratio, neuron_ratio, multiple_of)


def kept_neurons(importance: torch.Tensor, width_after: list[int]) -> torch.Tensor:
    """Return the indices (layers, neurons kept), ascending, of the most important neurons of each layer.

    importance : (layers, neurons), higher = keep; of equals, the one with the lower index is removed first. Raises UserError when
    it holds NaN or is the same everywhere in a layer.
    """
    check_importance(importance)
    order = torch.argsort(importance, dim=1, stable=True)
    rows = [order[layer, -width:].sort().values for layer, width in enumerate(width_after)]
    return torch.stack(rows)


def check_importance(importance: torch.Tensor, criterion: str = "importance") -> None:
    """Raise UserError when importance (layers, neurons) is not finite or does not tell the neurons of a layer apart."""
    if not torch.isfinite(importance).all():
        layer = int((~torch.isfinite(importance)).any(dim=1).nonzero()[0])
        raise UserError(
            f"{criterion}: scores of layer {layer} are NaN or infinite: score with dtype float32, or check the weights."
        )
    flat = (importance == importance[:, :1]).all(dim=1)
    if importance.shape[1] > 1 and flat.any():
        layer = int(flat.nonzero()[0])
        raise UserError(f"{criterion}: all scores of layer {layer} are equal (no gradient reached it), so nothing can be ranked.")
