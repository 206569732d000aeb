"""Depth: whole MLPs go, the least useful first."""

from hfprune_nb.allocations.base import MeasuredRule
from hfprune_nb.families import Setting


class Depth(MeasuredRule):
    """Layers lose their whole MLP, in the order of what that does, until the next one would exceed the budget.

    The rest is taken from all other layers in the same fraction, so that the number of parameters is that of any other rule.
    """

    name = "depth"
    label = "Depth"
    source = "block influence of ShortGPT (arXiv 2403.03853) or leave-one-out (arXiv 2407.16286), of MLPs; KL is our own measure"
    settings = {
        "by": Setting(
            "kl",
            "what an MLP's loss does: KL to the dense model, or 1 - cos of the residual stream before and behind it",
            choices={"kl": "measured KL", "influence": "block influence"},
        ),
        "protect": Setting(0, "the number of layers at either end that keep their MLP", low=0),
    }

    def plan(self, units, importance, budget, measure):
        layers = range(len(units))
        if self.by == "kl":
            losses = measure.divergence([{layer: range(units[layer].width)} for layer in layers], self.windows)
        else:
            losses = measure.influence(self.windows)
        left, dropped = sum(unit.width for unit in units) - budget.keep, set()
        for layer in sorted(layers[self.protect : len(units) - self.protect], key=losses.__getitem__):
            if units[layer].width > left:
                break
            dropped.add(layer)
            left -= units[layer].width
        others = [unit for layer, unit in enumerate(units) if layer not in dropped]
        share = budget.keep / sum(unit.width for unit in others)
        widths = iter(budget.widths([share * unit.width for unit in others], others))
        self.found["dropped_layers"] = sorted(dropped)
        return [0 if layer in dropped else next(widths) for layer in layers]
