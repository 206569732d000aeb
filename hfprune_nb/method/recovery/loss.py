"""The training loss of recovery, a chunk of positions at a time."""

import torch
from torch import nn

from hfprune_nb import criteria
from hfprune_nb.inputs import instructions
from hfprune_nb.models import Head


class ChunkedLoss(torch.autograd.Function):
    """The sum of a logit criterion over positions, with its closed-form gradient for hidden states and the head's weight.

    Inputs: hidden (positions, hidden), the head's weight (vocabulary, hidden), `Head`, criterion, next tokens (positions,), the
    teacher's hidden states and `Head` or None, chunk size. Output: the sum in nats, in float32 or wider.
    """

    @staticmethod
    def forward(ctx, hidden, weight, model_head: Head, criterion, targets, taught, teacher_head, chunk_size):
        """Compute value and gradients at once: with the logits at hand the gradients cost one product each."""
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_size):
                part = slice(start, start + chunk_size)
                logits = model_head.logits(hidden[part])
                available = {"next_tokens": targets[part], "label_weight": torch.ones_like(targets[part], dtype=logits.dtype)}
                if taught is not None:
                    available["teacher_logits"] = teacher_head.logits(taught[part])
                value, found = criterion.value_and_gradient(logits, **criterion.needed(available))
                total += value.sum(dtype=torch.float64)
                gradient[part] = model_head.hidden_gradient(logits, found)
                if weight_gradient is not None:
                    weight_gradient += model_head.product_gradient(logits, found).t() @ hidden[part]
        ctx.save_for_backward(gradient, weight_gradient)
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        """Scale the gradients."""
        gradient, weight_gradient = ctx.saved_tensors
        scaled = None if weight_gradient is None else weight_gradient * upstream
        return gradient * upstream, scaled, None, None, None, None, None, None


class Objective(nn.Module):
    """The network with its loss as `forward`, so that whatever wraps it (data parallelism) wraps the loss as well."""

    accepts_loss_kwargs = True  # the trainer hands over the number of labels in a whole optimizer step

    def __init__(self, network, model_head, teachers, distillation, temperature, chunk_size):
        super().__init__()
        self.network, self._head, self._chunk_size = network, model_head, chunk_size
        self._teachers = teachers  # a tuple, so that the teacher is no part of this module
        self._cross_entropy = criteria.create("one_hot_ce")
        self._criterion = self._cross_entropy
        if teachers:
            self._criterion = criteria.create("self_distillation", alpha=distillation, temperature=temperature)

    def forward(self, input_ids, position_ids, labels, num_items_in_batch=None):
        """Return {"loss": mean over the labelled positions} of packed rows (batch, seq)."""
        wanted = labels != instructions.NO_LOSS
        taught = teacher_head = None
        if self._teachers:
            teacher, teacher_head = self._teachers
            with torch.no_grad():
                taught = _hidden(teacher, input_ids, position_ids)[wanted].to(teacher_head.module.weight.dtype)
        total = self._sum(_hidden(self.network, input_ids, position_ids)[wanted], labels[wanted], taught, teacher_head)
        return {"loss": total / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)}

    def _sum(self, hidden, targets, taught=None, teacher_head=None):
        weight = self._head.module.weight
        criterion = self._criterion if taught is not None else self._cross_entropy
        return ChunkedLoss.apply(
            hidden.to(weight.dtype), weight, self._head, criterion, targets, taught, teacher_head, self._chunk_size
        )

    @torch.no_grad()
    def held_out_loss(self, rows: list[instructions.Row], micro_batch: int) -> float:
        """Return the cross-entropy of the responses in `rows`, in nats per token."""
        was_training, total = self.training, 0.0
        self.eval()
        device = self._head.module.weight.device
        for start in range(0, len(rows), micro_batch):
            batch = {name: tensor.to(device) for name, tensor in instructions.collate(rows[start : start + micro_batch]).items()}
            wanted = batch["labels"] != instructions.NO_LOSS
            hidden = _hidden(self.network, batch["input_ids"], batch["position_ids"])
            total += float(self._sum(hidden[wanted], batch["labels"][wanted]))
        self.train(was_training)
        return total / instructions.count_tokens(rows)[1]


def _hidden(network, input_ids, position_ids):
    """Return the hidden states that enter the head; positions alone tell the examples of a row apart."""
    return network.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
