"""The published scoring loops, written by us from their description, to be compared with the engine and for nothing else.

Each habit that costs time, memory or precision has a switch in `Habits`. With all of them off a loop returns the engine's
scores; with all of them on it does what was published. For models whose logits are the plain product with their head.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from hfprune_nb.criteria import variants as variants_of
from hfprune_nb.method.pruning import narrow
from hfprune_nb.method.scoring import score
from hfprune_nb.method.selection import allocate, kept_neurons
from hfprune_nb.models import final_hidden, gated_mlps
from hfprune_nb.models.hooks import silenced
from hfprune_nb.progress import bar

SDMPRUNE = {"alpha": 0.4, "temperature": 0.2}  # SDMPrune's settings at a ratio of 20 %


@dataclasses.dataclass(frozen=True)
class Habits:
    """What the published loops do and the engine does not; everything is on at first.

    weight_gradients : gradients of all MLP weights, though only those of activations are read.
    embedding_graph : without weight gradients, the graph starts at the embedding and not at the first layer's neurons.
    full_logits : float32 logits, softmax and log_softmax of a whole batch at once, through autograd; off: in chunks of positions.
    bfloat16_sums : importance is summed in bfloat16; off: in float64, from products in float32 or wider.
    one_window : one window in a forward pass; off: the loop's `batch_size`.
    teacher_copy : a second model in memory beside the student; off: the student is the model with neurons silenced.
    """

    weight_gradients: bool = True
    embedding_graph: bool = True
    full_logits: bool = True
    bfloat16_sums: bool = True
    one_window: bool = True
    teacher_copy: bool = True


NONE = Habits(*[False] * len(dataclasses.fields(Habits)))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way of scoring that can be timed: `run()` scores all windows; `forwards` and `backwards` are passes over them."""

    name: str
    criterion: str
    implementation: str
    run: Callable[[], object]
    forwards: int
    backwards: int


def hfprune(model, windows: np.ndarray, habits: Habits = Habits(), *, batch_size: int = 4, chunk_size: int = 128) -> list:
    """Return the entropy importance, (neurons,) of each layer, of HFPrune's loop: `sum over tokens of |h * dH/dh|` (Eq. 3 and 4).

    H is averaged over the positions of a window. windows : (windows, seq) token ids; batch_size and chunk_size are read where
    the habits of one window and of full logits are off.
    """
    mlps = gated_mlps(model)
    totals = _totals(model, habits)
    trained = [module.weight for mlp in mlps for module in (*mlp.inputs, mlp.down)] if habits.weight_gradients else []
    watched = {}

    def watch(module, inputs, layer):
        starts_graph = layer == 0 and not (habits.weight_gradients or habits.embedding_graph)
        watched[layer] = inputs[0].detach().requires_grad_() if starts_graph else inputs[0]
        watched[layer].retain_grad()
        return (watched[layer],)

    hooks = [mlp.down.register_forward_pre_hook(lambda m, i, layer=mlp.layer: watch(m, i, layer)) for mlp in mlps]
    if habits.embedding_graph and not habits.weight_gradients:
        hooks.append(model.get_input_embeddings().register_forward_hook(lambda m, i, output: output.requires_grad_()))
    try:
        with _trainable(trained):
            for batch in _batches(model, windows, 1 if habits.one_window else batch_size):
                with torch.enable_grad():
                    _backward(model, batch, _entropy, habits, chunk_size)
                for layer, hidden in watched.items():
                    factors = hidden.detach(), hidden.grad
                    h, gradient = factors if habits.bfloat16_sums else map(_wide, factors)
                    totals[layer] += (h * gradient).abs().sum(dim=(0, 1)).to(totals[layer].dtype)
                watched.clear()
                _forget(trained)
    finally:
        for hook in hooks:
            hook.remove()
    return [total.double().cpu() for total in totals]


def llm_pruner(model, windows: np.ndarray, habits: Habits = Habits(), *, chunk_size: int = 128) -> list:
    """Return the one-hot cross-entropy importance, (neurons,) of each layer, in the manner of LLM-Pruner.

    Weight-wise, as the engine's with aggregation `weight`; the habit of weight gradients means those of all the model's
    weights, attention and embedding included.
    """
    trained = list(model.parameters()) if habits.weight_gradients else _mlp_weights(model)
    return _weight_loop(model, windows, _cross_entropy, habits, chunk_size, trained)


def sdmprune(
    model,
    windows: np.ndarray,
    habits: Habits = Habits(),
    *,
    alpha: float = SDMPRUNE["alpha"],
    temperature: float = SDMPRUNE["temperature"],
    first_stage_ratio: float = 0.025,
    chunk_size: int = 128,
) -> list:
    """Return the weight-wise importance, (neurons,) of each layer, of SDMPrune's two stages.

    Cross-entropy scores first remove `first_stage_ratio` of the neurons; then `(1 - alpha) CE + alpha KL(q || p)` to the dense
    teacher, whose logits are divided by `temperature`, scores that student, CE being a mean over the positions with a label and
    KL over all. Removed neurons rank last, as in the engine.
    """
    first = _weight_loop(model, windows, _cross_entropy, habits, chunk_size, _mlp_weights(model))
    kept = kept_neurons(first, allocate(model, neuron_ratio=first_stage_ratio).width_after)

    def loss(logits, next_tokens, teacher_logits):
        return _distillation(logits, next_tokens, teacher_logits, alpha, temperature, windows.shape[1])

    if habits.teacher_copy:
        student = narrow(copy.deepcopy(model), kept)
        scores = _weight_loop(student, windows, loss, habits, chunk_size, _mlp_weights(student), teacher=model)
    else:
        scores = _weight_loop(model, windows, loss, habits, chunk_size, _mlp_weights(model), teacher=model, silent=kept)
        scores = [row[indices] for row, indices in zip(scores, kept, strict=True)]
    lowest = max(row.max() for row in first)
    found = [row - lowest - 1 for row in first]
    for row, own, indices in zip(found, scores, kept, strict=True):
        row[indices] = own
    return found


def contestants(model, windows: np.ndarray, batch_size: int = 0) -> list[Contestant]:
    """Return what the cost tables compare on the same model and windows: engine and published loops, each criterion.

    batch_size : of the engine; the contestants named "1 window" take one window at a time.
    """

    def engine(name, criteria, forwards, backwards, **settings):
        options = {"batch_size": batch_size, "progress": False} | settings
        run = functools.partial(score, model, windows, criteria, **options)
        chosen = [variant.criterion.name for variant in variants_of(criteria)]
        return Contestant(name, " + ".join(chosen), "engine", run, forwards, backwards)

    def loop(name, criterion, run, forwards, backwards):
        return Contestant(name, criterion, "published loop", functools.partial(run, model, windows), forwards, backwards)

    by_weight = {"self_distillation": SDMPRUNE | {"aggregation": "weight"}}
    return [
        engine("entropy: engine", ["entropy"], 1, 1),
        engine("entropy: engine, 1 window", ["entropy"], 1, 1, batch_size=1),
        loop("entropy: HFPrune loop", "entropy", hfprune, 1, 1),
        engine("one_hot_ce: engine", ["one_hot_ce"], 1, 1),
        loop("one_hot_ce: LLM-Pruner loop", "one_hot_ce", llm_pruner, 1, 1),
        engine("one_hot_ce + entropy: engine", ["one_hot_ce", "entropy"], 1, 2),
        engine("self_distillation: engine", [{"self_distillation": SDMPRUNE}], 2, 2),
        engine("self_distillation: engine, by weight", [by_weight], 2, 2),
        loop("self_distillation: SDMPrune loop", "self_distillation", sdmprune, 3, 2),
    ]


def ablation(model, windows: np.ndarray, batch_size: int = 4) -> list[Contestant]:
    """Return HFPrune's loop with its habits given up one after the other, each keeping what the one before gave up.

    With a single window, one window at a time is no habit and stays.
    """
    habits, found, batch_size = Habits(), [], min(batch_size, len(windows))
    for name, words in (
        ("weight_gradients", "no weight gradients"),
        ("embedding_graph", "graph from the first neurons"),
        ("full_logits", "logits in chunks"),
        ("bfloat16_sums", "float64 sums"),
        ("one_window", f"{batch_size} windows at a time"),
    ):
        if name == "one_window" and batch_size == 1:
            continue
        habits = dataclasses.replace(habits, **{name: False})
        run = functools.partial(hfprune, model, windows, habits, batch_size=batch_size)
        found.append(Contestant(f"entropy: HFPrune loop, {words}", "entropy", "ablation", run, 1, 1))
    return found


def in_half_and_in_float64(model, windows: np.ndarray, batch_size: int = 0) -> tuple[dict, dict]:
    """Return the engine's importance of the three criteria, of `model` as it is and of a float64 copy of it."""
    criteria: list[str | dict] = ["one_hot_ce", {"self_distillation": SDMPRUNE}, "entropy"]
    here, wide = (
        score(network, windows, criteria, batch_size=batch_size, progress=False).importance
        for network in (model, copy.deepcopy(model).double())
    )
    return here, wide


def per_window(model, windows: np.ndarray, progress: bool = True) -> list[torch.Tensor]:
    """Return what each window adds to the entropy importance, (windows, neurons) of each layer in float64."""
    found = []
    with bar(len(windows), "window", "scoring", enabled=progress) as progress_bar:
        for index in range(len(windows)):
            found.append(
                score(model, windows[index : index + 1], ["entropy"], batch_size=1, progress=False).importance["entropy"]
            )
            progress_bar.update()
    return [torch.stack(list(rows)) for rows in zip(*found, strict=True)]


def variants(model, ratios: list[float], multiples: Sequence[int] = (1,)) -> tuple[dict, list[dict]]:
    """Return `model` and narrower copies of it by name, and what each is: model, ratio, multiple_of.

    A copy has lost a ratio of all parameters, its width a multiple of one of `multiples`; which neurons stay does not matter
    for speed. Errors as in `allocations.allocate`.
    """
    models, facts = {"dense": model}, [{"model": "dense", "ratio": 0.0, "multiple_of": 1}]
    for ratio, multiple in itertools.product(ratios, multiples):
        name = f"{100 * ratio:g} %" + (f", multiple of {multiple}" if multiple > 1 else "")
        widths = allocate(model, ratio, multiple_of=multiple).width_after
        models[name] = narrow(copy.deepcopy(model), [range(width) for width in widths])
        facts.append({"model": name, "ratio": ratio, "multiple_of": multiple})
    return models, facts


def _weight_loop(model, windows, loss, habits, chunk_size, trained, teacher=None, silent=None):
    mlps = gated_mlps(model)
    totals = _totals(model, habits)
    with _trainable(trained):
        for batch in _batches(model, windows, 1):  # the absolute value is taken of each window's own gradient
            teacher_hidden = final_hidden(teacher, batch) if teacher is not None else None
            with silenced(model, silent) if silent is not None else contextlib.nullcontext(), torch.enable_grad():
                _backward(model, batch, loss, habits, chunk_size, teacher, teacher_hidden)
            for mlp in mlps:
                change = _product(mlp.down.weight, habits).t()
                for module in mlp.inputs:
                    product = _product(module.weight, habits)
                    change = change + (product[: mlp.width] + product[mlp.width :] if mlp.fused is not None else product)
                totals[mlp.layer] += change.abs().mean(dim=1).to(totals[mlp.layer].dtype)
            _forget(trained)
    return [total.double().cpu() for total in totals]


def _product(weight, habits):
    factors = weight.grad, weight.detach()
    gradient, values = factors if habits.bfloat16_sums else map(_wide, factors)
    return gradient * values


def _backward(model, batch, loss, habits, chunk_size, teacher=None, teacher_hidden=None):
    """Take the gradient of the sum over windows of `loss` averaged over the positions of each."""
    if habits.full_logits:
        logits = _wide(model(input_ids=batch, use_cache=False).logits)
        teacher_logits = None if teacher is None else _wide(teacher.get_output_embeddings()(teacher_hidden))
        values, counts = loss(logits, _next_tokens(batch), teacher_logits)
        (values * counts / counts.sum(dim=1, keepdim=True)).sum().backward()
        return
    hidden = final_hidden(model, batch)
    next_tokens, gradient = _next_tokens(batch), torch.empty_like(hidden)
    for start in range(0, batch.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        states = hidden.detach()[:, part].requires_grad_()
        logits = _wide(model.get_output_embeddings()(states))
        teacher_logits = None if teacher is None else _wide(teacher.get_output_embeddings()(teacher_hidden[:, part]))
        values, counts = loss(logits, next_tokens[:, part], teacher_logits)
        (gradient[:, part],) = torch.autograd.grad((values * counts).sum(), states)
    # The loss of a chunk gives the number of counted positions of that chunk only.
    positions = batch.shape[1] - 1 if (counts[:, -1] == 0).any() else batch.shape[1]
    hidden.backward(gradient / positions)


def _entropy(logits, next_tokens, teacher_logits):
    """Return H at each position (batch, positions) and which positions count."""
    entropy = -(torch.softmax(logits, dim=-1) * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
    return entropy, torch.ones_like(entropy)


def _cross_entropy(logits, next_tokens, teacher_logits):
    values = functional.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), reduction="none", ignore_index=-100)
    return values.view_as(next_tokens), (next_tokens != -100).to(values.dtype)


def _distillation(logits, next_tokens, teacher_logits, alpha, temperature, seq_len):
    log_q = torch.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = (log_q.exp() * (log_q - torch.log_softmax(logits, dim=-1))).sum(dim=-1)
    values, _ = _cross_entropy(logits, next_tokens, teacher_logits)
    # Everything is divided by the number of positions, of which one has no label.
    return (1 - alpha) * values * seq_len / (seq_len - 1) + alpha * divergence, torch.ones_like(divergence)


def _next_tokens(batch):
    return torch.cat([batch[:, 1:], torch.full_like(batch[:, :1], -100)], dim=1)


def _batches(model, windows, size):
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(windows), size):
        yield torch.as_tensor(np.array(windows[start : start + size]), dtype=torch.long, device=device)


def _totals(model, habits):
    dtype = torch.bfloat16 if habits.bfloat16_sums else torch.float64
    return [torch.zeros(mlp.width, dtype=dtype, device=mlp.down.weight.device) for mlp in gated_mlps(model)]


def _mlp_weights(model):
    return [module.weight for mlp in gated_mlps(model) for module in (*mlp.inputs, mlp.down)]


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextlib.contextmanager
def _trainable(weights):
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        _forget(weights)
        for weight in weights:
            weight.requires_grad_(False)


def _forget(weights):
    for weight in weights:
        weight.grad = None
