"""LLM-BIP, as we read it: how much a neuron adds to the output of its transformer block."""

from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.families import Setting


class LLMBIP(ActivationCriterion):
    """`mean |h_i| ||D_:i||`, over tokens: the change of the block's output when the neuron is silenced.

    `relative` divides each token's change (2-norm) by the norm of the block's output, which makes layers comparable. Wanda has
    the root mean square in place of the mean of |h|: expect nearly the same ranking.
    """

    name = "llm_bip"
    label = "LLM-BIP, our reading"
    source = "LLM-BIP (arXiv 2412.06419), of which no formula was found; forward propagation of a block's output error"
    basis = "reading"
    settings = {
        "norm": Setting(
            "1",
            "the norm of a neuron's output weights",
            choices={"1": "1-norm", "2": "2-norm", "relative": "relative to the block's output"},
        )
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.between_layers = self.needs_output = self.norm == "relative"

    def statistics(self, hidden, output=None):
        size = hidden.abs()
        return {"absolute": (size if output is None else size / output.norm(dim=-1, keepdim=True)).sum(1)}

    def importance(self, sums, inputs, down, tokens):
        return down.double().norm(p=1 if self.norm == "1" else 2, dim=0) * sums["absolute"] / tokens
