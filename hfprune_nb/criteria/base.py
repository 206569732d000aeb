"""What every criterion offers to the scoring engine; a criterion holds its formula and knows no model and no file."""

from abc import ABC, abstractmethod

import torch


class Criterion(ABC):
    """A rule that gives each neuron an importance (higher = keep)."""

    name: str
    source: str


class LogitCriterion(Criterion):
    """A scalar C of the logits at each position, with its closed-form gradient.

    Importance is `S[l, i] = sum over calibration tokens of |h * dC/dh|` with C averaged over a window's positions
    (HFPrune Eq. 4). Logits are float32 or wider; nothing here needs an autograd graph.
    """

    needs_teacher = False
    needs_next_token = False

    @abstractmethod
    def value_and_gradient(
        self, logits: torch.Tensor, next_tokens: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return C in nats, shape (positions,), and dC/dz, shape (positions, vocabulary).

        logits, teacher_logits : (positions, vocabulary), left unchanged; next_tokens : (positions,) int64, read only where
        `needs_next_token`; teacher_logits only where `needs_teacher`.
        """


class WeightCriterion(Criterion):
    """An importance that reads no calibration text."""

    @abstractmethod
    def importance(self, inputs: list[torch.Tensor], down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the importance (neurons,) in float64.

        inputs : one (neurons, hidden) matrix per input projection (gate, up); down : (hidden, neurons); generator : seeded
        source of random numbers, on the CPU.
        """
