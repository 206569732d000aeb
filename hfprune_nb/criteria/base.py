"""What a criterion is: its facts, its settings, and what each kind offers to the scoring engine; it knows no model and no file.

Nothing here or in a criterion's file imports torch: the methods of tensors do the arithmetic, so that a plan or a report can
ask for facts without loading it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from hfprune_nb.families import Member, Setting

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Passes(NamedTuple):
    """How often the calibration text goes through the model forward, and how often backward."""

    forward: float = 0
    backward: float = 0


class Criterion(Member, ABC):
    """A rule that gives each neuron an importance (higher = keep), with its facts and, as an instance, its settings.

    name, label, source : what a study, a reader and a reference list call it. kind : what it gives the engine.
    unit : of the importance; between_layers : whether scores of different layers may be compared, which only those in units of
    the model's output may. reads_text : whether it needs calibration text; seeded : whether another calibration seed, or another
    random seed, gives other scores; baseline : whether any criterion should beat it. rank : its place in tables: the paper's
    three are 0 to 2, others 10, baselines 20. passes : how often the text is read. settings : its settings by name; a class adds
    its own to those of its parents, and an instance has each one's value as an attribute.
    """

    noun = "criterion"
    kind: str
    unit = "nat"
    between_layers = False
    reads_text = True
    seeded = True
    baseline = False
    passes = Passes()


class LogitCriterion(Criterion):
    """A scalar C of the logits at each position, with its closed-form gradient.

    Importance is `S[l, i] = sum over calibration tokens of |h * dC/dh|` with C averaged over a window's positions
    (HFPrune Eq. 4), or what another `reduction` makes of the products. Logits are float32 or wider; nothing here needs an
    autograd graph.

    needs : the further arguments of `value_and_gradient`, which the engine hands over by name, each (positions, ...):
    `teacher_logits` of the dense model, for a criterion that scores a student; `next_tokens`, int64, which the last position of
    a window lacks: C is averaged over the others, or over all where it also asks for `label_weight`, 0 at the last position and
    at the others what makes a sum over all positions, divided by their number, the mean over the others.
    """

    kind = "logits"
    between_layers = True
    passes = Passes(forward=1, backward=1)
    needs: tuple[str, ...] = ()
    settings = {
        "aggregation": Setting(
            "activation",
            "what the gradient is multiplied with: neurons' activations (HFPrune) or their weights (SDMPrune)",
            choices={"activation": "activation-wise", "weight": "weight-wise"},
        ),
    }

    @property
    def only_labelled(self) -> bool:
        """Whether C is defined and averaged only where the text goes on."""
        return "next_tokens" in self.needs and "label_weight" not in self.needs

    def needed(self, available: dict) -> dict:
        """Return those of the `available` arguments that `value_and_gradient` takes."""
        return {name: available[name] for name in self.needs}

    @abstractmethod
    def value_and_gradient(self, logits: Tensor, **needed: Tensor) -> tuple[Tensor, Tensor]:
        """Return C in nats, shape (positions,), and dC/dz, shape (positions, vocabulary).

        logits : (positions, vocabulary), left unchanged, as all arguments are.
        """


class WeightCriterion(Criterion):
    """An importance that reads no calibration text."""

    kind = "weights"
    unit = "weight"
    reads_text = False
    baseline = True
    rank = 20

    @abstractmethod
    def importance(self, inputs: list[Tensor], down: Tensor, generator: Generator) -> Tensor:
        """Return the importance (neurons,) in float64.

        inputs : one (neurons, hidden) matrix per input projection (gate, up); down : (hidden, neurons); generator : seeded
        source of random numbers, on the CPU.
        """
