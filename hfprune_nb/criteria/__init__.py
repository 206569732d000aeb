"""Importance criteria: one file each, found by their `name`; a new file in this folder is a new criterion.

Sign convention: a higher importance means that removing the neuron does more damage; the lowest are removed first.

A study or a notebook names criteria by specs: `entropy`, or with settings and a name of its own
`{self_distillation: {alpha: 0.4, temperature: 0.2}, as: sdmprune_20}`; `variants` reads them.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable

from hfprune_nb.criteria.base import Criterion, LogitCriterion, Passes, Setting, WeightCriterion
from hfprune_nb.errors import UserError

__all__ = ["Criterion", "LogitCriterion", "Passes", "Setting", "Variant", "WeightCriterion", "create", "names", "variants"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A criterion with all its settings, under the name by which a study and its artifacts know it."""

    name: str
    criterion: type[Criterion]
    settings: dict

    def create(self) -> Criterion:
        """Return the criterion with these settings."""
        return self.criterion(**self.settings)

    @property
    def changed(self) -> dict:
        """The settings that differ from their defaults."""
        return {name: value for name, value in self.settings.items() if value != self.criterion.settings[name].default}

    @property
    def spec(self) -> str | dict:
        """What `variants` reads, as JSON can hold it: the plain name where nothing differs from the criterion's own."""
        own = {"as": self.name} if self.name != self.criterion.name else {}
        return {self.criterion.name: self.changed} | own if own or self.changed else self.name

    @property
    def label(self) -> str:
        """What readers see, such as "Self-distillation (alpha 0.4, temperature 0.2)"."""
        words = [self.criterion.settings[name].label(name, value) for name, value in self.changed.items()]
        return self.criterion.label + (f" ({', '.join(words)})" if words else "")

    @property
    def order(self) -> tuple:
        """Sort key of every table and legend: the paper's three first, baselines last, variants behind their criterion."""
        return self.criterion.rank, self.criterion.name, bool(self.changed), self.name

    @property
    def passes(self) -> Passes:
        """How often the text is read with these settings."""
        return self.create().passes


def _classes() -> dict[str, type[Criterion]]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        found.update({c.name: c for c in members if inspect.isclass(c) and issubclass(c, Criterion) and "name" in vars(c)})
    return found


def names() -> list[str]:
    """Return the names of all criteria, in alphabetical order."""
    return sorted(_classes())


def _find(name: str) -> type[Criterion]:
    classes = _classes()
    if name not in classes:
        near = difflib.get_close_matches(str(name), classes, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"criterion '{name}' is unknown: {hint}The criteria are {', '.join(sorted(classes))}.")
    return classes[name]


def create(name: str, **settings) -> Criterion:
    """Return the criterion `name` with `settings`; raise UserError for an unknown name or setting, or a value out of bounds."""
    return _find(name)(**settings)


def variants(specs: Iterable[str | dict | Variant]) -> list[Variant]:
    """Return the variants that `specs` name, in their order.

    A spec is a criterion's name, or `{name: {setting: value}, "as": the variant's name}`. Raises UserError for anything else,
    an unknown criterion or setting, a value out of bounds, and a name that is used twice.
    """
    found = {}
    for spec in [specs] if isinstance(specs, str | dict | Variant) else specs:
        variant = spec if isinstance(spec, Variant) else _read(spec)
        if variant.name in found:
            raise UserError(f"criteria: '{variant.name}' is named twice: give one of them another name, {{..., as: NAME}}.")
        found[variant.name] = variant
    return list(found.values())


def _read(spec):
    mapping = {spec: {}} if isinstance(spec, str) else spec
    chosen = [name for name in mapping if name != "as"] if isinstance(mapping, dict) else []
    if len(chosen) != 1 or not isinstance(mapping[chosen[0]] or {}, dict):
        raise UserError(f"criteria: {spec!r} is no criterion: write NAME, or {{NAME: {{setting: value}}, as: NAME}}.")
    criterion, name = _find(chosen[0]), mapping.get("as", chosen[0])
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"criteria: 'as: {name}' is not a plain name: use letters, digits, '-', '_' and '.'.")
    return Variant(name, criterion, criterion.complete(mapping[chosen[0]] or {}))
