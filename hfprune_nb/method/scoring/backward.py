"""What one batch of windows adds to the sums of every criterion that reads text: one forward, one backward for each gradient.

The backwards are separate. With two criteria and a 512-token window of SmolLM2-135M on one core, forward and backward of the
decoder took 2.0 s; with both gradients in one `is_grads_batched` call 1.75 s, and with a batch that holds the window twice 2.0 s.
The first of these saves a tenth, but holds the gradients of all layers at once and needs attention without a fused kernel.

Gradients for weights are formed for one layer and window at a time, from the inputs of its linear modules and the gradients for
their outputs: no weight ever asks for a gradient.

Nothing here is kept between batches but buffers, so a batch that ran out of memory can simply be tried again in smaller pieces.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch

from hfprune_nb.criteria import Criterion, LogitCriterion, noise
from hfprune_nb.method.scoring.forward import collected
from hfprune_nb.models import attention_groups, final_hidden, gated_mlps
from hfprune_nb.models.hooks import factored, linear_outputs, replaced, silenced
from hfprune_nb.models.lm_head import matmul_precision

ATTENTION = "attention:"  # how the statistics of attention groups are called

# Positions whose float32 rows stay in the cache of a CPU while a criterion goes over them again and again.
_CACHED_ROWS = 16


def _absolute(hidden, gradient, channels=1):
    """Return the sum over positions of |h * dC/dh|, (batch, units), in float32 or wider.

    hidden : (batch, positions, units * channels), h or its factor; the products of a unit's channels are summed first.
    """
    return torch.linalg.vector_norm(_product(hidden, gradient, channels), ord=1, dim=1)


def _square(hidden, gradient, channels=1):
    """Return half the sum over positions of (h * dC/dh)^2."""
    return _product(hidden, gradient, channels).square_().sum(dim=1) / 2


def _window(hidden, gradient, channels=1):
    """Return half the square of the sum over positions of h * dC/dh."""
    return _product(hidden, gradient, channels).sum(dim=1).square_() / 2


def _product(hidden, gradient, channels):
    product = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True).mul_(gradient)
    return product if channels == 1 else product.unflatten(-1, (-1, channels)).sum(-1)


def _signed(hidden, gradient, channels=1):
    """Return the sum over positions of h * dC/dh."""
    return _product(hidden, gradient, channels).sum(dim=1)


REDUCTIONS = {"absolute": _absolute, "square": _square, "window": _window, "signed": _signed}


def _sdmprune(weights, gradients):
    """Return SDMPrune's importance, `mean over the hidden dimension of |g_down w_down + g_up w_up + g_gate w_gate|`."""
    return {"importance": sum(w * g for w, g in zip(weights, gradients, strict=True)).abs().mean(dim=1)}


@dataclasses.dataclass
class _Target:
    """One gradient, of a formula and a draw, and what is made of it.

    reductions : by `criterion/statistic`, of the products with activations; groups : the same by `criterion/attention:statistic`,
    of what attention groups give to `o_proj`; statistics : by name, of the gradients for weights, as
    `WeightGradientCriterion.statistics`; values : the names whose mean of C this is; hidden : the names of `statistics` that
    take the activations, too.
    """

    criterion: LogitCriterion
    draw: int
    reductions: dict[str, Callable] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Callable] = dataclasses.field(default_factory=dict)
    values: list[str] = dataclasses.field(default_factory=list)
    hidden: set[str] = dataclasses.field(default_factory=set)
    groups: dict[str, Callable] = dataclasses.field(default_factory=dict)


def _targets(criteria, compiled, groups) -> list[_Target]:
    found: dict = {}
    functions = REDUCTIONS
    if compiled:
        functions = {name: torch.compile(function, dynamic=True) for name, function in REDUCTIONS.items()}

    def targets(source):
        return [found.setdefault((source.formula, draw), _Target(source, draw)) for draw in range(source.draws)]

    for name, criterion in criteria.items():
        if criterion.kind == "gates":
            for term, (source, reduction) in criterion.terms.items():
                for target in targets(source):
                    target.reductions[f"{name}/{term}"] = functions[reduction]
            continue
        of_weights = criterion.kind == "weight_gradients"
        for target in targets(criterion.gradient_of if of_weights else criterion):
            if of_weights:
                target.statistics[name] = criterion.statistics
                target.hidden |= {name} if criterion.needs_hidden else set()
            elif criterion.aggregation == "weight":
                target.statistics[name] = _sdmprune
            else:
                target.reductions[f"{name}/importance"] = functions[criterion.reduction]
                if groups and criterion.of_groups:
                    target.groups[f"{name}/{ATTENTION}importance"] = functions[criterion.reduction]
            if not of_weights:
                target.values.append(name)
    return list(found.values())


class _Watched:
    """What the backward passes need of one layer: tensors whose gradients are asked for, and inputs of its linear modules."""

    def __init__(self):
        self.tensors, self.inputs = {}, {}

    def note(self, name, tensor, entering=None):
        """Return `tensor` in its place in the graph, which starts here where nothing before it has one.

        Weights are frozen: of the first layer it is the neurons that start the graph, and not the embedding.
        """
        self.tensors[name] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        if entering is not None:
            self.inputs[name] = entering.detach()
        return self.tensors[name]


class Reader:
    """Reads batches of windows for `criteria`, by name, and returns what each batch adds to their sums.

    model_head : of `model`, as `models.head` gives it. seed : of random cotangents.
    student : for each layer the indices of the neurons that are left, or None for the dense model. Teacher and student are
        the same weights, the student with the other neurons silenced; the teacher is known by its final hidden states, and its
        logits exist for one chunk of positions at a time: for the vocabulary they would take 50 to 250 times the memory.
    groups : score attention groups as well.
    checkpointing : keep each layer's input only and compute the layer again when its gradient is needed.
    compiled : compile each criterion and the sum over a window's positions.
    """

    def __init__(
        self,
        model,
        model_head,
        criteria: dict[str, Criterion],
        *,
        chunk_size: int,
        seed: int = 0,
        student=None,
        groups: bool = False,
        checkpointing: bool = False,
        compiled: bool = False,
    ):
        self.model, self.student, self.checkpointing = model, student, checkpointing
        self.mlps, self.groups = gated_mlps(model), attention_groups(model) if groups else []
        of_kind = {
            kind: {name: criterion for name, criterion in criteria.items() if criterion.kind == kind}
            for kind in ("logits", "gates", "weight_gradients", "activations", "measured")
        }
        self.activations, self.measured = of_kind["activations"], of_kind["measured"]
        self.targets = _targets(of_kind["logits"] | of_kind["gates"] | of_kind["weight_gradients"], compiled, groups)
        self.by_weight = any(target.statistics for target in self.targets)
        self.vocabulary = _Vocabulary(model_head, self.targets, chunk_size, compiled, seed) if self.targets else None
        self.first_device = model.get_input_embeddings().weight.device

    def __call__(self, windows, numbers, teacher_hidden=None):
        """Return (gradients, values, hidden) of windows (batch, seq), whose `numbers` among all windows are (batch,).

        gradients : `criterion/statistic`, of groups `criterion/attention:statistic` -> for each layer a tensor (batch, ...) on
        that layer's device, float32 or wider; values : C of each logit criterion, averaged over positions and summed over
        windows, in nats; hidden : final hidden states (batch, seq, hidden). teacher_hidden : that which the dense model gave for
        the same windows; without it, a student's teacher is computed.
        """
        batch = torch.as_tensor(windows, dtype=torch.long, device=self.first_device)
        if self.student is not None and teacher_hidden is None:
            with torch.no_grad():
                teacher_hidden = final_hidden(self.model, batch)
        taught = batch, numbers, teacher_hidden
        with silenced(self.model, self.student) if self.student is not None else contextlib.nullcontext():
            if not self.targets:
                with torch.no_grad():
                    hidden, found = self._forward(batch)
                sums = []
            elif self.checkpointing:
                found, sums, hidden = self._from_recomputed_layers(*taught)
            else:
                found, sums, hidden = self._from_graph(*taught)
        if self.measured:
            # It reads tables with pandas, which scoring alone does without.
            from hfprune_nb.method.scoring.ablation import Ablator
        for name, criterion in self.measured.items():
            rows = criterion.statistics(Ablator(self.model, batch), [mlp.width for mlp in self.mlps])
            devices = [mlp.down.weight.device for mlp in self.mlps]
            found[f"{name}/importance"] = [row.to(device) for row, device in zip(rows, devices, strict=True)]
        values = {}
        for target, total in zip(self.targets, sums, strict=True):
            for name in target.values:
                values[name] = values.get(name, 0.0) + total / self._counted(target, batch)
        return found, values, hidden

    def _counted(self, target, batch):
        """Return what sums over a window's positions, and over draws, are divided by.

        The mean is taken after the product of h and its gradient, so that half precision never holds small ones.
        """
        return (batch.shape[1] - target.criterion.only_labelled) * target.criterion.draws

    def _forward(self, batch):
        scoring = {name: criterion for name, criterion in self.activations.items() if self.groups and criterion.of_groups}
        of_groups = collected(self.model, scoring, attention_groups)
        with collected(self.model, self.activations) as found, of_groups as others:
            hidden = final_hidden(self.model, batch)
        return hidden, found | {key.replace("/", f"/{ATTENTION}", 1): rows for key, rows in others.items()}

    @contextlib.contextmanager
    def _watching(self):
        """Within the context, what runs leaves in each layer's `_Watched` what its backward passes need."""
        watched = {}

        def note(layer, name, tensor, entering=None):
            return watched.setdefault(layer, _Watched()).note(name, tensor, entering)

        # The factor first, so that the output of `up` is the factor itself.
        linear = linear_outputs(self.model, note) if self.by_weight else contextlib.nullcontext()
        groups = contextlib.nullcontext()
        if self.groups:
            groups = replaced(self.model, lambda layer, given: note(layer, "groups", given), attention_groups)
        with factored(self.model, lambda layer, factor: note(layer, "factor", factor)), linear, groups:
            yield watched

    def _from_graph(self, batch, numbers, teacher_hidden):
        with torch.enable_grad(), self._watching() as watched:
            hidden, found = self._forward(batch)
        gradients, sums = self.vocabulary(batch, hidden.detach(), numbers, teacher_hidden)
        arrived, current = {layer: {} for layer in watched}, None

        def arrive(gradient, layer, name):
            arrived[layer][name] = gradient
            if len(arrived[layer]) == len(watched[layer].tensors):
                self._reduce(current, batch, layer, watched[layer], arrived[layer], found)
                arrived[layer] = {}

        try:
            for layer, record in watched.items():
                for name, tensor in record.tensors.items():
                    tensor.register_hook(functools.partial(arrive, layer=layer, name=name))
            leaves = list({id(tensor): tensor for tensor in watched[0].tensors.values() if tensor.is_leaf}.values())
            for current, gradient in zip(self.targets, gradients, strict=True):
                hidden.backward(gradient, inputs=leaves, retain_graph=current is not self.targets[-1])
                for leaf in leaves:
                    leaf.grad = None
        finally:
            # The hooks and the activations refer to each other across the C++ graph, which no garbage collector would free.
            watched.clear()
        return found, sums, hidden.detach()

    def _from_recomputed_layers(self, batch, numbers, teacher_hidden):
        layers, calls, outputs = self.model.get_decoder().layers, {}, []

        def remember(layer):
            return lambda _, args, kwargs: calls.__setitem__(layer, (args, kwargs))

        def leave(_module, _args, output):
            # Weights are frozen, so without this leaf no graph exists; with it only that of the final norm does.
            outputs.append(output.detach().requires_grad_())
            return outputs[0]

        handles = [layer.register_forward_pre_hook(remember(index), with_kwargs=True) for index, layer in enumerate(layers)]
        handles.append(layers[-1].register_forward_hook(leave))
        try:
            with torch.enable_grad():
                hidden, found = self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        states = hidden.detach()
        gradients, sums = self.vocabulary(batch, states, numbers, teacher_hidden)
        gradients = [torch.autograd.grad(hidden, outputs, gradient, retain_graph=True)[0] for gradient in gradients]
        del hidden
        outputs.clear()
        for index in reversed(range(len(layers))):
            gradients = self._through_layer(batch, index, layers[index], *calls.pop(index), gradients, found)
        return found, sums, states

    def _through_layer(self, batch, index, layer, args, kwargs, gradients, found):
        """Add to `found` what one layer gives for each target; return the gradients for its input from those for its output."""
        entering = args[0].detach().requires_grad_(index > 0)
        with torch.enable_grad(), self._watching() as watched:
            output = layer(entering, *args[1:], **kwargs)
        record, leaving = watched[index], []
        wanted = [*record.tensors.values()] + [entering] * (index > 0)
        for number, (target, gradient) in enumerate(zip(self.targets, gradients, strict=True)):
            retain = number < len(gradients) - 1
            slopes = torch.autograd.grad(output, wanted, gradient.to(output.device), retain_graph=retain)
            self._reduce(target, batch, index, record, dict(zip(record.tensors, slopes, strict=False)), found)
            leaving += slopes[len(record.tensors) :]
        return leaving

    @torch.no_grad()
    def _reduce(self, target, batch, layer, record, gradients, found):
        """Add to `found` what the `gradients` for the watched tensors of one layer give for one target."""
        counted = self._counted(target, batch)
        for key, reduction in target.reductions.items():
            self._add(found, key, layer, reduction(record.tensors["factor"].detach(), gradients["factor"]) / counted)
        for key, reduction in target.groups.items():
            row = reduction(record.tensors["groups"].detach(), gradients["groups"], self.groups[layer].channels)
            self._add(found, key, layer, row / counted)
        if target.statistics:
            rows = {}
            weights = self._weights(layer)
            for window in range(len(batch)):
                slopes = self._weight_gradients(record, gradients, window, counted)
                wide = record.inputs["down"][window].to(weights[0].dtype)
                for name, statistics in target.statistics.items():
                    hidden = {"hidden": wide} if name in target.hidden else {}
                    for statistic, row in statistics(weights, slopes, **hidden).items():
                        rows.setdefault(f"{name}/{statistic}", []).append(row)
            for key, row in rows.items():
                self._add(found, key, layer, torch.stack(row))

    def _add(self, found, key, layer, row):
        rows = found.setdefault(key, [None] * len(self.mlps))
        rows[layer] = row if rows[layer] is None else rows[layer] + row

    def _weights(self, layer):
        mlp = self.mlps[layer]
        wide = torch.promote_types(mlp.down.weight.dtype, torch.float32)
        return [matrix.detach().to(wide) for matrix in (*mlp.input_weights, mlp.down.weight.t())]

    def _weight_gradients(self, record, gradients, window, counted):
        """Return dC/dW of one window for gate, up and the transposed down, (neurons, hidden) each."""
        found, dtype = [], record.inputs["down"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        for name in sorted(record.inputs, key=("gate", "up", "fused", "down").index):
            factors = gradients[name][window], record.inputs[name][window]
            left, right = reversed(factors) if name == "down" else factors
            with matmul_precision(dtype):
                product = left.to(wide).t() @ right.to(wide)
            found += (product / counted).chunk(2 if name == "fused" else 1)
        return found


class _Vocabulary:
    """From final hidden states to the gradient of each target for them, without a graph, a chunk of positions at a time."""

    def __init__(self, model_head, targets, chunk_size, compiled, seed):
        self.head, self.targets, self.chunk_size, self.seed = model_head, targets, chunk_size, seed
        # In a criterion's many passes over a row the CPU's memory would be the limit, on a GPU the number of calls.
        self.rows = chunk_size if model_head.weight.is_cuda else min(chunk_size, _CACHED_ROWS)
        functions = [target.criterion.value_and_gradient for target in targets]
        self.functions = [torch.compile(function) for function in functions] if compiled else functions
        # New memory costs the CPU more than the arithmetic on it: these live as long as the pass.
        shape, wide = (chunk_size, len(model_head.weight)), torch.promote_types(model_head.weight.dtype, torch.float32)
        needed = 2 if any("teacher_logits" in target.criterion.needs for target in targets) else 1
        self.logits = [model_head.weight.new_empty(shape, dtype=wide) for _ in range(needed)]
        self.narrow = model_head.weight.new_empty(shape)

    @torch.no_grad()
    def __call__(self, batch, hidden, numbers, teacher_hidden):
        """Return, for each target, the gradient (batch, seq, hidden) of C summed over positions, and that sum."""
        device, weight = self.head.weight.device, self.head.weight
        flat = hidden.flatten(0, 1).to(device)
        taught = None if teacher_hidden is None else teacher_hidden.flatten(0, 1).to(device)
        last = torch.arange(1, len(flat) + 1, device=device) % batch.shape[1] == 0
        given = {
            "next_tokens": torch.roll(batch, -1, dims=1).flatten().to(device),
            "label_weight": torch.where(last, 0, batch.shape[1] / (batch.shape[1] - 1)).to(self.logits[0].dtype),
        }
        keys = {target.draw: self._keys(target.draw, numbers, batch.shape[1]) for target in self.targets}
        gradients = [torch.empty_like(flat) for _ in self.targets]
        sums = torch.zeros(len(self.targets), dtype=torch.float64, device=device)
        for start in range(0, len(flat), self.chunk_size):
            part = slice(start, min(start + self.chunk_size, len(flat)))
            size = part.stop - start
            logits = self.head.logits(flat[part], out=self.logits[0][:size])
            available = {name: tensor[part] for name, tensor in given.items()}
            if taught is not None:
                available["teacher_logits"] = self.head.logits(taught[part], out=self.logits[1][:size])
            for index, target in enumerate(self.targets):
                needed = target.criterion.needed(available | {"keys": keys[target.draw][part]})
                value = self._fill_narrow(index, logits, needed)
                found = torch.mm(self.narrow[:size], weight, out=gradients[index][part])
                if target.criterion.only_labelled:
                    value = value.masked_fill(last[part], 0)
                    found.masked_fill_(last[part][:, None], 0)
                sums[index] += value.sum(dtype=torch.float64)
        return [gradient.view_as(hidden).to(hidden.device) for gradient in gradients], sums.tolist()

    def _keys(self, draw, numbers, seq_len):
        """Return a key (positions,) for each position of the windows with these `numbers`: no batch or process changes it."""
        device = self.head.weight.device
        windows = noise.mixed(noise.mixed(torch.tensor([self.seed], device=device)) + draw) + torch.as_tensor(
            numbers, device=device
        )
        return noise.spread(noise.mixed(windows), seq_len).flatten()

    def _fill_narrow(self, index, logits, needed):
        """Put one target's gradient for the product with the head into `narrow`; return C at each position."""
        values = []
        for start in range(0, len(logits), self.rows):
            rows = slice(start, start + self.rows)
            own = {name: tensor[rows] for name, tensor in needed.items()}
            value, gradient = self.functions[index](logits[rows], **own)
            self.narrow[rows][: len(gradient)] = self.head.product_gradient(logits[rows], gradient)
            values.append(value)
        return torch.cat(values)
