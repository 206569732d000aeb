"""ISC: the saliencies of optimal brain damage and optimal brain surgeon, added."""

from hfprune_nb.criteria.obs import OBS


class ISC(OBS):
    """`||D_:i||^2 (H_ii + 1 / [H^-1]_ii)`, H as that of `obs`: between `obd` and twice that, so it can hardly rank otherwise.

    The paper's formula, with squared norms of columns for its weights; its code takes another one, with a Cholesky factor.
    """

    name = "isc"
    label = "ISC"
    source = "ISC (arXiv 2310.09499)"

    def importance(self, sums, inputs, down, tokens):
        return down.double().square().sum(0) * sum(self.hessian(sums, tokens))
