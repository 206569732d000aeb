"""OWL: layers with more outliers among Wanda's scores keep more."""

from hfprune_nb.allocations.base import SpreadRule, wanda_elements
from hfprune_nb.families import Setting


class Owl(SpreadRule):
    """The kept fraction grows linearly with the share of weights of down_proj whose Wanda score exceeds M times the layer's mean.

    `|D_ji| * rms(h_i)` are those scores; the source counts them in all matrices of a layer, for single weights at 70 %.
    """

    name = "owl"
    label = "OWL"
    source = "structured form of OWL (arXiv 2310.05175)"
    reads = ("wanda",)
    needs = ("scores", "down")
    settings = {
        "reach": Setting(0.08, "half of the range between the layers' kept fractions, its lambda", low=0, high=0.5),
        "m": Setting(5.0, "how many times the mean an outlier exceeds", low=0, open=True),
    }

    def protection(self, units, importance, budget, scores, down):
        rows = (wanda_elements(row, weight) for row, weight in zip(scores["wanda"], down, strict=True))
        return [float((row > self.m * row.mean()).float().mean()) if row.numel() else 0.0 for row in rows]
