"""Mixed sparsity by rank: the layers, sorted by what their loss does to the model, keep more in equal steps."""

from hfprune_nb.allocations.base import MeasuredRule, SpreadRule, lowest


class IscRank(SpreadRule, MeasuredRule):
    """`removed_l = p + reach * (1 - 2 r_l / (L - 1))`, r the rank of layer l of L, from 0 for the least sensitive one.

    Sensitivity is the measured KL to the dense model when the fraction p that uniform allocation removes goes from this layer
    alone. The source takes the trace of the loss's Hessian from one random probe, which scatters by four orders of magnitude.
    """

    name = "isc_rank"
    label = "Sensitivity rank"
    source = "our reading of sensitivity-aware mixed sparsity (arXiv 2310.09499)"

    def protection(self, units, importance, budget, measure):
        share = 1 - budget.keep / sum(unit.width for unit in units)
        gone = [lowest(row, round(share * len(row))) for row in importance]
        damage = measure.divergence([{layer: neurons} for layer, neurons in enumerate(gone)], self.windows)
        order = sorted(range(len(units)), key=damage.__getitem__)
        return [order.index(layer) for layer in range(len(units))]
