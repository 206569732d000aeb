"""GBLM-Pruner for neurons: output weights times the norms of activations and of gradients."""

from hfprune_nb.criteria.base import WeightGradientCriterion
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy
from hfprune_nb.families import Setting


class GBLM(WeightGradientCriterion):
    """`sum_j |D_ji| (||h_i|| + alpha ||G_ji||)`, G being the gradient of a window's mean cross-entropy for down_proj.

    `||h_i||^2` is the mean over windows of the sum over tokens, as in the source, whose norms of G over 128 samples are not
    divided by their number; here they are scaled to 128 windows, so that alpha means the same for any number. The 2-norm needs a
    float64 sum for every output weight.
    """

    name = "gblm"
    label = "GBLM-Pruner"
    source = "GBLM-Pruner (arXiv 2311.04902), over output weights"
    basis = "structured"
    unit = "layer output"
    needs_hidden = True
    gradient_of = OneHotCrossEntropy()
    settings = {
        "p": Setting(1, "the norm of gradients over windows", choices={1: "1-norm", 2: "2-norm"}),
        "alpha": Setting(100.0, "the weight of gradients, for 128 windows", low=0),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.subsets = self.p - 1  # sums of the 1-norm are one number for each neuron

    def numbers_per_neuron(self, width, hidden):
        return 2 if self.p == 1 else 1 + hidden

    def statistics(self, weights, gradients, hidden):
        down, slope = weights[-1], gradients[-1]
        size = (down.abs() * slope.abs()).sum(1) if self.p == 1 else slope.square()
        return {"squares": hidden.square().sum(0), "gradients": size}

    def importance(self, sums, inputs, down, windows):
        sums, size, scale = dict(sums), down.double().abs(), 128 / windows
        if self.p == 1:
            gradients = sums["gradients"] * scale
        else:
            sums = {name: total[0] for name, total in sums.items()}
            gradients = ((sums["gradients"] * scale).sqrt() * size.t()).sum(1)
        return size.sum(0) * (sums["squares"] / windows).sqrt() + self.alpha * gradients
