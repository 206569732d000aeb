"""What can be removed from a model: the neurons of its gated MLPs."""

import dataclasses
import hashlib

import torch
from torch import nn

from hfprune_nb.errors import UserError


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, a tensor shared by two modules (tied embeddings) counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits that tell models of other weights apart: a hash of some 64 evenly spaced numbers of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """One layer's gated MLP, `h = act(gate x) * up x`, `output = down h`, with h of shape (batch, seq, intermediate_size).

    `gate` and `up` are separate linear modules, or both None where `fused` holds their rows one after the other (Phi-3).
    """

    layer: int
    down: nn.Linear
    gate: nn.Linear | None = None
    up: nn.Linear | None = None
    fused: nn.Linear | None = None

    @property
    def width(self) -> int:
        """Number of neurons (intermediate_size)."""
        return self.down.in_features

    @property
    def inputs(self) -> list[nn.Linear]:
        """The linear modules whose rows produce h."""
        return [self.fused] if self.fused is not None else [self.gate, self.up]

    @property
    def parameters_per_neuron(self) -> int:
        """Parameters that go when one neuron is removed: its rows, their biases, and its column of `down`."""
        rows = sum(module.in_features + (module.bias is not None) for module in self.inputs)
        return rows * (2 if self.fused is not None else 1) + self.down.out_features


def gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Return the gated MLP of every decoder layer, first to last; raise UserError naming what was looked for otherwise."""
    layers = getattr(model.get_decoder(), "layers", None)
    architecture = type(model).__name__
    if not layers:
        raise UserError(f"model: {architecture} is not supported: no `layers` list was found in its decoder.")
    found = []
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        parts = {name: getattr(mlp, name, None) for name in ("down_proj", "gate_proj", "up_proj", "gate_up_proj")}
        linear = {name for name, module in parts.items() if isinstance(module, nn.Linear)}
        if {"down_proj", "gate_proj", "up_proj"} <= linear:
            found.append(GatedMLP(index, parts["down_proj"], gate=parts["gate_proj"], up=parts["up_proj"]))
        elif {"down_proj", "gate_up_proj"} <= linear:
            found.append(GatedMLP(index, parts["down_proj"], fused=parts["gate_up_proj"]))
        else:
            raise UserError(
                f"model: {architecture} is not supported: layer {index} has no gated MLP (looked for linear modules "
                "`mlp.down_proj` with `mlp.gate_proj` and `mlp.up_proj`, or with a fused `mlp.gate_up_proj`)."
            )
    return found


def kept_indices(mlps: list[GatedMLP], kept) -> list[torch.Tensor]:
    """Return the kept neurons of each layer as int64 tensors on its device, after a check.

    kept : for each layer ascending indices, as a tensor, an array or a list. Raises UserError for another number of layers, and
    for indices that repeat, are out of order, or are no neuron of their layer.
    """
    if len(kept) != len(mlps):
        raise UserError(
            f"kept: indices for {len(kept)} layers do not fit the {len(mlps)} layers: prune the model that was scored."
        )
    found = []
    for mlp, row in zip(mlps, kept, strict=True):
        indices = torch.as_tensor(row if len(row) else [], dtype=None if len(row) else torch.int64)
        if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise UserError(f"kept: layer {mlp.layer} has no list of whole numbers: give the indices of the neurons that stay.")
        indices = indices.to(mlp.down.weight.device, torch.int64)
        if (indices.diff() <= 0).any():
            raise UserError(f"kept: neurons of layer {mlp.layer} repeat or are out of order: give each once, ascending.")
        if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < mlp.width:
            wrong = int(indices[0]) if indices[0] < 0 else int(indices[-1])
            raise UserError(
                f"kept: neuron {wrong} of layer {mlp.layer} does not exist with intermediate_size {mlp.width}: prune the model "
                "that was scored."
            )
        found.append(indices)
    return found
