"""What one batch of windows adds to the importance of every neuron: one forward, and one backward for each criterion.

The backwards are separate. With two criteria and a 512-token window of SmolLM2-135M on one core, forward and backward of the
decoder took 2.0 s; with both gradients in one `is_grads_batched` call 1.75 s, and with a batch that holds the window twice 2.0 s.
The first of these saves a tenth, but holds the gradients of all layers at once and needs attention without a fused kernel.

Nothing here is kept between batches but buffers, so a batch that ran out of memory can simply be tried again in smaller pieces.
"""

import contextlib
import functools

import torch

from hfprune_nb.models import final_hidden, gated_mlps
from hfprune_nb.models.hooks import factored, silenced

# Positions whose float32 rows stay in the cache of a CPU while a criterion goes over them again and again.
_CACHED_ROWS = 16


class Contributions:
    """Computes, for a batch, the importance that each window adds under each criterion of `group`.

    model_head : of `model`, as `models.head` gives it.
    student : for each layer the indices of the neurons that are left, or None for the dense model. Teacher and student are
        the same weights, the student with the other neurons silenced; the teacher is known by its final hidden states, and its
        logits exist for one chunk of positions at a time: for the vocabulary they would take 50 to 250 times the memory.
    checkpointing : keep each layer's input only and compute the layer again when its gradient is needed.
    compiled : compile each criterion and the sum over a window's positions.
    """

    def __init__(self, model, model_head, group, *, aggregation, chunk_size, student=None, checkpointing=False, compiled=False):
        self.model, self.group, self.student = model, group, student
        self.mlps = gated_mlps(model)
        self.vocabulary = _Vocabulary(model_head, group, chunk_size, compiled)
        self.first_device = model.get_input_embeddings().weight.device
        self.sum_changes = torch.compile(_sum_changes, dynamic=True) if compiled else _sum_changes
        if aggregation == "weight":
            self._changes = self._from_weights
        else:
            self._changes = self._from_recomputed_layers if checkpointing else self._from_graph

    def __call__(self, windows, teacher_hidden=None):
        """Return (changes, values, hidden) of windows (batch, seq).

        changes : for each layer a tensor (criteria, batch, neurons) on that layer's device, float32 or wider; values : C of each
        criterion, averaged over positions and summed over windows, in nats; hidden : final hidden states (batch, seq, hidden).
        teacher_hidden : that which the dense model gave for the same windows; without it, a student's teacher is computed.
        """
        batch = torch.as_tensor(windows, dtype=torch.long, device=self.first_device)
        if self.student is not None and teacher_hidden is None:
            with torch.no_grad():
                teacher_hidden = final_hidden(self.model, batch)
        # The mean over positions is taken after the product of h and its gradient, so that half precision never holds small ones.
        positions = [batch.shape[1] - criterion.only_labelled for criterion in self.group]
        with silenced(self.model, self.student) if self.student is not None else contextlib.nullcontext():
            changes, sums, hidden = self._changes(batch, teacher_hidden)
        changes = [torch.stack([row / count for row, count in zip(rows, positions, strict=True)]) for rows in changes]
        return changes, [total / count for total, count in zip(sums, positions, strict=True)], hidden

    def _from_graph(self, batch, teacher_hidden):
        watched, changes = {}, [[None] * len(self.group) for _ in self.mlps]

        def watch(layer, hidden):
            # Detaching in the first layer is what starts the graph at its neurons and not at the embedding.
            watched[layer] = hidden.detach().requires_grad_() if layer == 0 else hidden
            return watched[layer]

        with torch.enable_grad(), factored(self.model, watch):
            hidden = final_hidden(self.model, batch)
        gradients, sums = self.vocabulary(batch, hidden.detach(), teacher_hidden)
        current = 0

        def collect(gradient, layer):
            changes[layer][current] = self.sum_changes(watched[layer].detach(), gradient)

        try:
            for layer, activation in watched.items():
                activation.register_hook(functools.partial(collect, layer=layer))
            for current, gradient in enumerate(gradients):
                hidden.backward(gradient, inputs=[watched[0]], retain_graph=current < len(gradients) - 1)
                watched[0].grad = None
        finally:
            # The hooks and the activations refer to each other across the C++ graph, which no garbage collector would free.
            watched.clear()
        return changes, sums, hidden.detach()

    def _from_recomputed_layers(self, batch, teacher_hidden):
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
                hidden = final_hidden(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        states = hidden.detach()
        gradients, sums = self.vocabulary(batch, states, teacher_hidden)
        gradients = [torch.autograd.grad(hidden, outputs, gradient, retain_graph=True)[0] for gradient in gradients]
        changes = [None] * len(layers)
        del hidden
        outputs.clear()
        for index in reversed(range(len(layers))):
            changes[index], gradients = self._through_layer(index, layers[index], *calls.pop(index), gradients)
        return changes, sums, states

    def _through_layer(self, index, layer, args, kwargs, gradients):
        """Return the changes of each criterion in one layer, and the gradients for its input, given those for its output."""
        entering = args[0].detach().requires_grad_(index > 0)
        watched = {}

        def watch(number, hidden):
            watched[number] = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            return watched[number]

        with torch.enable_grad(), factored(self.model, watch):
            output = layer(entering, *args[1:], **kwargs)
        leaves = [watched[index], entering] if index > 0 else [watched[index]]
        changes, found = [], []
        for number, gradient in enumerate(gradients):
            of_neurons, *of_input = torch.autograd.grad(
                output, leaves, gradient.to(output.device), retain_graph=number < len(gradients) - 1
            )
            changes.append(self.sum_changes(watched[index].detach(), of_neurons))
            found += of_input
        return changes, found

    def _from_weights(self, batch, teacher_hidden):
        modules = [[*mlp.inputs, mlp.down] for mlp in self.mlps]
        weights = [module.weight.requires_grad_() for layer in modules for module in layer]
        changes = [[] for _ in self.mlps]
        try:
            with torch.enable_grad():
                hidden = final_hidden(self.model, batch)
            gradients, sums = self.vocabulary(batch, hidden.detach(), teacher_hidden)
            for index, gradient in enumerate(gradients):
                hidden.backward(gradient, inputs=weights, retain_graph=index < len(gradients) - 1)
                for mlp, (*inputs, down) in zip(self.mlps, modules, strict=True):
                    change = (down.weight.grad.float() * down.weight.detach()).t()
                    for module in inputs:
                        product = module.weight.grad.float() * module.weight.detach()
                        change = change + (product[: mlp.width] + product[mlp.width :] if mlp.fused is not None else product)
                    changes[mlp.layer].append(change.abs().mean(dim=1)[None])
                for weight in weights:
                    weight.grad = None
        finally:
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)
        return changes, sums, hidden.detach()


def _sum_changes(hidden, gradient):
    """Return the sum over positions of |h * dC/dh|, (batch, neurons), in float32 or wider; `hidden` is h or its factor."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.linalg.vector_norm(hidden.to(wide, copy=True).mul_(gradient), ord=1, dim=1)


class _Vocabulary:
    """From final hidden states to the gradient of each criterion for them, without a graph, a chunk of positions at a time."""

    def __init__(self, model_head, group, chunk_size, compiled):
        self.head, self.group, self.chunk_size = model_head, group, chunk_size
        # In a criterion's many passes over a row the CPU's memory would be the limit, on a GPU the number of calls.
        self.rows = chunk_size if model_head.weight.is_cuda else min(chunk_size, _CACHED_ROWS)
        functions = [criterion.value_and_gradient for criterion in group]
        self.functions = [torch.compile(function) for function in functions] if compiled else functions
        # New memory costs the CPU more than the arithmetic on it: these live as long as the pass.
        shape, wide = (chunk_size, len(model_head.weight)), torch.promote_types(model_head.weight.dtype, torch.float32)
        needed = 2 if any("teacher_logits" in criterion.needs for criterion in group) else 1
        self.logits = [model_head.weight.new_empty(shape, dtype=wide) for _ in range(needed)]
        self.narrow = model_head.weight.new_empty(shape)

    @torch.no_grad()
    def __call__(self, batch, hidden, teacher_hidden):
        """Return, for each criterion, the gradient (batch, seq, hidden) of C summed over positions, and that sum."""
        device, weight = self.head.weight.device, self.head.weight
        flat = hidden.flatten(0, 1).to(device)
        taught = None if teacher_hidden is None else teacher_hidden.flatten(0, 1).to(device)
        next_tokens = torch.roll(batch, -1, dims=1).flatten().to(device)
        last = torch.arange(1, len(flat) + 1, device=device) % batch.shape[1] == 0
        gradients = [torch.empty_like(flat) for _ in self.group]
        sums = torch.zeros(len(self.group), dtype=torch.float64, device=device)
        label_weight = torch.where(last, 0, batch.shape[1] / (batch.shape[1] - 1)).to(self.logits[0].dtype)
        for start in range(0, len(flat), self.chunk_size):
            part = slice(start, min(start + self.chunk_size, len(flat)))
            size = part.stop - start
            logits = self.head.logits(flat[part], out=self.logits[0][:size])
            available = {"next_tokens": next_tokens[part], "label_weight": label_weight[part]}
            if taught is not None:
                available["teacher_logits"] = self.head.logits(taught[part], out=self.logits[1][:size])
            for index, criterion in enumerate(self.group):
                value = self._fill_narrow(index, logits, criterion.needed(available))
                found = torch.mm(self.narrow[:size], weight, out=gradients[index][part])
                if criterion.only_labelled:
                    value = value.masked_fill(last[part], 0)
                    found.masked_fill_(last[part][:, None], 0)
                sums[index] += value.sum(dtype=torch.float64)
        return [gradient.view_as(hidden).to(hidden.device) for gradient in gradients], sums.tolist()

    def _fill_narrow(self, index, logits, needed):
        """Put one criterion's gradient for the product with the head into `narrow`; return C at each position."""
        values = []
        for start in range(0, len(logits), self.rows):
            rows = slice(start, start + self.rows)
            own = {name: tensor[rows] for name, tensor in needed.items()}
            value, gradient = self.functions[index](logits[rows], **own)
            self.narrow[rows][: len(gradient)] = self.head.product_gradient(logits[rows], gradient)
            values.append(value)
        return torch.cat(values)
