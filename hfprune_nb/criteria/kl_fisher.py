"""KL-Fisher: half the second derivative of KL(dense || pruned) for removing a neuron, from the model's own distribution."""

import math

from hfprune_nb.criteria import noise
from hfprune_nb.criteria.base import LogitCriterion, Passes
from hfprune_nb.families import Setting


class KLFisher(LogitCriterion):
    """`C = -log p[y]` with `y ~ p`: `1/2 E[(sum over a window of h dC/dh)^2]` is KL(dense || silenced) to second order.

    One neuron acts on each target from many positions, hence the signed sum over the window before the square; the squares of
    tokens (reduction `square`) are those of single positions silenced. Any cotangent with covariance `F = diag(p) - p p^T` will
    do: `e_y - p`, or a sketch `s (n - <s, n> s)`, `s = sqrt(p)`, with Gaussian or random signs n. The value is `-log p[y]`,
    whose mean estimates the entropy, which a sketch gives itself.
    """

    name = "kl_fisher"
    label = "KL-Fisher"
    source = (
        "own derivation; Fisher as the Hessian of KL: Martens (arXiv 1412.1193); squared window sums: Theis (arXiv 1801.05787)"
    )
    basis = "own"
    needs = ("keys",)
    settings = {
        "reduction": Setting(**vars(LogitCriterion.settings["reduction"]) | {"default": "window"}),
        "estimator": Setting(
            "label",
            "the random cotangent: the gradient for a sampled label, or a sketch of the Fisher matrix",
            choices={"label": "sampled labels", "gaussian": "Gaussian sketch", "rademacher": "Rademacher sketch"},
        ),
        "draws": Setting(1, "the number of cotangents, each a backward pass", low=1),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.passes = Passes(forward=1, backward=self.draws)

    def value_and_gradient(self, logits, keys):
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        if self.estimator == "label":
            sums = p.double().cumsum(-1)  # float32 would miss the tail of a large vocabulary
            chosen = (sums <= noise.uniform(keys)[:, None] * sums[:, -1:]).sum(-1, keepdim=True).clamp_(max=p.shape[1] - 1)
            return -log_p.gather(1, chosen)[:, 0], p.scatter_add_(1, chosen, p.new_full(chosen.shape, -1))
        value, root = -(p * log_p).sum(-1), p.sqrt()
        bits = noise.spread(keys, p.shape[1])
        if self.estimator == "rademacher":
            numbers = (bits >> 63).to(p.dtype).mul_(2).add_(1)
        else:
            radius = (1 - noise.uniform(bits)).log_().mul_(-2).sqrt_()
            numbers = radius.mul_(noise.uniform(noise.mixed(bits)).mul_(2 * math.pi).cos_()).to(p.dtype)
        return value, root.mul(numbers - (root * numbers).sum(-1, keepdim=True) * root)
