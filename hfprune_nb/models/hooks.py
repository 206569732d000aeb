"""Hooks in every gated MLP: where neurons are watched, and where they are silenced without being removed."""

import contextlib
import functools

import torch

from hfprune_nb.models.units import gated_mlps, kept_indices


@contextlib.contextmanager
def replaced(model, replace):
    """Within the context, every MLP hidden activation h (batch, seq, neurons) of layer l becomes `replace(l, h)`."""
    handles = [
        mlp.down.register_forward_pre_hook(lambda _, inputs, layer=mlp.layer: (replace(layer, inputs[0]),))
        for mlp in gated_mlps(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def factored(model, replace):
    """Within the context, one factor f of every layer's h becomes `replace(l, f)`: that with `f * dC/df = h * dC/dh`.

    As `h = act(gate x) * up x`, it is `up x`, which autograd holds anyway while h itself would be kept for nothing else. Where
    gate and up are fused it is h.
    """
    with contextlib.ExitStack() as stack:
        for mlp in gated_mlps(model):
            if mlp.up is None:
                hook = mlp.down.register_forward_pre_hook(lambda _, inputs, layer=mlp.layer: (replace(layer, inputs[0]),))
            else:
                hook = mlp.up.register_forward_hook(lambda _, inputs, output, layer=mlp.layer: replace(layer, output))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def linear_outputs(model, replace):
    """Within the context, every output y of an MLP's linear modules becomes `replace(l, name, y, x)`, x being its input.

    name : `gate` and `up`, or `fused`, then `down`.
    """
    with contextlib.ExitStack() as stack:
        for mlp in gated_mlps(model):
            for name in ("gate", "up", "fused", "down"):
                if (module := getattr(mlp, name)) is not None:
                    note = functools.partial(_replace_output, replace, mlp.layer, name)
                    stack.callback(module.register_forward_hook(note).remove)
        yield


def _replace_output(replace, layer, name, _module, inputs, output):
    return replace(layer, name, output, inputs[0])


def silenced(model, kept):
    """Return a context in which all neurons but `kept`, ascending indices for each layer, are zero; shapes stay as they are."""
    mlps, masks = gated_mlps(model), []
    for mlp, indices in zip(mlps, kept_indices(mlps, kept), strict=True):
        mask = torch.zeros(mlp.width, dtype=mlp.down.weight.dtype, device=mlp.down.weight.device)
        mask[indices] = 1
        masks.append(mask)
    return replaced(model, lambda layer, hidden: hidden * masks[layer])
