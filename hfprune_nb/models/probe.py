"""Probes: a few tokens that show, before hours of work, whether a model is what the kit takes it for."""

import contextlib
import copy

import torch

from hfprune_nb.errors import UserError
from hfprune_nb.models.units import attention_groups, gated_mlp, gated_mlps, layer_groups, set_groups

_TOKENS = 8
_TOLERANCE = 1e-5  # of the largest output, in float32; the dependence of a threshold on one neuron is ten times that
# Of a final hidden state, whose text read apart and in company went through other sums; company that is read is ten times that.
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.05}
_ROUNDING_WIDE = 1e-3


@torch.no_grad()
def check_neurons(model) -> None:
    """Raise UserError unless a silenced neuron is as good as a removed one in `model`, which is left as it was.

    One MLP of each make runs in float32 or wider on what a few tokens bring to it, once with neurons silenced (zero in front of
    `down_proj`) and once without them; first one neuron, then half of them. An activation whose threshold depends on the other
    neurons (Gemma 3n) fails, as does an MLP that runs more than once, or not at all, in a forward pass.
    """
    mlps, architecture = gated_mlps(model), type(model).__name__
    layers = model.get_decoder().layers
    calls = _calls(model, [layer.mlp for layer in layers])
    if bad := next((mlp.layer for mlp in mlps if len(calls[mlp.layer]) != 1), None):
        raise UserError(
            f"model: {architecture} is not supported: the MLP of layer {bad} runs {len(calls[bad])} times for a token."
        )
    for layer in {_make(layers[mlp.layer].mlp): mlp.layer for mlp in mlps if mlp.width > 1}.values():
        args, kwargs = calls[layer][0]
        whole = _wide(layers[layer].mlp)
        for removed in (1, mlps[layer].width // 2):
            kept = torch.arange(removed, mlps[layer].width)
            narrow = copy.deepcopy(whole)
            gated_mlp(layer, narrow, architecture).keep(kept)
            with _silenced(gated_mlp(layer, whole, architecture).down, removed):
                expected = whole(*_wide(args), **_wide(kwargs))
            difference = (narrow(*_wide(args), **_wide(kwargs)) - expected).abs().max()
            if difference > _TOLERANCE * expected.abs().max():
                raise UserError(
                    f"model: {architecture} is not supported: in layer {layer} the other neurons change when one is removed "
                    f"(by {float(difference):.2g} of {float(expected.abs().max()):.2g}), so no importance could foresee it."
                )


@torch.no_grad()
def check_groups(model) -> None:
    """Raise UserError unless a silenced attention group is as good as a removed one in `model`, which is left as it was.

    The attention of the first layer runs in float32 or wider on what a few tokens bring to it, as `check_neurons` does. Raises
    UserError also where a layer's attention does not run once in a forward pass.
    """
    groups, architecture = attention_groups(model), type(model).__name__
    calls = _calls(model, [unit.module for unit in groups])
    if bad := next((unit.layer for unit in groups if len(calls[unit.layer]) != 1), None):
        raise UserError(
            f"attention_groups: {architecture} is not supported: the attention of layer {bad} runs {len(calls[bad])} times."
        )
    (args, kwargs), own = calls[0][0], groups[0]
    if own.width == 1:
        return
    whole = _wide(own.module)
    if "flash" in whole.config._attn_implementation:  # its kernels know no float32
        whole.config._attn_implementation = "sdpa"
    with _silenced(whole.o_proj, own.channels):
        expected = whole(*_wide(args), **_wide(kwargs))[0]
    narrow = copy.deepcopy(whole)
    layer_groups(0, narrow, narrow.config, architecture).keep(torch.arange(1, own.width))
    set_groups(narrow.config, own.queries, own.width - 1, own.head_dim)
    difference = (narrow(*_wide(args), **_wide(kwargs))[0] - expected).abs().max()
    if difference > _TOLERANCE * expected.abs().max():
        raise UserError(
            f"attention_groups: {architecture} is not supported: in layer 0 the other groups change when one is removed "
            f"(by {float(difference):.2g} of {float(expected.abs().max()):.2g}), so no importance could foresee it."
        )


@torch.no_grad()
def reads_packed(model) -> bool:
    """Return whether texts in one row, told apart by positions that start again, are read as if each stood alone.

    Layers that ignore positions and masks (linear attention, state spaces, convolutions) read on from one text into the next.
    """
    decoder, device = model.get_decoder(), model.get_input_embeddings().weight.device
    texts = [torch.arange(start, start + _TOKENS, device=device)[None] for start in (0, _TOKENS)]
    positions = torch.arange(_TOKENS, device=device).repeat(2)[None]
    with widened(model):
        packed = decoder(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False).last_hidden_state
        apart = [decoder(input_ids=text, use_cache=False).last_hidden_state for text in texts]
    return agree(packed, torch.cat(apart, 1))


@contextlib.contextmanager
def widened(model):
    """Within the context the decoder computes in float32 or wider, one part of it after the other.

    Half precision would hide what is looked for: after thirty layers the same text in another batch may differ by a tenth.
    """
    decoder, kept = model.get_decoder(), {}

    def widen(module, args, kwargs):
        for parameter in module.parameters():
            kept[parameter] = parameter.data
            parameter.data = _wide(parameter.data)
        return _wide(args), _wide(kwargs)

    def restore(module, args, output):
        for parameter in module.parameters():
            parameter.data = kept.pop(parameter)

    parts = [
        part
        for part in (*decoder.layers, *decoder.children())
        if part is not decoder.layers and next(part.parameters(), None) is not None
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [setattr(parameter, "data", data) for parameter, data in kept.items()])
        for part in parts:
            stack.callback(part.register_forward_pre_hook(widen, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(restore).remove)
        yield


def check_recomputation(model) -> None:
    """Raise UserError where layers, each computed again from its own input, give other gradients than the whole model.

    A layer whose keys and values serve later layers too (Gemma 3n and 4) has a gradient through these, which its own output does
    not show.
    """
    layers = model.get_decoder().layers
    calls: list = []
    outputs: list = []

    def note(_, args, kwargs):
        # Weights are frozen: without this leaf no graph exists.
        calls.append((args[0] if calls else args[0].detach().requires_grad_(), args[1:], kwargs))
        return (calls[-1][0], *args[1:]), kwargs

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.callback(layers[-1].register_forward_hook(lambda _, args, output: outputs.append(output)).remove)
        _read(model)
    gradient = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(outputs[0])
    whole = torch.autograd.grad(outputs[0], [states for states, _, _ in calls], gradient)
    for index, (layer, (states, args, kwargs), expected) in reversed(list(enumerate(zip(layers, calls, whole, strict=True)))):
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            output = layer(leaf, *args, **kwargs)
        gradient = torch.autograd.grad(output, leaf, gradient.to(output.device))[0]
        if not agree(gradient, expected):
            raise UserError(
                f"activation_checkpointing: later layers of {type(model).__name__} read more of layer {index} than its output "
                "(shared keys and values), so it cannot be computed again alone: switch it off and lower batch_size."
            )


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether states, or gradients for them, (..., hidden) of the same tokens differ by no more than rounding does."""
    tolerance = _ROUNDING.get(expected.dtype, _ROUNDING_WIDE)
    found, expected = found.double(), expected.double()
    return bool(((found - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())


def _calls(model, modules) -> list[list]:
    """Return the arguments of every call of each module in one forward pass over a few tokens."""
    calls: list[list] = [[] for _ in modules]
    with contextlib.ExitStack() as stack:
        for module, seen in zip(modules, calls, strict=True):
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        _read(model)
    return calls


def _read(model) -> None:
    rows = model.get_input_embeddings().weight
    model.get_decoder()(input_ids=torch.arange(_TOKENS, device=rows.device)[None] % len(rows), use_cache=False)


def _make(mlp) -> str:
    """Return what makes an MLP another one than its neighbour: modules, sizes, and numbers that its forward may read."""
    settings = {name: value for name, value in vars(mlp).items() if isinstance(value, int | float | str) and "layer" not in name}
    return f"{mlp}{settings}"


def _wide(found):
    """Return a copy of a module, of tensors or of containers of them, in float32 or wider."""
    if isinstance(found, torch.nn.Module):
        return copy.deepcopy(found).to(torch.promote_types(next(found.parameters()).dtype, torch.float32))
    if isinstance(found, torch.Tensor) and found.is_floating_point():
        return found.to(torch.promote_types(found.dtype, torch.float32))
    if isinstance(found, dict):
        return {name: _wide(value) for name, value in found.items()}
    return tuple(map(_wide, found)) if isinstance(found, tuple) else found


@contextlib.contextmanager
def _silenced(down, count: int):
    def silence(_, inputs):
        hidden = inputs[0].clone()
        hidden[..., :count] = 0
        return (hidden,)

    handle = down.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()
