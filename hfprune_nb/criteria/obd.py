"""Optimal brain damage for neurons: the error of a layer's output when one neuron is removed and nothing else changes."""

from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.families import Setting

DAMPING = Setting(0.01, "what is added to the diagonal of the Hessian, relative to its mean", low=0, open=True)


class OBD(ActivationCriterion):
    """`||D_:i||^2 H_ii`, H being the mean of `h h^T` over tokens plus `damping` times the mean of its diagonal.

    But for the damping it is the square of `wanda` with p 2.
    """

    name = "obd"
    label = "OBD"
    source = "OBD as a term of ISC (arXiv 2310.09499)"
    basis = "structured"
    settings = {"damping": DAMPING}

    def statistics(self, hidden):
        return {"squares": hidden.double().square().sum(1)}

    def importance(self, sums, inputs, down, tokens):
        squares = sums["squares"] / tokens
        return down.double().square().sum(0) * (squares + self.damping * squares.mean())
