"""One-hot cross-entropy: how the loss of the true next token changes."""

from hfprune_nb.criteria.base import LogitCriterion


class OneHotCrossEntropy(LogitCriterion):
    """`C = -log p[y]`, `dC/dz = p - onehot(y)`; Taylor pruning as in LLM-Pruner, the baseline "CE" of HFPrune's Table 6."""

    name = "one_hot_ce"
    label = "One-hot CE"
    source = "first-order Taylor pruning (LLM-Pruner); HFPrune baseline CE"
    rank = 0
    needs = ("next_tokens",)

    def value_and_gradient(self, logits, next_tokens):
        log_p, chosen = logits.log_softmax(-1), next_tokens[:, None]
        value = -log_p.gather(1, chosen)[:, 0]
        gradient = log_p.exp_()
        return value, gradient.scatter_add_(1, chosen, gradient.new_full(chosen.shape, -1))
