"""One ranking over all layers: a layer keeps what stands above the common threshold."""

import math
from collections import Counter
from fractions import Fraction

from hfprune_nb.allocations.base import AllocationRule
from hfprune_nb.families import Setting


class Global(AllocationRule):
    """The least important neurons of the whole model go, whichever layers they are in, as far as each layer's `floor` allows.

    Importance must be in units of the model's output: otherwise the ranking compares what cannot be compared.
    """

    name = "global"
    label = "Global"
    source = "one ranking over all layers, as in FLAP and GISP"
    needs_importance = needs_comparable = True
    settings = {"floor": Setting(0.0, "the fraction of its neurons that each layer keeps in any case", low=0, high=1)}

    def plan(self, units, importance, budget):
        least = [max(1, math.ceil(Fraction(str(self.floor)) * unit.width)) for unit in units]
        free = round(budget.keep) - sum(least)
        if free < 0:
            raise budget.out_of_reach(units, least)
        ranking = []
        for layer, (row, low) in enumerate(zip(importance, least, strict=True)):
            ranking += [(score, layer) for score in sorted(row.tolist())[: max(0, len(row) - low)]]
        ranking.sort(key=lambda pair: pair[0])  # stable: of equals the first layer's go first
        above = Counter(layer for _, layer in ranking[len(ranking) - free :])
        return budget.widths([low + above[layer] for layer, low in enumerate(least)], units, least)
