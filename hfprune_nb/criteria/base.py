"""What a criterion is: its facts, its settings, and what each kind offers to the scoring engine; it knows no model and no file.

Nothing here or in a criterion's file imports torch: the methods of tensors do the arithmetic, so that a plan or a report can
ask for facts without loading it. Throughout, `inputs` are the weights of gate and up, one (neurons, hidden) matrix each, and
`down` those of down_proj, (hidden, neurons).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from hfprune_nb.errors import UserError
from hfprune_nb.families import Member, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor


class Passes(NamedTuple):
    """How often the calibration text goes through the model: forward, backward, and forward for each neuron of the model."""

    forward: float = 0
    backward: float = 0
    per_neuron: float = 0


class Criterion(Member, ABC):
    """A rule that gives each neuron an importance (higher = keep), with its facts and, as an instance, its settings.

    kind : what it gives the engine. unit : of the importance; between_layers : whether scores of different layers may be
    compared, which only those in units of the model's output may. reads_text : whether it needs calibration text; seeded :
    whether another calibration seed, or another random seed, gives other scores; baseline : whether any criterion should beat
    it. of_groups : whether it scores attention's key-value groups as well as neurons. rank : the paper's three are 0 to 2,
    others 10, baselines 20. passes : how often the text is read.
    subsets : where it is not 0, sums over windows are handed over as (subsets, ...), window n being in subset n modulo
    `subsets`, and there are no snapshots of fewer windows: also, with 1, for sums that are too large to be kept several times.
    """

    noun = "criterion"
    kind: str
    unit = "nat"
    between_layers = False
    reads_text = True
    seeded = True
    baseline = False
    of_groups = False
    passes = Passes()
    subsets = 0

    def numbers_per_neuron(self, width: int, hidden: int) -> int:
        """Return how many numbers a window gives for each neuron of a layer of `width` neurons in a model of size `hidden`.

        That is what is summed in memory: more than a few where `statistics` keeps every weight or pair of neurons.
        """
        return 1


class LogitCriterion(Criterion):
    """A scalar C of the logits at each position, with its closed-form gradient.

    Importance is `S[l, i] = sum over calibration tokens of |h * dC/dh|` with C averaged over a window's positions
    (HFPrune Eq. 4), or what another reduction or aggregation makes of it. Logits are float32 or wider; nothing here needs an
    autograd graph.

    needs : the further arguments of `value_and_gradient`, which the engine hands over by name, each (positions, ...):
    `teacher_logits` of the dense model, for a criterion that scores a student; `next_tokens`, int64, which the last position of
    a window lacks: C is averaged over the others, or over all where it also asks for `label_weight`, 0 at the last position and
    at the others what makes a sum over all positions, divided by their number, the mean over the others; `keys`, int64, for
    `noise`: another one for each seed, draw, window and position. draws : backward passes, whose importance is averaged.
    """

    kind = "logits"
    between_layers = True
    passes = Passes(forward=1, backward=1)
    needs: tuple[str, ...] = ()
    draws = 1
    aggregation: str
    reduction: str
    settings = {
        "reduction": Setting(
            "absolute",
            "how the products h dC/dh of a window become a score: absolute and square act at each token and are then summed, "
            "window squares the signed sum; squares are halved, as in a second-order term",
            choices={"absolute": "absolute per token", "square": "squared per token", "window": "squared per window"},
        ),
        "aggregation": Setting(
            "activation",
            "what the gradient is multiplied with: neurons' activations (HFPrune) or their weights (SDMPrune)",
            choices={"activation": "activation-wise", "weight": "weight-wise"},
        ),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        # Products with weights are for ranking inside a layer.
        self.between_layers = self.aggregation == "activation"

    @classmethod
    def complete(cls, settings: dict) -> dict:
        """Return all settings as `Member.complete`; raise UserError also for a reduction that weights have no use for."""
        complete = super().complete(settings)
        if complete["aggregation"] == "weight" and complete["reduction"] != cls.settings["reduction"].default:
            raise UserError(f"criterion '{cls.name}': reduction is of activations: leave it out with aggregation 'weight'.")
        return complete

    @property
    def of_groups(self) -> bool:  # type: ignore[override]  # a fact of the class, or of its settings
        """Whether its products are with activations, which groups have as well."""
        return self.aggregation == "activation"

    @property
    def only_labelled(self) -> bool:
        """Whether C is defined and averaged only where the text goes on."""
        return "next_tokens" in self.needs and "label_weight" not in self.needs

    @property
    def formula(self) -> tuple:
        """What two criteria share whose gradients are the same, whatever they make of them."""
        return type(self), *(getattr(self, name) for name in self.settings if name not in LogitCriterion.settings)

    def needed(self, available: dict) -> dict:
        """Return those of the `available` arguments that `value_and_gradient` takes."""
        return {name: available[name] for name in self.needs}

    @abstractmethod
    def value_and_gradient(self, logits: Tensor, **needed: Tensor) -> tuple[Tensor, Tensor]:
        """Return C in nats, shape (positions,), and dC/dz, shape (positions, vocabulary).

        logits : (positions, vocabulary), left unchanged, as all arguments are.
        """


class GateCriterion(Criterion):
    """An importance from the derivatives of several logit criteria for a gate on each neuron, all of the same forward pass.

    terms : by name, a logit criterion and how its products h dC/dh of a window are reduced: one of `LogitCriterion`'s
    reductions, or `signed`, their sum u. A neuron's removal changes C by -u to first order.
    """

    kind = "gates"
    between_layers = True
    aggregation = "activation"
    terms: dict[str, tuple[LogitCriterion, str]]

    @property
    def needs(self) -> tuple[str, ...]:
        """What the terms need, as `LogitCriterion.needs`."""
        return tuple(dict.fromkeys(name for criterion, _ in self.terms.values() for name in criterion.needs))

    def numbers_per_neuron(self, width, hidden):
        """Return one number for each term."""
        return len(self.terms)

    @abstractmethod
    def importance(self, sums: dict[str, Tensor], windows: int, seq_len: int) -> Tensor:
        """Return the importance (neurons,) of one layer in float64, from its `terms`, each divided by the number of positions
        over which its C is averaged, and summed over `windows` windows of `seq_len` tokens.
        """


class ActivationCriterion(Criterion):
    """An importance from running sums over the neurons' activations h, which a forward pass collects.

    needs_output : whether `statistics` also takes `output`, (windows, positions, hidden): of the layer, its residual included.
    """

    kind = "activations"
    unit = "layer output"
    passes = Passes(forward=1)
    needs_output = False

    @abstractmethod
    def statistics(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return what is to be summed over windows: (windows, ...) by name, of hidden (windows, positions, neurons)."""

    @abstractmethod
    def importance(self, sums: dict[str, Tensor], inputs: list[Tensor], down: Tensor, tokens: int) -> Tensor:
        """Return the importance (neurons,) of one layer in float64, from its `statistics` summed over `tokens` tokens."""


class WeightGradientCriterion(Criterion):
    """An importance from running sums over windows of the gradients that a logit criterion gives the MLP's weights.

    gradient_of : that criterion, C being averaged over a window's positions. needs_hidden : whether `statistics` also takes
    `hidden`, the activations (positions, neurons).
    """

    kind = "weight_gradients"
    unit = "weight gradient"
    passes = Passes(forward=1, backward=1)
    gradient_of: LogitCriterion
    needs_hidden = False

    @abstractmethod
    def statistics(self, weights: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return what is to be summed over windows: (neurons, ...) by name, of one window.

        weights, gradients : of gate, up and the transposed down, (neurons, hidden) each, in float32 or wider.
        """

    @abstractmethod
    def importance(self, sums: dict[str, Tensor], inputs: list[Tensor], down: Tensor, windows: int) -> Tensor:
        """Return the importance (neurons,) of one layer in float64, from its `statistics` summed over `windows` windows."""


class MeasuredCriterion(Criterion):
    """An importance measured by silencing neurons: many forward passes, for small models."""

    kind = "measured"
    between_layers = True

    @abstractmethod
    def statistics(self, divergence: Callable[[list[dict]], Tensor], widths: list[int]) -> list[Tensor]:
        """Return, for each layer, what a batch of windows adds to the importance, (windows, neurons) in float64.

        divergence : of a list of ablations, each a mapping from layers to the neurons that it silences there, returns the
        KL(dense || ablated) of each ablation and window, (ablations, windows), mean over positions in nats. widths : neurons of
        each layer.
        """


class SearchCriterion(Criterion):
    """An importance that a search over masks finds, which goes on from step to step: many forward passes, for small models.

    start : the criterion whose importance the search begins with. Each process of a group does all of the search.
    """

    kind = "search"
    unit = ""
    start: Criterion

    @abstractmethod
    def search(self, loss: Callable[[range, list[Tensor]], float], start: list[Tensor], windows: int, seed: int) -> list[Tensor]:
        """Return the importance (neurons,) of each layer in float64.

        loss : of the numbers of some windows and a mask (neurons,) for each layer, 1 or 0, returns the mean cross-entropy of the
        next token in nats. start : the importance by that criterion; windows : their number.
        """


class WeightCriterion(Criterion):
    """An importance that reads no calibration text."""

    kind = "weights"
    unit = "weight"
    reads_text = False

    @abstractmethod
    def importance(self, inputs: list[Tensor], down: Tensor, generator: Generator) -> Tensor:
        """Return the importance (neurons,) of one layer in float64; generator : seeded source of random numbers, on the CPU."""
