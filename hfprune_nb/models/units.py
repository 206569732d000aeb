"""What can be removed from a model: the neurons of its gated MLPs."""

import dataclasses
import hashlib
import re

import torch
from torch import nn

from hfprune_nb.errors import UserError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    def input_weights(self) -> list[torch.Tensor]:
        """The weights of gate and up, (neurons, hidden) each."""
        return list(self.fused.weight.chunk(2)) if self.fused is not None else [self.gate.weight, self.up.weight]

    @property
    def parameters_per_neuron(self) -> int:
        """Parameters that go when one neuron is removed: its rows, their biases, and its column of `down`."""
        rows = sum(module.in_features + (module.bias is not None) for module in self.inputs)
        return rows * (2 if self.fused is not None else 1) + self.down.out_features

    def keep(self, indices: torch.Tensor) -> None:
        """Remove, in place, all neurons but those at `indices` (neurons kept,), in that order."""
        indices = indices.to(self.down.weight.device)
        rows = torch.cat([indices, indices + self.width]) if self.fused is not None else indices
        for module in self.inputs:
            _take(module, rows, dimension=0)
        _take(self.down, indices, dimension=1)


def gated_mlps(model) -> list[GatedMLP]:
    """Return the gated MLP of every decoder layer, first to last.

    Raises UserError, which says what was looked for, where a layer has none, and where it has more than such an MLP: weights of
    another kind in it (a norm inside, quantised or adapted linear modules), experts beside it, or an MLP shared by two layers.
    There the neurons that the kit would score and remove would not be what the model computes with.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    architecture = type(model).__name__
    if not layers:
        raise UserError(f"model: {architecture} is not supported: no `layers` list was found in its decoder.")
    found = [gated_mlp(index, getattr(layer, "mlp", None), architecture) for index, layer in enumerate(layers)]
    if len({id(mlp.down) for mlp in found}) < len(found):
        raise UserError(f"model: {architecture} is not supported: its layers share an MLP.")
    for index, layer in enumerate(layers):
        if experts := [name for name, _ in layer.named_children() if re.search("expert|router|moe", name)]:
            raise UserError(f"model: {architecture} is not supported: layer {index} has experts beside its MLP (`{experts[0]}`).")
    return found


def gated_mlp(index: int, mlp: nn.Module | None, architecture: str) -> GatedMLP:
    """Return the module `mlp` of layer `index` as a `GatedMLP`; raise UserError where it is none, or more than that."""
    parts = {name: getattr(mlp, name, None) for name in ("down_proj", "gate_proj", "up_proj", "gate_up_proj")}
    linear = {name: module for name, module in parts.items() if isinstance(module, nn.Linear)}
    if {"down_proj", "gate_proj", "up_proj"} <= linear.keys():
        found = GatedMLP(index, parts["down_proj"], gate=parts["gate_proj"], up=parts["up_proj"])
    elif {"down_proj", "gate_up_proj"} <= linear.keys():
        found = GatedMLP(index, parts["down_proj"], fused=parts["gate_up_proj"])
    else:
        raise UserError(
            f"model: {architecture} is not supported: layer {index} has no gated MLP (looked for linear modules "
            "`mlp.down_proj` with `mlp.gate_proj` and `mlp.up_proj`, or with a fused `mlp.gate_up_proj`)."
        )
    for module in (found.down, *found.inputs):
        # Quantised and adapted modules are subclasses, or hold tensors that are; their weights mean something else.
        if type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor or module.weight.dtype not in _FLOATS:
            raise UserError(
                f"model: the MLP of layer {index} holds {type(module).__name__} with {type(module.weight.data).__name__} of "
                f"{module.weight.dtype} in place of plain linear weights: give the model unquantised, and adapters merged."
            )
    own = {id(parameter) for module in (found.down, *found.inputs) for parameter in module.parameters()}
    for name, parameter in mlp.named_parameters():
        if id(parameter) not in own:
            raise UserError(
                f"model: {architecture} is not supported: the MLP of layer {index} has `{name}` beside its linear modules, so a "
                "removed neuron would change the others."
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


def _take(module: nn.Linear, indices: torch.Tensor, dimension: int) -> None:
    weight = module.weight.detach().index_select(dimension, indices).contiguous()
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if dimension == 0:
        module.out_features = len(indices)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[indices].clone(), requires_grad=module.bias.requires_grad)
    else:
        module.in_features = len(indices)
