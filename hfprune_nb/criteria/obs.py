"""Optimal brain surgeon for neurons: the error of a layer's output that is left when the other neurons make up for one."""

from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.criteria.obd import DAMPING


class OBS(ActivationCriterion):
    """`||D_:i||^2 / [H^-1]_ii`, H being the mean of `h h^T` over tokens plus `damping` times the mean of its diagonal.

    It is the error after down_proj was fitted anew by least squares, so it goes with compensation `least_squares`. With fewer
    tokens than neurons, damping decides. Memory: layers * neurons^2 * 8 bytes.
    """

    name = "obs"
    label = "OBS"
    source = "OBS as a term of ISC (arXiv 2310.09499)"
    basis = "structured"
    settings = {"damping": DAMPING}
    subsets = 1

    def numbers_per_neuron(self, width, hidden):
        return width

    def statistics(self, hidden):
        wide = hidden.double()
        return {"products": wide.mT @ wide}

    def importance(self, sums, inputs, down, tokens):
        return down.double().square().sum(0) * self.hessian(sums, tokens)[1]

    def hessian(self, sums, tokens):
        """Return H_ii and 1 / [H^-1]_ii, (neurons,) each."""
        from torch import linalg  # a family's files load without torch

        products = sums["products"][0] / tokens
        diagonal = products.diagonal()
        diagonal += self.damping * diagonal.mean()
        factor = linalg.cholesky(products)
        identity = products.new_ones(len(products)).diag()
        return diagonal, 1 / linalg.solve_triangular(factor, identity, upper=False).square().sum(0)
