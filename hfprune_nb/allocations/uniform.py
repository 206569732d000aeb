"""The same for every layer: the paper's allocation, and the only one whose models are plain checkpoints."""

from hfprune_nb.allocations.base import AllocationRule


class Uniform(AllocationRule):
    """Every layer keeps the same fraction of its neurons; layers that are equally wide stay equally wide.

    Their width is then the nearest whole number, within half a neuron per layer of the budget.
    """

    name = "uniform"
    label = "Uniform"
    source = "HFPrune Algorithm 1"
    rank = 0

    def plan(self, units, importance, budget):
        width, step = units[0].width, budget.multiple_of
        if any(unit.width != width for unit in units):
            share = budget.keep / sum(unit.width for unit in units)
            return budget.widths([share * unit.width for unit in units], units)
        kept = width - round(width - budget.keep / len(units))
        if kept < 1:
            raise budget.out_of_reach(units, [1] * len(units))
        return [max(step, step * round(kept / step)) if step > 1 else kept] * len(units)
