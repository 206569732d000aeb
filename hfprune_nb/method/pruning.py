"""From importance to a narrower model that any transformers installation loads."""

import contextlib
import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hfprune_nb.errors import UserError
from hfprune_nb.inputs.models import count_parameters, gated_mlps
from hfprune_nb.method import allocation


def allocate(model, ratio: float = 0.0, neuron_ratio: float = 0.0, multiple_of: int = 1, rule: str = "uniform"):
    """Return the `Allocation` for `model`; arguments and errors as in `allocation.uniform`, `rule` names the allocation."""
    if rule != "uniform":
        raise UserError(f"allocation '{rule}' is unknown: the only one is uniform.")
    mlps = gated_mlps(model)
    widths, sizes = {mlp.width for mlp in mlps}, {mlp.parameters_per_neuron for mlp in mlps}
    if len(widths) > 1 or len(sizes) > 1:
        raise UserError(f"model: layers have different MLP widths ({sorted(widths)}), which a uniform allocation cannot narrow.")
    return allocation.uniform(len(mlps), widths.pop(), sizes.pop(), count_parameters(model), ratio, neuron_ratio, multiple_of)


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


def narrow(model, kept: torch.Tensor):
    """Remove, in place, all neurons but `kept` (layers, neurons kept) from every gated MLP, and return the model.

    The configuration's `intermediate_size` follows, so that `save_pretrained` writes a plain checkpoint.
    """
    mlps = gated_mlps(model)
    if len(kept) != len(mlps):
        raise UserError(
            f"kept: indices for {len(kept)} layers do not fit the {len(mlps)} layers: prune the model that was scored."
        )
    for mlp, indices in zip(mlps, kept, strict=True):
        if int(indices.max()) >= mlp.width:
            raise UserError(
                f"kept: neuron {int(indices.max())} of layer {mlp.layer} does not exist with intermediate_size {mlp.width}: "
                "prune the model that was scored."
            )
        indices = indices.to(mlp.down.weight.device)
        rows = torch.cat([indices, indices + mlp.width]) if mlp.fused is not None else indices
        for module in mlp.inputs:
            _take(module, rows, dimension=0)
        _take(mlp.down, indices, dimension=1)
    config = model.config.get_text_config()
    config.intermediate_size = kept.shape[1]
    for layer in model.get_decoder().layers:
        if hasattr(layer.mlp, "intermediate_size"):
            layer.mlp.intermediate_size = kept.shape[1]
    return model


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


def rebuild(model, folder: Path):
    """Make `model`, the dense one, in place, the model that a finished pruning stage wrote into `folder`, and return it.

    Reads kept.safetensors and, where the neurons left were repaired, repaired.safetensors. Raises UserError for files that are
    missing, damaged or of another model.
    """
    folder = Path(folder)
    narrow(model, load_kept(folder / "kept.safetensors"))
    repaired = folder / "repaired.safetensors"
    return repair(model, load_tensors(repaired)) if repaired.is_file() else model


def save_checkpoint(model, tokenizer, folder: Path) -> None:
    """Write model and tokenizer as a plain transformers checkpoint; raise UserError when the disk is full."""
    with full_disk_in_one_sentence(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def save_kept(kept: torch.Tensor, file: Path) -> None:
    """Write kept indices (layers, neurons kept) as safetensors, one int64 tensor `layers.<l>` per layer."""
    save_tensors({f"layers.{layer}": row for layer, row in enumerate(kept)}, file)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors as safetensors; raise UserError when the disk is full."""
    with full_disk_in_one_sentence(file):
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)


def load_kept(file: Path) -> torch.Tensor:
    """Read what `save_kept` wrote; raise UserError for a missing or truncated file."""
    tensors = load_tensors(file)
    return torch.stack([tensors[f"layers.{layer}"] for layer in range(len(tensors))])


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; raise UserError that names it when it is missing or truncated."""
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: run the stage that writes it first.") from error
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: delete its folder and run the stage again ({error}).") from error


@contextlib.contextmanager
def full_disk_in_one_sentence(target: Path):
    """Turn "no space left" into a UserError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"{target}: the disk is full; free space or choose another results folder.") from error
        raise


def _take(module: nn.Linear, indices: torch.Tensor, dimension: int) -> None:
    weight = module.weight.detach().index_select(dimension, indices).contiguous()
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if dimension == 0:
        module.out_features = len(indices)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[indices].clone(), requires_grad=module.bias.requires_grad)
    else:
        module.in_features = len(indices)
