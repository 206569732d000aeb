"""The scoring engine: one forward pass, one backward pass per criterion, importance of every MLP neuron.

Only activations get gradients: weights are frozen and the graph starts at the first layer's neurons. The vocabulary side has no
graph at all: each criterion's closed-form gradient is taken in chunks of positions, so that no (positions, vocabulary) float32
tensor larger than a chunk ever exists. Importance is summed in float64.
"""

import contextlib
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hfprune_nb.errors import UserError
from hfprune_nb.inputs.models import final_hidden, gated_mlps, head
from hfprune_nb.method import criteria as registry
from hfprune_nb.method.activations import replaced, silenced
from hfprune_nb.method.pruning import allocate, check_importance, full_disk_in_one_sentence, kept_neurons, load_tensors
from hfprune_nb.progress import bar

AGGREGATIONS = ("activation", "weight")


@dataclasses.dataclass
class Scores:
    """Importance of every neuron under each criterion.

    importance : criterion -> (layers, neurons) float64, higher = keep.
    mean_value : criterion -> mean of C over all positions, in nats (only criteria that are a function of the logits).
    tokens : calibration tokens that went through the model, summed over all forward passes; seconds : wall time.
    """

    importance: dict[str, torch.Tensor]
    mean_value: dict[str, float]
    tokens: int
    seconds: float

    def save(self, file: Path) -> None:
        """Write the importance tensors as safetensors; raise UserError when the disk is full."""
        with full_disk_in_one_sentence(file):
            save_file({name: tensor.contiguous() for name, tensor in self.importance.items()}, file)


def load_importance(file: Path, criterion: str, model=None) -> torch.Tensor:
    """Read one criterion's importance (layers, neurons); raise UserError when criterion or model do not fit it."""
    tensors = load_tensors(file)
    if criterion not in tensors:
        raise UserError(f"criterion '{criterion}' is not in {file}, which holds {', '.join(sorted(tensors))}: score it first.")
    importance = tensors[criterion]
    if model is not None:
        mlps = gated_mlps(model)
        if importance.shape != (len(mlps), mlps[0].width):
            raise UserError(
                f"scores: {file} was made for another model: it holds {importance.shape[0]} layers of {importance.shape[1]} "
                f"neurons, the model has {len(mlps)} of {mlps[0].width}."
            )
    return importance


def score(
    model,
    windows: np.ndarray,
    criteria: list[str],
    *,
    batch_size: int = 4,
    chunk_size: int = 128,
    aggregation: str = "activation",
    alpha: float = 1.0,
    temperature: float = 1.0,
    first_stage_ratio: float = 0.025,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score every MLP neuron of `model` under all `criteria` (HFPrune Eq. 4).

    Parameters
    ----------
    windows : (windows, seq) token ids; may be empty when no criterion reads text.
    batch_size : windows in one forward pass; chunk_size : positions whose logits exist at once. Neither changes the scores
        beyond float error.
    aggregation : `activation` is HFPrune's, `sum over tokens of |h * dC/dh|`. `weight` is SDMPrune's, `mean over the hidden
        dimension of the sum over windows of |g_down * w_down + g_up * w_up + g_gate * w_gate|`, g being the gradient of C for a
        weight; it takes one window at a time and memory for the gradients of all MLP weights.
    alpha, temperature : of `self_distillation`, whose student has lost the `first_stage_ratio` of its neurons with the lowest
        one-hot cross-entropy importance (SDMPrune's first stage; 3.9 instead of 4.0 times hidden size is 2.5 %). Neurons removed
        there rank last, in the order of the first stage.
    seed : of the `random` criterion.

    Raises UserError for an unknown criterion or aggregation, an unsupported architecture, missing text, or scores that are NaN
    or all equal.
    """
    if not criteria:
        raise UserError(f"criteria is empty: name at least one of {', '.join(registry.names())}.")
    for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value < 1:
            raise UserError(f"{name} {value} is too small: it must be at least 1.")
    if aggregation not in AGGREGATIONS:
        raise UserError(f"aggregation '{aggregation}' is unknown: choose one of {', '.join(AGGREGATIONS)}.")
    chosen = [registry.create(name, alpha=alpha, temperature=temperature) for name in dict.fromkeys(criteria)]
    mlps = gated_mlps(model)
    from_weights = [criterion for criterion in chosen if isinstance(criterion, registry.WeightCriterion)]
    from_logits = [criterion for criterion in chosen if isinstance(criterion, registry.LogitCriterion)]
    if from_logits and (np.ndim(windows) != 2 or np.size(windows) == 0 or windows.shape[1] < 2):
        raise UserError("calibration: these criteria read text, so give windows of at least two tokens each.")
    started = time.perf_counter()
    importance, mean_value = {}, {}
    for criterion in from_weights:
        importance[criterion.name] = _weight_importance(mlps, criterion, seed)
    plain = [criterion for criterion in from_logits if not criterion.needs_teacher]
    taught = [criterion for criterion in from_logits if criterion.needs_teacher]
    first_stage = registry.create("one_hot_ce")
    if taught and first_stage.name not in [criterion.name for criterion in plain]:
        plain.append(first_stage)
    settings = {"aggregation": aggregation, "batch_size": batch_size, "chunk_size": chunk_size}
    # The dense model is read once; with a teacher, teacher and student read the windows once more each.
    tokens = np.size(windows) * (bool(plain) + 2 * bool(taught))
    with bar(tokens, "tok", "scoring", enabled=progress and tokens > 0) as progress_bar:
        if plain:
            found, mean_value = _score_pass(model, windows, plain, None, progress_bar, **settings)
            importance.update(found)
        if taught:
            first = importance[first_stage.name]
            student = kept_neurons(first, allocate(model, neuron_ratio=first_stage_ratio).width_after)
            found, values = _score_pass(model, windows, taught, student, progress_bar, **settings)
            importance.update({name: _rank_last(scores, student, first) for name, scores in found.items()})
            mean_value.update(values)
    importance = {criterion.name: importance[criterion.name] for criterion in chosen}
    for name, scores in importance.items():
        check_importance(scores, f"criterion '{name}'")
    mean_value = {name: value for name, value in mean_value.items() if name in importance}
    return Scores(importance, mean_value, tokens, time.perf_counter() - started)


def _score_pass(model, windows, group, student, progress_bar, *, aggregation, batch_size, chunk_size):
    """Score `group` on all windows: of the dense model, or of the `student`, which keeps only those neurons."""
    mlps, model_head = gated_mlps(model), head(model)
    device = mlps[0].down.weight.device
    totals = {c.name: torch.zeros(len(mlps), mlps[0].width, dtype=torch.float64, device=device) for c in group}
    values = dict.fromkeys(totals, 0.0)
    score_batch = _score_activations if aggregation == "activation" else _score_weights
    if aggregation == "weight":
        batch_size = 1  # the absolute value is taken of each window's own gradient
    for start in range(0, len(windows), batch_size):
        batch = torch.as_tensor(np.array(windows[start : start + batch_size]), dtype=torch.long, device=device)
        teacher_hidden = None
        if student is not None:
            # Teacher and student are the same weights: the student is the model with the removed neurons silenced.
            with torch.no_grad():
                teacher_hidden = final_hidden(model, batch)
            progress_bar.update(batch.numel())
        with silenced(model, student) if student is not None else contextlib.nullcontext():
            score_batch(model, model_head, batch, group, teacher_hidden, chunk_size, totals, values)
        progress_bar.update(batch.numel())
    return {name: total.cpu() for name, total in totals.items()}, {name: value / len(windows) for name, value in values.items()}


def _score_activations(model, model_head, batch, group, teacher_hidden, chunk_size, totals, values):
    watched = {}

    def watch(layer, hidden):
        # Detaching the first layer's neurons is what starts the graph there and not at the embedding.
        watched[layer] = hidden.detach().requires_grad_() if layer == 0 else hidden
        return watched[layer]

    with torch.enable_grad(), replaced(model, watch):
        hidden = final_hidden(model, batch)
    current = {}

    def accumulate(gradient, layer):
        # The mean over positions is taken after the product, so that half precision never holds the small gradients.
        change = (watched[layer].detach().float() * gradient).abs_().sum(dim=(0, 1)).double()
        totals[current["criterion"]][layer] += change / current["positions"]

    for layer, activation in watched.items():
        activation.register_hook(lambda gradient, layer=layer: accumulate(gradient, layer))
    gradients, sums = _hidden_gradients(group, model_head, batch, hidden.detach(), teacher_hidden, chunk_size)
    for index, criterion in enumerate(group):
        positions = _positions(criterion, batch)
        values[criterion.name] += sums[index] / positions
        current.update(criterion=criterion.name, positions=positions)
        hidden.backward(gradients[index].view_as(hidden), inputs=[watched[0]], retain_graph=index < len(group) - 1)
        watched[0].grad = None
    # The hooks and the activations refer to each other across the C++ graph, which no garbage collector would free.
    watched.clear()


def _score_weights(model, model_head, batch, group, teacher_hidden, chunk_size, totals, values):
    mlps = gated_mlps(model)
    modules = [[*mlp.inputs, mlp.down] for mlp in mlps]
    weights = [module.weight.requires_grad_() for layer in modules for module in layer]
    try:
        with torch.enable_grad():
            hidden = final_hidden(model, batch)
        gradients, sums = _hidden_gradients(group, model_head, batch, hidden.detach(), teacher_hidden, chunk_size)
        for index, criterion in enumerate(group):
            positions = _positions(criterion, batch)
            values[criterion.name] += sums[index] / positions
            hidden.backward(gradients[index].view_as(hidden), inputs=weights, retain_graph=index < len(group) - 1)
            for mlp, (*inputs, down) in zip(mlps, modules, strict=True):
                change = (down.weight.grad.float() * down.weight).t()
                for module in inputs:
                    product = module.weight.grad.float() * module.weight
                    change = change + (product[: mlp.width] + product[mlp.width :] if mlp.fused is not None else product)
                totals[criterion.name][mlp.layer] += change.abs().mean(dim=1).double() / positions
            for weight in weights:
                weight.grad = None
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _positions(criterion, batch):
    """Positions of a window at which C is defined: the last one has no next token."""
    return batch.shape[1] - 1 if criterion.needs_next_token else batch.shape[1]


@torch.no_grad()
def _hidden_gradients(group, model_head, batch, hidden, teacher_hidden, chunk_size):
    """Return, for each criterion, the gradient (batch * seq, hidden) of C summed over its positions, and that sum."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    taught = None if teacher_hidden is None else teacher_hidden.reshape(flat.shape)
    next_tokens = torch.roll(batch, -1, dims=1).reshape(-1)
    last = torch.zeros_like(batch, dtype=torch.bool)
    last[:, -1] = True
    last = last.reshape(-1)
    gradients, sums = [torch.empty_like(flat) for _ in group], [0.0 for _ in group]
    for start in range(0, len(flat), chunk_size):
        part = slice(start, start + chunk_size)
        logits = model_head.logits(flat[part])
        teacher_logits = None if taught is None else model_head.logits(taught[part])
        for index, criterion in enumerate(group):
            value, logit_gradient = criterion.value_and_gradient(logits, next_tokens[part], teacher_logits)
            found = model_head.hidden_gradient(logits, logit_gradient)
            if criterion.needs_next_token:
                value, found = value.masked_fill(last[part], 0), found.masked_fill(last[part][:, None], 0)
            gradients[index][part] = found
            sums[index] += float(value.sum(dtype=torch.float64))
    return gradients, sums


def _weight_importance(mlps, criterion, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for mlp in mlps:
        inputs = list(mlp.fused.weight.chunk(2)) if mlp.fused is not None else [mlp.gate.weight, mlp.up.weight]
        rows.append(criterion.importance(inputs, mlp.down.weight, generator).cpu())
    return torch.stack(rows)


def _rank_last(scores, kept, first_stage):
    """Give neurons outside `kept` negative scores in the order of `first_stage`, below every neuron that was kept."""
    removed = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
    return torch.where(removed, first_stage - first_stage.max() - 1, scores)
