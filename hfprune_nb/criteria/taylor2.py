"""Second-order Taylor importance of a neuron's gate: the gradient and the squared gradient of the loss of the next token."""

from hfprune_nb.criteria.base import GateCriterion, Passes
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy
from hfprune_nb.families import Setting


class Taylor2(GateCriterion):
    """`|mean u / T - 1/2 mean u^2 / T|` over windows, u being the sum of h dC/dh over a window's T positions, C cross-entropy.

    A gate of the neuron, from 1 to 0, changes C by `-u + 1/2 u^2`, squares being the empirical Fisher information, to which
    curvature `published` gives T times less weight, as LLM-Pruner's squares of a mean's gradient do. The form for each weight is
    `llm_pruner` with order mixed.
    """

    name = "taylor2"
    label = "Taylor, second order"
    source = "LLM-Pruner (arXiv 2305.11627), mixed order, with mask gradients (Kwon et al. 2022) in place of those of weights"
    basis = "structured"
    passes = Passes(forward=1, backward=1)
    terms = {"first": (OneHotCrossEntropy(), "signed"), "second": (OneHotCrossEntropy(), "window")}
    settings = {
        "curvature": Setting(
            "fisher",
            "the scale of the second order",
            choices={"fisher": "Fisher curvature", "published": "published curvature"},
        ),
        "sign": Setting(
            "absolute",
            "whether the size of the predicted change counts, or the change itself",
            choices={"absolute": "absolute", "signed": "signed"},
        ),
    }

    def importance(self, sums, windows, seq_len):
        scale = 1 if self.curvature == "fisher" else 1 / (seq_len - 1)
        change = (scale * sums["second"] - sums["first"]) / windows
        return change.abs() if self.sign == "absolute" else change
