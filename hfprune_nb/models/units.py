"""What can be removed from a model: the neurons of its gated MLPs, and the key-value groups of its attention."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence, Sized
from typing import Any, ClassVar

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
    noun: ClassVar[str] = "neuron"
    channels: ClassVar[int] = 1

    @property
    def output(self) -> nn.Linear:
        """The module whose input is h."""
        return self.down

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


@dataclasses.dataclass(frozen=True)
class AttentionGroups:
    """One layer's attention as key-value groups: each is one key-value head with all query heads that read it.

    Where each query head has keys and values of its own, a group is a head. `query`, `key` and `value` are separate linear
    modules, or all None where `fused` holds their rows one after the other (Phi-3); the input of `output` holds head_dim
    channels for each query head, those of a group beside each other. queries : query heads of a group.
    """

    layer: int
    module: nn.Module
    output: nn.Linear
    head_dim: int
    queries: int
    query: nn.Linear | None = None
    key: nn.Linear | None = None
    value: nn.Linear | None = None
    fused: nn.Linear | None = None
    noun: ClassVar[str] = "group"

    @property
    def channels(self) -> int:
        """Channels of one group in the input of `output`."""
        return self.queries * self.head_dim

    @property
    def width(self) -> int:
        """Number of groups (num_key_value_heads)."""
        return self.output.in_features // self.channels

    @property
    def parameters_per_group(self) -> int:
        """Parameters that go when one group is removed: its rows of the projections, their biases, its columns of `output`."""
        columns = self.channels * self.output.out_features
        if self.fused is not None:
            return columns + (self.channels + 2 * self.head_dim) * _row(self.fused)
        return columns + self.channels * _row(self.query) + self.head_dim * (_row(self.key) + _row(self.value))

    def keep(self, indices: torch.Tensor) -> None:
        """Remove, in place, all groups but those at `indices` (groups kept,), in that order; norms of a head are shared and stay.

        The configuration, which some architectures read while they run, is `set_groups`'s to write.
        """
        indices = indices.to(self.output.weight.device)
        queries, keys = _channels(indices, self.channels), _channels(indices, self.head_dim)
        if self.fused is not None:
            first = self.output.in_features
            _take(self.fused, torch.cat([queries, first + keys, first + self.width * self.head_dim + keys]), dimension=0)
        else:
            for module, rows in ((self.query, queries), (self.key, keys), (self.value, keys)):
                _take(module, rows, dimension=0)
        if hasattr(self.module, "num_key_value_heads"):
            self.module.num_key_value_heads = len(indices)
        _take(self.output, queries, dimension=1)


def attention_groups(model) -> list[AttentionGroups]:
    """Return the key-value groups of every decoder layer's attention, first to last.

    Raises UserError, which says what was looked for, where a layer has none such, where layers differ in their numbers, and where
    the attention holds weights that belong to no single group (norms over all heads, sinks, gates).
    """
    config, architecture = model.config.get_text_config(), type(model).__name__
    layers = getattr(model.get_decoder(), "layers", ())
    found = [layer_groups(index, getattr(layer, "self_attn", None), config, architecture) for index, layer in enumerate(layers)]
    if len({(groups.width, groups.head_dim) for groups in found}) != 1:
        raise UserError(f"attention_groups: {architecture} is not supported: its layers have different numbers of heads.")
    return found


def set_groups(config, queries: int, groups: int, head_dim: int) -> None:
    """Write `groups` key-value heads with `queries` query heads each into a text configuration.

    head_dim : stated, as transformers would otherwise compute it anew from the fewer heads.
    """
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = queries * groups, groups, head_dim


def layer_groups(index: int, module: nn.Module | None, config, architecture: str) -> AttentionGroups:
    """Return the attention `module` of layer `index` as `AttentionGroups`; raise UserError where it is none, or more."""
    linear = {name: part for name, part in module.named_children() if type(part) is nn.Linear} if module is not None else {}
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, sizes = heads // groups, {"q_proj": heads, "k_proj": groups, "v_proj": groups, "qkv_proj": heads + 2 * groups}
    if linear.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        parts = {"query": linear["q_proj"], "key": linear["k_proj"], "value": linear["v_proj"]}
    elif linear.keys() == {"qkv_proj", "o_proj"}:
        parts = {"fused": linear["qkv_proj"]}
    else:
        raise UserError(
            f"attention_groups: {architecture} is not supported: the attention of layer {index} is not made of linear modules "
            "`self_attn.q_proj`, `k_proj`, `v_proj` (or a fused `qkv_proj`) and `o_proj`."
        )
    fits = all(linear[name].out_features == head_dim * size for name, size in sizes.items() if name in linear)
    own = {id(parameter) for part in linear.values() for parameter in part.parameters()}
    others = [name for name, parameter in module.named_parameters() if id(parameter) not in own and len(parameter) != head_dim]
    if not fits or linear["o_proj"].in_features != head_dim * heads or others:
        raise UserError(
            f"attention_groups: {architecture} is not supported: the attention of layer {index} is not {groups} groups of "
            f"{queries} query heads with one key and one value head of {head_dim} channels each"
            + (f", but has `{others[0]}` over all of them." if others else ".")
        )
    return AttentionGroups(index, module, linear["o_proj"], head_dim, queries, **parts)


def _row(module: nn.Linear) -> int:
    return module.in_features + (module.bias is not None)


def _channels(indices: torch.Tensor, size: int) -> torch.Tensor:
    return (indices[:, None] * size + torch.arange(size, device=indices.device)).flatten()


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


def kept_indices(units: Sequence[GatedMLP | AttentionGroups], kept) -> list[torch.Tensor]:
    """Return the kept neurons, or groups, of each layer as int64 tensors on its device, after a check.

    kept : for each layer ascending indices, as a tensor, an array or a list. Raises UserError for another number of layers, and
    for indices that repeat, are out of order, or are no unit of their layer.
    """
    if not isinstance(kept, Sized):
        raise UserError(f"kept: {kept!r} is no list: give for each layer the indices that stay.")
    if len(kept) != len(units):
        raise UserError(
            f"kept: indices for {len(kept)} layers do not fit the {len(units)} layers: prune the model that was scored."
        )
    found = []
    rows: Any = kept
    for unit, row in zip(units, rows, strict=True):
        layer, noun = unit.layer, unit.noun
        try:
            indices = torch.as_tensor(row if len(row) else [], dtype=None if len(row) else torch.int64)
        except TypeError:
            indices = torch.empty(0, 0)
        if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise UserError(f"kept: layer {layer} has no list of whole numbers: give the indices of the {noun}s that stay.")
        indices = indices.to(unit.output.weight.device, torch.int64)
        if (indices.diff() <= 0).any():
            raise UserError(f"kept: {noun}s of layer {layer} repeat or are out of order: give each once, ascending.")
        if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < unit.width:
            wrong = int(indices[0]) if indices[0] < 0 else int(indices[-1])
            raise UserError(
                f"kept: {noun} {wrong} of layer {layer} does not exist among {unit.width}: prune the model that was scored."
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
