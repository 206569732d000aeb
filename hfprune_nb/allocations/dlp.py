"""DLP: layers whose typical Wanda score is large lose more."""

from hfprune_nb.allocations.base import SpreadRule, wanda_elements
from hfprune_nb.families import Setting


class Dlp(SpreadRule):
    """`removed_l = p + mean(d) - d_l`, d falling linearly with a layer's median of Wanda's scores of the weights of down_proj.

    `|D_ji| * rms(h_i)` are those scores, p is the fraction that uniform allocation removes, and the range of d is twice the
    reach. That a larger median loses more is meant: medians grow with depth. The paper takes the median over all matrices of a
    layer, its code the mean; both say it for single weights at 70 %, we for neurons.
    """

    name = "dlp"
    label = "DLP"
    source = "structured form of DLP (arXiv 2505.23807)"
    reads = ("wanda",)
    needs = ("scores", "down")
    settings = {
        "statistic": Setting("median", "of a layer's scores", choices={"median": "median", "mean": "mean"}),
        "of": Setting("weights", "whose scores", choices={"weights": "of weights", "neurons": "of neurons"}),
    }

    def protection(self, units, importance, budget, scores, down):
        rows = zip(scores["wanda"], down, strict=True)
        values = (wanda_elements(row, weight) if self.of == "weights" else row for row, weight in rows)
        return [-float(getattr(each, self.statistic)()) if each.numel() else 0.0 for each in values]
