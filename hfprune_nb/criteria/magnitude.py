"""Weight magnitude: a baseline that never looks at the model's output."""

from hfprune_nb.criteria.base import WeightCriterion


class Magnitude(WeightCriterion):
    """Euclidean norm of all weights of a neuron: its gate row, its up row and its down column together."""

    name = "magnitude"
    label = "Magnitude"
    source = "baseline: group L2 norm"
    baseline = True
    rank = 20
    seeded = False

    def importance(self, inputs, down, generator=None):
        squares = sum(matrix.double().square().sum(dim=1) for matrix in inputs) + down.double().square().sum(dim=0)
        return squares.sqrt()
