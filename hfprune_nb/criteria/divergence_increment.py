"""Self-distillation completed to second order: what a neuron's removal adds to the divergence of an already pruned student."""

from hfprune_nb.criteria.base import GateCriterion, Passes
from hfprune_nb.criteria.kl_fisher import KLFisher
from hfprune_nb.criteria.self_distillation import SelfDistillation


class DivergenceIncrement(GateCriterion):
    """`KL(S + i) - KL(S) = <dz_i, F dz_S> + 1/2 <dz_i, F dz_i>`: minus the signed window sum of
    self-distillation's h dC/dh, plus half the squared window sum of KL-Fisher, both at the student without S.

    Self-distillation has the first term alone, and its size; KL-Fisher, at the dense model, the second. The increment may be
    negative: then a removal undoes some of what S has done.
    """

    name = "divergence_increment"
    label = "Divergence increment"
    source = "own derivation from SDMPrune (arXiv 2506.11120) and KL-Fisher"
    basis = "own"
    passes = Passes(forward=2, backward=3)
    settings = {"first_stage_ratio": SelfDistillation.settings["first_stage_ratio"]}
    terms = {"cross": (SelfDistillation(), "signed"), "own": (KLFisher(), "window")}

    def importance(self, sums, windows, seq_len):
        return sums["own"] - sums["cross"]
