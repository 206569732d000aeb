"""LLM-Pruner's first-order importance: what the loss of the next token would change without a neuron's weights."""

from hfprune_nb.criteria.base import WeightGradientCriterion
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy
from hfprune_nb.families import Setting


class LLMPruner(WeightGradientCriterion):
    """`sum over gate, up and down of |sum_j w_j g_j|` (vector) or of `sum_j |w_j g_j|` (element), g the mean over windows.

    SDMPrune takes the absolute value of each window's own gradient, and of all three parts together. Elements need their sums in
    float64 for every weight and snapshot: for small models.
    """

    name = "llm_pruner"
    label = "LLM-Pruner"
    source = "LLM-Pruner (arXiv 2305.11627), first order, groups by sum"
    unit = "nat"
    gradient_of = OneHotCrossEntropy()
    settings = {
        "granularity": Setting(
            "vector", "where the absolute value is taken", choices={"vector": "vector-wise", "element": "element-wise"}
        )
    }

    def statistics(self, weights, gradients):
        parts = zip(("gate", "up", "down"), weights, gradients, strict=True)
        return {part: (w * g).sum(1) if self.granularity == "vector" else w * g for part, w, g in parts}

    def importance(self, sums, inputs, down, windows):
        return sum(part.abs() if part.ndim == 1 else part.abs().sum(1) for part in sums.values()) / windows
