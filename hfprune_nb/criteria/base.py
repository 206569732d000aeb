"""What a criterion is: its facts, its settings, and what each kind offers to the scoring engine; it knows no model and no file.

Nothing here or in a criterion's file imports torch: the methods of tensors do the arithmetic, so that a plan or a report can
ask for facts without loading it.
"""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from hfprune_nb.errors import UserError

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Passes(NamedTuple):
    """How often the calibration text goes through the model forward, and how often backward."""

    forward: float = 0
    backward: float = 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a criterion: its default, what it means, and its bounds or choices.

    A value must be at least `low`, or above it where `open`, and at most `high`; or one of `choices`, which map each value to
    the words that a label says for it. Its type is that of the default.
    """

    default: object
    meaning: str
    low: float | None = None
    high: float | None = None
    open: bool = False
    choices: dict[str, str] | None = None

    def check(self, owner: str, name: str, value):
        """Return `value` in the type of the default; raise UserError for another type or a value that is out of bounds."""
        allowed, number = self._words(), (int, float) if isinstance(self.default, float) else type(self.default)
        fits = isinstance(value, number) and isinstance(value, bool) == isinstance(self.default, bool)
        if fits and self.choices is not None:
            fits = value in self.choices
        elif fits and self.low is not None:
            fits = value > self.low if self.open else value >= self.low
        if not (fits and (self.high is None or value <= self.high)):
            raise UserError(f"{owner}: {name} {value!r} is not {allowed}: it is {self.meaning}.")
        return type(self.default)(value)

    def _words(self):
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        kind = {float: "a number", int: "a whole number", bool: "true or false"}.get(type(self.default), "text")
        low = "" if self.low is None else f" {'above' if self.open else 'of at least'} {self.low:g}"
        return kind + low + ("" if self.high is None else f"{' and' * bool(low)} at most {self.high:g}")

    def label(self, name: str, value) -> str:
        """Return what a label says for `value`, such as `alpha 0.4` or `weight-wise`."""
        return self.choices[value] if self.choices is not None else f"{name.replace('_', ' ')} {value:g}"


class Criterion(ABC):
    """A rule that gives each neuron an importance (higher = keep), with its facts and, as an instance, its settings.

    name, label, source : what a study, a reader and a reference list call it. kind : what it gives the engine.
    unit : of the importance; between_layers : whether scores of different layers may be compared, which only those in units of
    the model's output may. reads_text : whether it needs calibration text; seeded : whether another calibration seed, or another
    random seed, gives other scores; baseline : whether any criterion should beat it. rank : its place in tables: the paper's
    three are 0 to 2, others 10, baselines 20. passes : how often the text is read. settings : its settings by name; a class adds
    its own to those of its parents, and an instance has each one's value as an attribute.
    """

    name: str
    label: str
    source: str
    kind: str
    unit = "nat"
    between_layers = False
    reads_text = True
    seeded = True
    baseline = False
    rank = 10
    passes = Passes()
    settings: dict[str, Setting] = {}

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        own = vars(cls).get("settings", {})
        cls.settings = {}
        for parent in reversed(cls.__mro__[1:]):
            cls.settings |= vars(parent).get("settings", {})
        cls.settings |= own

    def __init__(self, **settings):
        vars(self).update(self.complete(settings))

    @classmethod
    def complete(cls, settings: dict) -> dict:
        """Return all settings, those not given at their defaults; raise UserError for an unknown one or a bad value."""
        for name in settings:
            if name not in cls.settings:
                near = difflib.get_close_matches(str(name), cls.settings, n=1)
                known = f"its settings are {', '.join(cls.settings)}" if cls.settings else "it has none"
                hint = f"did you mean '{near[0]}'?" if near else f"{known}."
                raise UserError(f"criterion '{cls.name}' has no setting '{name}': {hint}")
        given = {name: setting.default for name, setting in cls.settings.items()} | settings
        return {name: cls.settings[name].check(f"criterion '{cls.name}'", name, value) for name, value in given.items()}


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
