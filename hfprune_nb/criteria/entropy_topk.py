"""Entropy of the K likeliest tokens alone: does the tail of the distribution matter to the criterion?"""

from hfprune_nb.criteria.base import LogitCriterion
from hfprune_nb.families import Setting


class EntropyTopK(LogitCriterion):
    """`C = -sum q log q` in nats, `q` being the softmax over the K largest logits; `dC/dz = -q (log q + C)` there, 0 elsewhere.

    The K tokens are held constant. C is at most log K: neurons that move mass within a flat tail become invisible. With K the
    size of the vocabulary it is `entropy`.
    """

    name = "entropy_topk"
    label = "Entropy, top K"
    source = "reviewers of HFPrune"
    basis = "own"
    settings = {"k": Setting(20, "the number of likeliest tokens; more than the vocabulary has means all", low=2)}

    def value_and_gradient(self, logits):
        largest, tokens = logits.topk(min(self.k, logits.shape[-1]), dim=-1)
        log_q = largest.log_softmax(-1)
        q_log_q = log_q.exp() * log_q
        value = -q_log_q.sum(-1)
        gradient = q_log_q.addcmul_(log_q.exp_(), value[:, None]).neg_()
        return value, logits.new_zeros(logits.shape).scatter_(1, tokens, gradient)
