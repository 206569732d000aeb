"""What the families that people extend have in common: members with settings, one file each, and the specs that name them.

A spec is what a study or a notebook writes: a member's name, `entropy`, or with settings and a name of its own
`{self_distillation: {alpha: 0.4, temperature: 0.2}, as: sdmprune_20}`. Nothing here imports torch: plans and reports ask members
for facts without it.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, TypeVar

from hfprune_nb.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a member: its default, what it means, and its bounds or choices.

    A value must be at least `low`, or above it where `open`, and at most `high`; or one of `choices`, which map each value to
    the words that a label says for it. Its type is that of the default.
    """

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    open: bool = False
    choices: dict[Any, str] | None = None

    def check(self, owner: str, name: str, value):
        """Return `value` in the type of the default; raise UserError for another type or a value that is out of bounds."""
        number = (int, float) if isinstance(self.default, float) else type(self.default)
        fits = isinstance(value, number) and isinstance(value, bool) == isinstance(self.default, bool)
        if fits and self.choices is not None:
            fits = value in self.choices
        elif fits and self.low is not None:
            fits = value > self.low if self.open else value >= self.low
        if not (fits and (self.high is None or value <= self.high)):
            raise UserError(f"{owner}: {name} {value!r} is not {self._words()}: it is {self.meaning}.")
        return type(self.default)(value)

    def _words(self) -> str:
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        kind = {float: "a number", int: "a whole number", bool: "true or false"}.get(type(self.default), "text")
        low = "" if self.low is None else f" {'above' if self.open else 'of at least'} {self.low:g}"
        return kind + low + ("" if self.high is None else f"{' and' * bool(low)} at most {self.high:g}")

    def label(self, name: str, value) -> str:
        """Return what a label says for `value`, such as `alpha 0.4` or `weight-wise`."""
        return self.choices[value] if self.choices is not None else f"{name.replace('_', ' ')} {value:g}"


# How a member's formula relates to its source, in the words of a table's notes; the authors' own needs none.
BASES = {
    "published": "",
    "structured": "a form for whole neurons of a published formula for weights",
    "reading": "our reading of a source whose formula is not public",
    "own": "not published in this form",
}


class Member:
    """A member of a family: a class with facts, and as an instance the value of every setting as an attribute.

    name, label, source : what a study, a reader and a reference list call it. basis : how its formula relates to the source's,
    one of BASES. rank : its place in tables. settings : by name; a class adds its own to those of its parents. noun : what
    messages call a member of this family.
    """

    noun: ClassVar[str]
    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]
    basis: ClassVar[str] = "published"
    rank = 10
    settings: ClassVar[dict[str, Setting]] = {}

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        own = [vars(parent).get("settings", {}) for parent in reversed(cls.__mro__)]
        cls.settings = {name: setting for settings in own for name, setting in settings.items()}

    def __init__(self, **settings):
        vars(self).update(self.complete(settings))

    @classmethod
    def complete(cls, settings: dict) -> dict:
        """Return all settings, those not given at their defaults; raise UserError for an unknown one or a bad value."""
        owner = f"{cls.noun} '{cls.name}'"
        for name in settings:
            if name not in cls.settings:
                known = f"its settings are {', '.join(cls.settings)}." if cls.settings else "it has none."
                raise UserError(f"{owner} has no setting '{name}': {_near(name, cls.settings) or known}")
        given = {name: setting.default for name, setting in cls.settings.items()} | settings
        return {name: setting.check(owner, name, given[name]) for name, setting in cls.settings.items()}


M = TypeVar("M", bound=Member)


@dataclasses.dataclass(frozen=True)
class Variant(Generic[M]):
    """A member with all its settings, under the name by which a study and its artifacts know it."""

    name: str
    member: type[M]
    settings: dict

    def create(self) -> M:
        """Return the member with these settings."""
        return self.member(**self.settings)

    @property
    def changed(self) -> dict:
        """The settings that differ from their defaults."""
        return {name: value for name, value in self.settings.items() if value != self.member.settings[name].default}

    @property
    def spec(self) -> str | dict:
        """What a study writes, as JSON can hold it: the plain name where nothing differs from the member's own."""
        own = {"as": self.name} if self.name != self.member.name else {}
        return {self.member.name: self.changed} | own if own or self.changed else self.name

    @property
    def label(self) -> str:
        """What readers see, such as "Self-distillation (alpha 0.4, temperature 0.2)"."""
        words = [self.member.settings[name].label(name, value) for name, value in self.changed.items()]
        return self.member.label + (f" ({', '.join(words)})" if words else "")

    @property
    def order(self) -> tuple:
        """Sort key of every table and legend; variants stand behind their member."""
        return self.member.rank, self.member.name, bool(self.changed), self.name


V = TypeVar("V", bound=Variant)


@dataclasses.dataclass(frozen=True)
class Family(Generic[M, V]):
    """The members that a package holds, one file each: a new file is a new member.

    package : its dotted name; base : what members derive from; plural : what messages call them; variant : the class of what
    `variants` returns. registered : members of this process alone.
    """

    package: str
    base: type[M]
    plural: str
    variant: type[V]
    registered: dict[str, type[M]] = dataclasses.field(default_factory=dict)

    def classes(self) -> dict[str, type[M]]:
        """Return the members by name."""
        found: dict = {}
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            members = vars(importlib.import_module(f"{self.package}.{module.name}")).values()
            found |= {c.name: c for c in members if inspect.isclass(c) and issubclass(c, self.base) and "name" in vars(c)}
        return dict(sorted((found | self.registered).items()))

    def register(self, member: type[M]) -> type[M]:
        """Make a class that stands in no file of the package, such as one of a notebook's cell, a member in this process.

        Returns it, so that it serves as a decorator; a class of the same name that was registered before is replaced. Raises
        UserError for a class that is no such member, lacks a fact or a method, or has the name of a file's.
        """
        noun = self.base.noun
        if not (inspect.isclass(member) and issubclass(member, self.base)):
            raise UserError(f"{member!r} is no {noun}: derive it from one of the classes in {self.package}.base.")
        lacking = [fact for fact in ("name", "label", "source") if not hasattr(member, fact)]
        if lacking := lacking + sorted(getattr(member, "__abstractmethods__", ())):
            raise UserError(f"{noun} {member.__name__} lacks {', '.join(lacking)}: add what {self.package}.base says of it.")
        if member.name in self.classes().keys() - self.registered.keys():
            raise UserError(f"{noun} '{member.name}' is there already: give {member.__name__} another name.")
        self.registered[member.name] = member
        return member

    def find(self, name: str) -> type[M]:
        """Return the member called `name`; raise UserError for an unknown one."""
        classes = self.classes()
        if name not in classes:
            known = _near(name, classes) or f"the {self.plural} are {', '.join(classes)}."
            raise UserError(f"{self.base.noun} '{name}' is unknown: {known}")
        return classes[name]

    def variants(self, specs: str | dict | Variant | Iterable) -> list[V]:
        """Return the variants that `specs` name, in their order.

        Raises UserError for what is no spec, an unknown member or setting, a value out of bounds, and a name that is used twice.
        """
        found: dict[str, V] = {}
        for spec in [specs] if isinstance(specs, str | dict | Variant) or not isinstance(specs, Iterable) else specs:
            variant: Any = spec if isinstance(spec, Variant) else self._read(spec)
            if variant.name in found:
                raise UserError(
                    f"{self.plural}: '{variant.name}' is named twice: give one of them another name, {{..., as: NAME}}."
                )
            found[variant.name] = variant
        return list(found.values())

    def _read(self, spec) -> V:
        mapping = {spec: {}} if isinstance(spec, str) else spec
        chosen = [name for name in mapping if name != "as"] if isinstance(mapping, dict) else []
        if len(chosen) != 1 or not isinstance(mapping[chosen[0]] or {}, dict):
            raise UserError(
                f"{self.plural}: {spec!r} is no {self.base.noun}: write NAME, or {{NAME: {{setting: value}}, as: NAME}}."
            )
        member, name = self.find(chosen[0]), mapping.get("as", chosen[0])
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"{self.plural}: 'as: {name}' is not a plain name: use letters, digits, '-', '_' and '.'.")
        return self.variant(name, member, member.complete(mapping[chosen[0]] or {}))


def _near(name, known) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean '{near[0]}'?" if near else ""
