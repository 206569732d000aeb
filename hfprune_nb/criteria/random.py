"""Random importance: the baseline that any criterion has to beat."""

from hfprune_nb.criteria.base import WeightCriterion


class Random(WeightCriterion):
    """Uniform numbers in (0, 1], independent for every neuron, fixed by the seed."""

    name = "random"
    label = "Random"
    source = "baseline"
    baseline = True
    rank = 20
    unit = ""

    def importance(self, inputs, down, generator):
        return 1 - down.new_empty(down.shape[1], device="cpu").double().uniform_(generator=generator)
