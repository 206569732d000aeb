"""SAAP, as we read it: two Taylor importances fused by their uncertainty, and how they fluctuate between texts."""

from hfprune_nb.criteria.base import WeightGradientCriterion
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy
from hfprune_nb.families import Setting


class SAAP(WeightGradientCriterion):
    """`I / (1 + f)`, I being half the sum of the vector-wise and the element-wise importance of `llm_pruner`, each divided by its
    mean over the layer, and f the standard deviation of I over disjoint subsets of windows, relative to its mean.

    Dividing by the mean is the fusion by homoscedastic uncertainty in closed form. The source leaves open whether what is
    unstable goes first or stays: `fluctuation` has both. A float64 sum for every weight and subset: for small models.
    """

    name = "saap"
    label = "SAAP, our reading"
    source = "SAAP (arXiv 2412.15127), whose fluctuation indicator has no public formula"
    basis = "reading"
    unit = ""
    gradient_of = OneHotCrossEntropy()
    settings = {
        "fluctuation": Setting(
            "removed",
            "whether neurons whose importance fluctuates go first or stay",
            choices={"removed": "unstable go first", "kept": "unstable stay"},
        ),
        "subsets": Setting(8, "the number of disjoint subsets of windows", low=2),
    }

    def numbers_per_neuron(self, width, hidden):
        return 3 * hidden

    def statistics(self, weights, gradients):
        return {part: w * g for part, w, g in zip(("gate", "up", "down"), weights, gradients, strict=True)}

    def importance(self, sums, inputs, down, windows):
        fused = self._fused([part.sum(0) for part in sums.values()])
        parts = [self._fused([part[subset] for part in sums.values()]) for subset in range(min(self.subsets, windows))]
        mean = sum(parts) / len(parts)
        spread = (sum((part - mean).square() for part in parts) / max(1, len(parts) - 1)).sqrt()
        stability = 1 + spread / (mean + 1e-6 * fused.mean())
        return fused / stability if self.fluctuation == "removed" else fused * stability

    @staticmethod
    def _fused(parts):
        vector, element = sum(part.sum(1).abs() for part in parts), sum(part.abs().sum(1) for part in parts)
        return (vector / vector.mean() + element / element.mean()) / 2
