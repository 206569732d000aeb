"""Hooks where neurons and attention groups are watched, and where they are silenced without being removed."""

import contextlib
import functools

import torch

from hfprune_nb.models.units import attention_groups, gated_mlps, kept_indices


@contextlib.contextmanager
def frozen(model):
    """Within the context, the model is as for inference: in evaluation mode, and no parameter or embedding asks for a gradient.

    Training with checkpointing or adapters makes embeddings ask for one, by a hook of the model's own.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.detach())
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextlib.contextmanager
def replaced(model, replace, units=gated_mlps):
    """Within the context, every MLP hidden activation h (batch, seq, neurons) of layer l becomes `replace(l, h)`.

    With `units=attention_groups` it is what the heads give to `o_proj` (batch, seq, groups * channels).
    """
    handles = [
        unit.output.register_forward_pre_hook(lambda _, inputs, layer=unit.layer: (replace(layer, inputs[0]),))
        for unit in units(model)
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


def silenced(model, kept, groups=None):
    """Return a context in which all neurons but `kept`, ascending indices for each layer, are zero; shapes stay as they are.

    groups : the attention groups that stay, in the same way; None: all.
    """
    chosen = [(units, rows) for units, rows in ((gated_mlps, kept), (attention_groups, groups)) if rows is not None]
    return _masked(model, [(units, _masks(units(model), rows)) for units, rows in chosen])


def silenced_rows(model, kept):
    """Return a context in which each row of a batch is another pruned model: in row r all neurons but `kept[r]` are zero.

    kept : for each row what `silenced` takes; a batch must have as many rows.
    """
    mlps = gated_mlps(model)
    masks = [torch.stack(layer)[:, None] for layer in zip(*(_masks(mlps, row) for row in kept), strict=True)]
    return replaced(model, lambda layer, hidden: hidden * masks[layer])


@contextlib.contextmanager
def _masked(model, chosen):
    with contextlib.ExitStack() as stack:
        for units, masks in chosen:
            stack.enter_context(replaced(model, lambda layer, hidden, masks=masks: hidden * masks[layer], units))
        yield


def _masks(units, kept):
    masks = [torch.zeros(unit.width, dtype=unit.output.weight.dtype, device=unit.output.weight.device) for unit in units]
    for mask, indices in zip(masks, kept_indices(units, kept), strict=True):
        mask[indices] = 1
    return [mask.repeat_interleave(unit.channels) for mask, unit in zip(masks, units, strict=True)]
