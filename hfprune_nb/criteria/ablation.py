"""Ablation: what silencing a neuron really does, which the other criteria estimate; for small models."""

from hfprune_nb.criteria.base import MeasuredCriterion, Passes
from hfprune_nb.families import Setting


class Ablation(MeasuredCriterion):
    """KL(dense || ablated) in nats per position, summed over windows, each neuron or group of neighbours silenced by itself.

    A group's divergence is shared equally among its neurons. Only the layers from the neuron's own on are computed again.
    """

    name = "ablation"
    label = "Measured KL"
    source = "direct measurement"
    settings = {"group": Setting(1, "the number of neurons, neighbours by index, that are silenced together", low=1)}

    def __init__(self, **settings):
        super().__init__(**settings)
        self.passes = Passes(forward=1, per_neuron=0.5 / self.group)

    def statistics(self, divergence, widths):
        found = []
        for layer, width in enumerate(widths):
            groups = [range(start, min(start + self.group, width)) for start in range(0, width, self.group)]
            measured = divergence([{layer: group} for group in groups])
            shared = measured / measured.new_tensor([len(group) for group in groups])[:, None]
            found.append(shared.repeat_interleave(self.group, dim=0)[:width].t())
        return found
