"""What silencing neurons really does to a model: the change that the criteria try to predict from one gradient.

A silenced neuron changes nothing before its own layer. The dense model's hidden states at the input of every layer are
therefore kept, and an ablation computes its layer and those behind it; several ablations of one layer share a batch.
The changes are tiny for single neurons, so the model should be loaded in float32, and differences are formed before
they are summed.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.models import Head, final_hidden, gated_mlps, head
from hfprune_nb.progress import bar

SINGLE, RANDOM_GROUP, LOWEST = "single", "random group", "lowest by "
CHUNK = 64  # positions whose logits exist at once


@dataclass(frozen=True)
class Ablation:
    """Neurons of one layer that are silenced together; `kind` says how they were chosen."""

    layer: int
    neurons: tuple[int, ...]
    kind: str


def sample(
    importance: dict[str, list[np.ndarray]], n_layers: int, n_single: int, group_sizes: list[int], n_groups: int, seed: int
) -> list[Ablation]:
    """Draw the ablations of an experiment from `n_layers` layers, evenly spaced from first to last.

    importance : criterion -> (neurons,) of each layer; its mean rank within a layer stratifies the sample.
    In each layer: one neuron from each of `n_single - 1` strata of equal size, and the most important one (kind
    `single`); for every size `n_groups` random groups, and by each criterion the group of its least important neurons
    (kind `lowest by CRITERION`). Raises UserError when a layer has fewer neurons than a group.
    """
    ranks = [np.mean([stats.rankdata(row) for row in rows], axis=0) for rows in zip(*importance.values(), strict=True)]
    random = np.random.default_rng(seed)
    chosen = []
    for layer in np.unique(np.linspace(0, len(ranks) - 1, n_layers).round().astype(int)):
        width, most = len(ranks[layer]), max([n_single, *group_sizes])
        if most > width:
            raise UserError(f"group_sizes: layer {layer} has {width} neurons, fewer than the {most} asked for")
        ascending = np.argsort(ranks[layer], kind="stable")
        strata = np.array_split(ascending[:-1], n_single - 1) if n_single > 1 else []
        singles = [random.choice(stratum) for stratum in strata] + [ascending[-1]] * (n_single > 0)
        chosen += [Ablation(int(layer), (int(neuron),), SINGLE) for neuron in singles]
        for size in group_sizes:
            for _ in range(n_groups):
                chosen.append(_group(layer, random.choice(width, size, replace=False), RANDOM_GROUP))
            for criterion, values in importance.items():
                chosen.append(_group(layer, np.argsort(values[layer], kind="stable")[:size], LOWEST + criterion))
    return chosen


def _group(layer: int, neurons: np.ndarray, kind: str) -> Ablation:
    return Ablation(int(layer), tuple(sorted(map(int, neurons))), kind)


@torch.no_grad()
def measure(model, windows: np.ndarray, ablations: list[Ablation], together: int = 4, progress: bool = True) -> pd.DataFrame:
    """Silence each ablation's neurons and measure the change on windows (windows, seq) of token ids.

    Returns one row per ablation, in the given order: layer, kind, size, neurons (list), and means over positions in nats,
    kl : KL(dense || ablated); ce : change of the cross-entropy of the next token; entropy : change of the entropy.
    together : ablations of one layer that share a forward pass; changes memory and speed only. The dense logits of all
    windows are held in float32. Raises UserError for a model whose layers cannot be run one by one.
    """
    ids = torch.as_tensor(np.asarray(windows), dtype=torch.long, device=model.device)
    dense = _dense_run(model, ids)
    rows = {}
    by_layer = sorted(range(len(ablations)), key=lambda index: -ablations[index].layer)
    with bar(len(ablations), "ablation", "ablations", enabled=progress) as progress_bar:
        for part in _batches(by_layer, ablations, together):
            hidden = _ablated_hidden(model, dense, [{ablations[index].layer: ablations[index].neurons} for index in part])
            for index, states in zip(part, hidden.split(len(ids)), strict=True):
                rows[index] = _changes(dense, states, ids)
            progress_bar.update(len(part))
    facts = [{"layer": a.layer, "kind": a.kind, "size": len(a.neurons), "neurons": list(a.neurons)} for a in ablations]
    return pd.DataFrame([fact | rows[index] for index, fact in enumerate(facts)])


class Ablator:
    """Measures ablations on one batch of windows (batch, seq), whose dense forward pass is run once and kept.

    together : ablations that share a forward pass; changes memory and speed only.
    """

    def __init__(self, model, ids: torch.Tensor, together: int = 16):
        self.model, self.ids, self.together = model, ids, together
        with torch.no_grad():
            self.dense = _dense_run(model, ids)

    @torch.no_grad()
    def __call__(self, ablations: list[dict[int, Sequence[int]]]) -> torch.Tensor:
        """Return KL(dense || ablated) of each ablation, a mapping from layers to neurons, and window: (ablations, windows).

        The mean over positions, in nats and float64.
        """
        rows = []
        for start in range(0, len(ablations), self.together):
            part = ablations[start : start + self.together]
            hidden = _ablated_hidden(self.model, self.dense, part)
            for states in hidden.split(len(self.ids)):
                kl = torch.cat([kl for kl, _, _ in _position_changes(self.dense, states, self.ids)])
                rows.append(kl.view(self.ids.shape).mean(1))
        return torch.stack(rows) if rows else self.ids.new_zeros(0, len(self.ids), dtype=torch.float64)  # of an empty layer


@torch.no_grad()
def mlp_influence(model, ids: torch.Tensor) -> list[float]:
    """Return for each layer `1 - cos(x, y)`, the mean over tokens, x and y being the residual stream before and behind its MLP.

    ids : (windows, seq). Where the layer adds anything else behind the MLP, such as a bias, x has it too.
    """
    dense, found = _dense_run(model, ids), []
    for index, layer in enumerate(model.get_decoder().layers):
        behind = _through(layer, dense.inputs[index], dense.settings[index])
        hook = functools.partial(_masked, 0)
        with contextlib.ExitStack() as stack:
            stack.callback(gated_mlps(model)[index].down.register_forward_pre_hook(hook).remove)
            before = _through(layer, dense.inputs[index], dense.settings[index])
        found.append(1 - float(torch.cosine_similarity(before.double(), behind.double(), dim=-1).mean()))
    return found


def first_order(model, windows: np.ndarray, progress: bool = True) -> dict[str, list[np.ndarray]]:
    """Return what one gradient predicts for silencing each neuron, an array (neurons,) for each layer, in nats.

    `ce` and `entropy` : the signed change, minus the sum over positions of `h dC/dh` with C averaged over a window's
    positions, mean over windows. `abs_ce` and `abs_entropy` : the same sum of absolute values, which is HFPrune's Eq. 4.
    """
    mlps, model_head = gated_mlps(model), head(model)
    totals = {name: [np.zeros(mlp.width) for mlp in mlps] for name in ("ce", "entropy", "abs_ce", "abs_entropy")}
    with bar(len(windows), "window", "first order", enabled=progress) as progress_bar:
        for window in windows:
            for name, gradients in _gradients(model, mlps, model_head, window):
                for layer, product in enumerate(gradients):
                    totals[name][layer] -= product.sum(dim=(0, 1)).cpu().numpy()
                    totals[f"abs_{name}"][layer] += product.abs().sum(dim=(0, 1)).cpu().numpy()
            progress_bar.update(1)
    return {name: [row / len(windows) for row in rows] for name, rows in totals.items()}


def _gradients(model, mlps, model_head: Head, window: np.ndarray) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield `h dC/dh` of every layer, (1, seq, neurons) float64, for the mean cross-entropy and the mean entropy."""
    ids = torch.as_tensor(np.asarray(window), dtype=torch.long, device=model.device)[None]
    with torch.enable_grad(), _watched(mlps) as watched:
        log_p = torch.log_softmax(model_head.logits(final_hidden(model, ids)[0]), -1)
        ce = torch.nn.functional.nll_loss(log_p[:-1], ids[0, 1:].to(log_p.device))
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    for name, value in (("ce", ce), ("entropy", entropy)):
        gradients = torch.autograd.grad(value, watched, retain_graph=name == "ce")
        yield name, [(states.detach() * gradient).double() for states, gradient in zip(watched, gradients, strict=True)]


@dataclass(frozen=True)
class _Dense:
    inputs: list[torch.Tensor]  # of each layer, (windows, seq, hidden)
    settings: list[dict]  # keyword arguments of each layer
    head: Head
    logits: torch.Tensor  # (windows * seq, vocabulary)
    log_p: torch.Tensor  # (windows * seq, vocabulary)


def _dense_run(model, ids: torch.Tensor) -> _Dense:
    layers, inputs, settings = model.get_decoder().layers, [], []

    def keep(_, positional, named):
        inputs.append(positional[0])
        settings.append(named)

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        hidden = final_hidden(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    again = _from_layer(model, len(layers) - 1, inputs[-1], settings, 1, len(ids))
    if not torch.allclose(again, hidden, rtol=1e-3, atol=1e-3 * hidden.abs().max().item()):
        raise UserError(f"model: the layers of {type(model).__name__} cannot be run one by one: choose another model")
    model_head = head(model)
    logits = model_head.logits(hidden.flatten(0, 1))
    return _Dense(inputs, settings, model_head, logits, torch.log_softmax(logits, -1))


def _from_layer(model, first: int, hidden: torch.Tensor, settings: list[dict], copies: int, n_windows: int) -> torch.Tensor:
    """Return the final hidden states, given the input of layer `first` for `copies` times the windows."""
    decoder = model.get_decoder()
    for layer, named in zip(decoder.layers[first:], settings[first:], strict=True):
        hidden = _through(layer, hidden, named, copies, n_windows)
    return decoder.norm(hidden)


def _through(layer, hidden, named, copies=1, n_windows=1):
    """Return the output of one layer, given its input for `copies` times the windows."""
    output = layer(hidden, **{name: _repeated(value, copies, n_windows) for name, value in named.items()})
    return output[0] if isinstance(output, tuple) else output


def _repeated(value, copies: int, n_windows: int):
    """Repeat what a layer gets per window (masks, rotations) for every copy; what holds for all windows stays."""
    if isinstance(value, tuple):
        return tuple(_repeated(item, copies, n_windows) for item in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == n_windows:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value


def _batches(order: list[int], ablations: list[Ablation], together: int) -> Iterator[list[int]]:
    for layer in dict.fromkeys(ablations[index].layer for index in order):
        members = [index for index in order if ablations[index].layer == layer]
        yield from (members[start : start + together] for start in range(0, len(members), together))


def _ablated_hidden(model, dense: _Dense, ablations: list[dict[int, Sequence[int]]]) -> torch.Tensor:
    """Return the final hidden states (ablations * windows, seq, hidden), ablation by ablation, from the first layer concerned."""
    mlps = gated_mlps(model)
    masks: dict = {}
    n_windows = len(dense.inputs[0])
    for row, ablation in enumerate(ablations):
        for layer, neurons in ablation.items():
            weight = mlps[layer].down.weight
            mask = masks.setdefault(layer, weight.new_ones(len(ablations), 1, weight.shape[1]))
            mask[row, :, list(neurons)] = 0
    first = min(masks)
    with contextlib.ExitStack() as stack:
        for layer, mask in masks.items():
            hook = functools.partial(_masked, mask.repeat_interleave(n_windows, dim=0))
            stack.callback(mlps[layer].down.register_forward_pre_hook(hook).remove)
        repeated = dense.inputs[first].repeat(len(ablations), 1, 1)
        return _from_layer(model, first, repeated, dense.settings, len(ablations), n_windows)


def _masked(mask, _, positional):
    return (positional[0] * mask,)


def _changes(dense: _Dense, hidden: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Return the mean changes of one ablation, from final hidden states (windows, seq, hidden)."""
    sums = torch.zeros(3, dtype=torch.float64)
    ends = torch.arange(1, ids.numel() + 1, device=dense.logits.device) % ids.shape[1] == 0
    for (kl, ce, entropy), end in zip(_position_changes(dense, hidden, ids), ends.split(CHUNK), strict=True):
        sums += torch.stack([kl.sum(), ce[~end].sum(), entropy.sum()]).cpu()
    counts = (ids.numel(), ids.numel() - len(ids), ids.numel())
    return {name: float(total) / count for name, total, count in zip(("kl", "ce", "entropy"), sums, counts, strict=True)}


def _position_changes(dense: _Dense, hidden: torch.Tensor, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `changes` of chunks of positions, from final hidden states (windows, seq, hidden)."""
    # The first and the last layer of a model may lie on different GPUs.
    next_tokens = torch.roll(ids, -1, dims=1).flatten().to(dense.logits.device)
    states = hidden.flatten(0, 1).split(CHUNK)
    parts = zip(states, dense.logits.split(CHUNK), dense.log_p.split(CHUNK), next_tokens.split(CHUNK), strict=True)
    for state, logits, log_p, next_token in parts:
        yield changes(dense.head.logits(state), logits, log_p, next_token)


def changes(logits: torch.Tensor, dense_logits: torch.Tensor, dense_log_p: torch.Tensor, next_tokens: torch.Tensor):
    """Return KL(dense || changed) and the changes of cross-entropy and entropy per position, float64 tensors in nats.

    logits, dense_logits, dense_log_p : (positions, vocabulary); next_tokens : (positions,).
    All three are written in the difference of the logits, centred under the dense distribution, so that changes far
    below the rounding of a log-probability survive: with `d` centred, `KL = log1p(sum p (e^d - 1 - d))`.
    """
    p = dense_log_p.exp()
    difference = logits - dense_logits
    difference -= torch.einsum("pv,pv->p", p, difference)[:, None]
    kl = torch.log1p(torch.einsum("pv,pv->p", p, torch.expm1(difference) - difference))
    ce = kl - difference.gather(1, next_tokens[:, None])[:, 0]
    # The changed distribution is p (1 + r).
    r = torch.expm1(difference - kl[:, None]).mul_(p)
    entropy = kl - torch.einsum("pv,pv->p", r, difference.add_(dense_log_p))
    return kl.double(), ce.double(), entropy.double()


@contextlib.contextmanager
def _watched(mlps) -> Iterator[list[torch.Tensor]]:
    """Within the context, collect the neurons' activations of every layer; the graph starts at the first layer's."""
    seen: list = []

    def watch(_, positional):
        states = positional[0]
        seen.append(states if seen else states.detach().requires_grad_())
        return (seen[-1],)

    handles = [mlp.down.register_forward_pre_hook(watch) for mlp in mlps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
