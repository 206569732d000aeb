"""Wanda for neurons: the norm of a neuron's output weights times that of its activation, one forward pass."""

from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.families import Setting


class Wanda(ActivationCriterion):
    """`||D_:i||_p * sqrt(mean h_i^2)`, D being down_proj; p 1 sums Wanda's scores of the weights (Wanda-sp), p 2 is the error of
    the layer's output without the neuron. All layers see dense activations ("parallel"), where Wanda-sp's code prunes in turn.
    Of an attention group it is the sum over its channels, as in Wanda-sp.
    """

    name = "wanda"
    label = "Wanda"
    of_groups = True
    source = "Wanda-sp in FLAP (arXiv 2312.11983), after Wanda (arXiv 2306.11695)"
    settings = {"p": Setting(1, "the norm of a neuron's output weights", choices={1: "1-norm", 2: "2-norm"})}

    def statistics(self, hidden):
        return {"squares": hidden.square().sum(1)}

    def importance(self, sums, inputs, down, tokens):
        return down.double().norm(p=self.p, dim=0) * (sums["squares"] / tokens).sqrt()
