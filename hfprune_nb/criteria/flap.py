"""FLAP: how much a neuron's activation fluctuates, weighted with its output weights."""

from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.families import Setting


class FLAP(ActivationCriterion):
    """`var(h_i) ||D_:i||^2` (WIFV): the error of the layer's output without the neuron, where a bias makes up for its mean.

    So it goes with compensation `flap_bias`; without that bias the error is that of `obd`. FLAP compares layers by scores
    standardised within each, and its streaming variance is biased; here it is `mean h^2 - (mean h)^2` over all tokens.
    """

    name = "flap"
    label = "FLAP"
    source = "FLAP (arXiv 2312.11983), metrics WIFV and IFV"
    settings = {
        "metric": Setting("wifv", "what the score is", choices={"wifv": "weighted variance", "ifv": "variance of the activation"})
    }

    def numbers_per_neuron(self, width, hidden):
        return 2

    def statistics(self, hidden):
        wide = hidden.double()
        return {"squares": wide.square().sum(1), "sums": wide.sum(1)}

    def importance(self, sums, inputs, down, tokens):
        variance = (sums["squares"] / tokens - (sums["sums"] / tokens).square()).clamp(min=0)
        return variance * down.double().square().sum(0) if self.metric == "wifv" else variance
