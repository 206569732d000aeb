"""Random importance: the control that any criterion has to beat."""

import torch

from hfprune_nb.criteria.base import WeightCriterion


class Random(WeightCriterion):
    """Uniform numbers in (0, 1], independent for every neuron, fixed by the seed."""

    name = "random"
    source = "control"

    def importance(self, inputs, down, generator):
        return 1 - torch.rand(down.shape[1], dtype=torch.float64, generator=generator)
