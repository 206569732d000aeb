"""Probes: a few tokens that show, before hours of work, whether a model is what the kit takes it for."""

import contextlib
import copy

import torch

from hfprune_nb.errors import UserError
from hfprune_nb.models.units import gated_mlp, gated_mlps

_TOKENS = 8
_TOLERANCE = 1e-5  # of the largest output, in float32; the dependence of a threshold on one neuron is ten times that


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


def _calls(model, modules) -> list[list]:
    """Return the arguments of every call of each module in one forward pass over a few tokens."""
    calls, rows = [[] for _ in modules], model.get_input_embeddings().weight
    with contextlib.ExitStack() as stack:
        for module, seen in zip(modules, calls, strict=True):
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        model.get_decoder()(input_ids=torch.arange(_TOKENS, device=rows.device)[None] % len(rows), use_cache=False)
    return calls


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
