"""One-hot cross-entropy: how the loss of the true next token changes."""

import torch

from hfprune_nb.criteria.base import LogitCriterion


class OneHotCrossEntropy(LogitCriterion):
    """`C = -log p[y]`, `dC/dz = p - onehot(y)`; Taylor pruning as in LLM-Pruner, the baseline "CE" of HFPrune's Table 6."""

    name = "one_hot_ce"
    source = "first-order Taylor pruning (LLM-Pruner); HFPrune baseline CE"
    needs_next_token = True

    def value_and_gradient(self, logits, next_tokens, teacher_logits=None):
        log_p = torch.log_softmax(logits, dim=-1)
        rows = torch.arange(len(next_tokens), device=logits.device)
        value = -log_p[rows, next_tokens]
        gradient = log_p.exp_()
        gradient[rows, next_tokens] -= 1
        return value, gradient
