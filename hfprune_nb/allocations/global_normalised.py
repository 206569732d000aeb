"""One ranking over all layers of scores that were made comparable within each."""

from hfprune_nb.allocations.global_rank import Global
from hfprune_nb.families import Setting


class GlobalNormalised(Global):
    """As `global`, each layer's scores first divided by what is usual in the layer, so that any criterion can be ranked.

    What is compared is then how a neuron stands out in its layer, not what it does to the output.
    """

    name = "global_normalised"
    label = "Global, normalised"
    source = "FLAP (arXiv 2312.11983) for the standardised scores; our reading of SAAP (arXiv 2412.15127) for the mean"
    needs_comparable = False
    in_rounds = False  # neurons that have gone have ranks and no scores
    settings = {
        "by": Setting(
            "deviation",
            "what a layer's scores are divided by",
            choices={"deviation": "standardised", "mean": "divided by the mean", "norm": "divided by the 2-norm"},
        )
    }

    def plan(self, units, importance, budget):
        return super().plan(units, [self._normalised(row.double()) if len(row) else row for row in importance], budget)

    def _normalised(self, row):
        scale = {
            "deviation": row.std(correction=0),
            "mean": row.abs().mean(),
            "norm": row.norm() / len(row) ** 0.5,
        }[self.by]
        return (row - row.mean() if self.by == "deviation" else row) / scale.clamp(min=1e-300)
