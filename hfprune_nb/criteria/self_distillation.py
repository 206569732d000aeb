"""Self-distillation: the divergence of a slightly pruned student from the dense model (SDMPrune)."""

import torch

from hfprune_nb.criteria.base import LogitCriterion
from hfprune_nb.errors import UserError


class SelfDistillation(LogitCriterion):
    """`C = (1 - alpha) CE + alpha KL(q || p)` with the teacher's `q = softmax(z_teacher / temperature)`.

    `dC/dz = (1 - alpha) (p - onehot(y)) + alpha (p - q)`. Only the teacher is tempered, as in SDMPrune's code, which uses
    alpha .4 and temperature .2 at 20 %, .42 and .5 at 30 %, .1 and .2 at 40 %. At the dense model itself (q = p, alpha 1)
    the gradient is zero, which is why the engine scores a student that has already lost a few neurons.
    """

    name = "self_distillation"
    source = "SDMPrune (arXiv 2506.11120); HFPrune baseline SD"
    needs_teacher = True

    def __init__(self, alpha: float = 1.0, temperature: float = 1.0):
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha {alpha} is outside [0, 1]: it is the weight of the divergence against the cross-entropy.")
        if temperature <= 0:
            raise UserError(f"temperature {temperature} must be greater than 0: it divides the teacher's logits.")
        self.alpha, self.temperature = alpha, temperature
        self.needs_next_token = alpha < 1

    def value_and_gradient(self, logits, next_tokens, teacher_logits):
        log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher_logits / self.temperature, dim=-1)
        q = log_q.exp()
        value = log_q.sub_(log_p).mul_(q).sum(-1) * self.alpha
        rows = torch.arange(len(next_tokens), device=logits.device)
        if self.needs_next_token:
            value -= (1 - self.alpha) * log_p[rows, next_tokens]
        gradient = log_p.exp_().sub_(q, alpha=self.alpha)
        if self.needs_next_token:
            gradient[rows, next_tokens] -= 1 - self.alpha
        return value, gradient
