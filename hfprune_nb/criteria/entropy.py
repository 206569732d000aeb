"""Entropy of the output distribution: the criterion of HFPrune, which needs neither labels nor a teacher."""

from hfprune_nb.criteria.base import LogitCriterion


class Entropy(LogitCriterion):
    """`C = H = -sum p log p` in nats, `dC/dz = -p * (log p + H)` (HFPrune Eq. 3, there with base 2, which ranks alike)."""

    name = "entropy"
    label = "Entropy (HFPrune)"
    source = "HFPrune Eq. 3"
    rank = 2

    def value_and_gradient(self, logits):
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        p_log_p = log_p.mul_(p)
        entropy = -p_log_p.sum(-1)
        return entropy, p_log_p.addcmul_(p, entropy[:, None]).neg_()
