"""Entropy of the output distribution: the criterion of HFPrune, which needs neither labels nor a teacher."""

import torch

from hfprune_nb.criteria.base import LogitCriterion


class Entropy(LogitCriterion):
    """`C = H = -sum p log p` in nats, `dC/dz = -p * (log p + H)` (HFPrune Eq. 3, there with base 2, which ranks alike)."""

    name = "entropy"
    source = "HFPrune Eq. 3"

    def value_and_gradient(self, logits, next_tokens=None, teacher_logits=None):
        log_p = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        p_log_p = log_p.mul_(p)
        entropy = -p_log_p.sum(-1)
        return entropy, p_log_p.addcmul_(p, entropy[:, None]).neg_()
