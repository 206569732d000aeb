"""Self-distillation: the divergence of a slightly pruned student from the dense model (SDMPrune)."""

from hfprune_nb.criteria.base import LogitCriterion, Passes
from hfprune_nb.families import Setting


class SelfDistillation(LogitCriterion):
    """`C = (1 - alpha) CE + alpha KL(q || p)` with the teacher's `q = softmax(z_teacher / temperature)`.

    `dC/dz = (1 - alpha) (p - onehot(y)) + alpha (p - q)`. Only the teacher is tempered, as in SDMPrune's code, which uses
    alpha .4 and temperature .2 at 20 %, .42 and .5 at 30 %, .1 and .2 at 40 %. At the dense model itself (q = p, alpha 1)
    the gradient is zero, which is why the engine scores a student that has already lost a few neurons.

    SDMPrune aggregates weight-wise; the default, activation-wise as HFPrune's, chooses other neurons.
    """

    name = "self_distillation"
    label = "Self-distillation"
    source = "SDMPrune (arXiv 2506.11120), whose own aggregation is weight-wise; HFPrune baseline SD"
    rank = 1
    passes = Passes(forward=2, backward=2)
    settings = {
        "alpha": Setting(1.0, "the weight of the divergence, 1 - alpha being that of cross-entropy", low=0, high=1),
        "temperature": Setting(1.0, "what divides the teacher's logits", low=0, open=True),
        "first_stage_ratio": Setting(
            0.025,
            "the fraction of neurons, lowest by one-hot CE, that the student has lost",
            low=0,
            open=True,
            high=0.9,
        ),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.needs = ("teacher_logits",) if self.alpha == 1 else ("teacher_logits", "next_tokens", "label_weight")

    def value_and_gradient(self, logits, teacher_logits, next_tokens=None, label_weight=None):
        log_p, log_q = logits.log_softmax(-1), (teacher_logits / self.temperature).log_softmax(-1)
        q = log_q.exp()
        value = log_q.sub_(log_p).mul_(q).sum(-1) * self.alpha
        if self.alpha == 1:
            return value, log_p.exp_().sub_(q)
        # Cross-entropy and divergence are means over their own positions, as in SDMPrune's code: the last has no label.
        chosen, share = next_tokens[:, None], ((1 - self.alpha) * label_weight)[:, None]
        value -= (share * log_p.gather(1, chosen))[:, 0]
        gradient = log_p.exp_().mul_(self.alpha + share).sub_(q, alpha=self.alpha)
        return value, gradient.scatter_add_(1, chosen, -share)
