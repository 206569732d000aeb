"""Importance criteria: one file each, found by their `name`; a new file in this folder is a new criterion.

Sign convention: a higher importance means that removing the neuron does more damage; the lowest are removed first.
"""

import difflib
import importlib
import inspect
import pkgutil

from hfprune_nb.criteria.base import Criterion, LogitCriterion, WeightCriterion
from hfprune_nb.errors import UserError

__all__ = ["Criterion", "LogitCriterion", "WeightCriterion", "create", "names"]


def _classes() -> dict[str, type[Criterion]]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        found.update({c.name: c for c in members if inspect.isclass(c) and issubclass(c, Criterion) and "name" in vars(c)})
    return found


def names() -> list[str]:
    """Return the names of all criteria, in alphabetical order."""
    return sorted(_classes())


def create(name: str, **settings) -> Criterion:
    """Return the criterion `name`, built with those of `settings` that it takes; raise UserError for an unknown name."""
    classes = _classes()
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"criterion '{name}' is unknown: {hint}The criteria are {', '.join(sorted(classes))}.")
    accepted = inspect.signature(classes[name]).parameters
    return classes[name](**{key: value for key, value in settings.items() if key in accepted})
