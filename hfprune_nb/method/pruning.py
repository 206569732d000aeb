"""From kept neurons to a narrower model."""

from pathlib import Path

import torch
from torch import nn

from hfprune_nb.errors import UserError
from hfprune_nb.files import load_tensors, save_tensors
from hfprune_nb.models import attention_groups, check_groups, check_neurons, gated_mlps, kept_indices, set_groups
from hfprune_nb.models.modeling_per_layer import set_widths


def narrow(model, kept, groups=None):
    """Remove, in place, all neurons but `kept` from every gated MLP, and return the model.

    kept : ascending indices for each layer, as tensors or lists; layers may keep different numbers. The configuration follows:
    `intermediate_size` where all layers are equally wide, so that `save_pretrained` writes a plain checkpoint, otherwise
    `per_layer_config`. groups : the attention groups that stay, in the same way, but equally many in every layer, at least one:
    no configuration of transformers holds more than one number of heads. None: all. Raises UserError for indices that do not
    fit the model, repeat, or are out of order.
    """
    check_neurons(model)
    mlps = gated_mlps(model)
    kept = kept_indices(mlps, kept)
    if groups is not None:
        _narrow_attention(model, groups)
    for mlp, indices in zip(mlps, kept, strict=True):
        mlp.keep(indices)
    set_widths(model.config.get_text_config(), [mlp.width for mlp in mlps])
    for mlp, layer in zip(mlps, model.get_decoder().layers, strict=True):
        if hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = mlp.width
    return model


def _narrow_attention(model, groups) -> None:
    check_groups(model)
    units = attention_groups(model)
    indices = kept_indices(units, groups)
    counts = {len(row) for row in indices}
    if len(counts) > 1 or counts == {0}:
        raise UserError(
            f"groups: layers keep {min(counts)} to {max(counts)} attention groups, which no configuration can say: keep the same "
            "number, at least one, in every layer."
        )
    for unit, row in zip(units, indices, strict=True):
        unit.keep(row)
    set_groups(model.config.get_text_config(), units[0].queries, min(counts), units[0].head_dim)


def repair(model, repaired: dict[str, torch.Tensor]):
    """Give a narrowed model, in place, the `down_proj` of `compensation.least_squares`, and return the model.

    repaired : `layers.<l>.weight` (hidden, neurons kept) and, if the repair has biases, `layers.<l>.bias` (hidden). Biases need
    a configuration with `mlp_bias`, which covers all three projections: those of gate and up are then zero. Raises UserError when
    the weights do not fit the model, or its plain architecture has no place for biases.
    """
    mlps, biased = gated_mlps(model), any(name.endswith(".bias") for name in repaired)
    if biased:
        check_takes_bias(model)
        model.config.get_text_config().mlp_bias = True
    for mlp in mlps:
        weight = repaired.get(f"layers.{mlp.layer}.weight")
        if weight is None or weight.shape != mlp.down.weight.shape:
            raise UserError(f"repaired: the weights of layer {mlp.layer} do not fit: repair the model that was pruned.")
        mlp.down.weight.data.copy_(weight)
        if not biased:
            continue
        for module in (*mlp.inputs, mlp.down):
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), module.weight.requires_grad)
        mlp.down.bias.data.copy_(repaired[f"layers.{mlp.layer}.bias"])
    return model


def check_takes_bias(model) -> None:
    """Raise UserError where a bias of `down_proj` would be lost when the model is saved and loaded with transformers."""
    if not hasattr(model.config.get_text_config(), "mlp_bias"):
        raise UserError(
            f"compensation: {type(model).__name__} has no MLP biases in its configuration, so a repaired bias could not be saved "
            "as a plain checkpoint: choose compensation: least_squares."
        )


def rebuild(model, folder: str | Path):
    """Make `model`, the dense one, in place, the model that a finished pruning stage wrote into `folder`, and return it.

    Reads kept.safetensors and, where attention groups were removed, groups.safetensors, where the neurons left were repaired,
    repaired.safetensors. Raises UserError for files that are missing, damaged or of another model.
    """
    folder = Path(folder)
    groups = folder / "groups.safetensors"
    narrow(model, load_kept(folder / "kept.safetensors"), load_kept(groups) if groups.is_file() else None)
    repaired = folder / "repaired.safetensors"
    return repair(model, load_tensors(repaired)) if repaired.is_file() else model


def save_kept(kept, file: str | Path) -> None:
    """Write kept indices of neurons or groups, one list or tensor for each layer, as safetensors: int64 tensors `layers.<l>`."""
    save_tensors({f"layers.{layer}": torch.as_tensor(row, dtype=torch.int64) for layer, row in enumerate(kept)}, Path(file))


def load_kept(file: str | Path) -> list[torch.Tensor]:
    """Read what `save_kept` wrote, one tensor for each layer; raise UserError for a missing or truncated file."""
    tensors = load_tensors(Path(file))
    return [tensors[f"layers.{layer}"] for layer in range(len(tensors))]
