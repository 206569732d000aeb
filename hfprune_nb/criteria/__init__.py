"""Importance criteria: one file each, found by their `name`; a new file in this folder is a new criterion.

Sign convention: a higher importance means that removing the neuron costs the model more; the lowest are removed first.
"""

from collections.abc import Iterable

from hfprune_nb import families
from hfprune_nb.criteria.base import (
    ActivationCriterion,
    Criterion,
    GateCriterion,
    LogitCriterion,
    MeasuredCriterion,
    Passes,
    SearchCriterion,
    WeightCriterion,
    WeightGradientCriterion,
)
from hfprune_nb.errors import UserError
from hfprune_nb.families import Setting

__all__ = [
    "ActivationCriterion",
    "Criterion",
    "GateCriterion",
    "LogitCriterion",
    "MeasuredCriterion",
    "Passes",
    "SearchCriterion",
    "Setting",
    "Variant",
    "WeightCriterion",
    "WeightGradientCriterion",
    "check_groups",
    "check_split",
    "create",
    "named",
    "names",
    "register",
    "variants",
    "with_missing",
]


class Variant(families.Variant[Criterion]):
    """A criterion with all its settings, under the name by which a study and its artifacts know it."""

    @property
    def criterion(self) -> type[Criterion]:
        """The class, for its facts."""
        return self.member

    @property
    def passes(self) -> Passes:
        """How often the text is read with these settings."""
        return self.create().passes

    @property
    def between_layers(self) -> bool:
        """Whether scores of different layers may be compared with these settings."""
        return self.create().between_layers

    @property
    def of_groups(self) -> bool:
        """Whether it scores attention's key-value groups as well, with these settings."""
        return self.create().of_groups


_FAMILY = families.Family(__name__, Criterion, "criteria", Variant)


def names() -> list[str]:
    """Return the names of all criteria, in alphabetical order."""
    return list(_FAMILY.classes())


def create(name: str, **settings) -> Criterion:
    """Return the criterion `name` with `settings`; raise UserError for an unknown name or setting, or a value out of bounds."""
    return _FAMILY.find(name)(**settings)


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Make a class, such as one of a notebook's cell, a criterion in this process; see `families.Family.register`."""
    return _FAMILY.register(criterion)


def variants(specs: str | dict | Variant | Iterable) -> list[Variant]:
    """Return the variants that `specs` name, in their order; errors as `families.Family.variants`.

    >>> [variant.label for variant in variants(["entropy", {"self_distillation": {"alpha": 0.4}, "as": "sd_40"}])]
    ['Entropy (HFPrune)', 'Self-distillation (alpha 0.4)']
    """
    return _FAMILY.variants(specs)


def check_groups(chosen: Iterable[Variant]) -> None:
    """Raise UserError where none of the criteria scores attention groups."""
    chosen = list(chosen)
    if not any(variant.of_groups for variant in chosen):
        raise UserError(
            f"attention_groups: criterion '{chosen[0].name}' scores no attention groups: add one that does, or switch "
            "attention_groups off."
        )


def check_split(split: str, variant: Variant) -> None:
    """Raise UserError for a criterion that scores no attention groups, or, with `measured`, not comparably with neurons."""
    if split != "none" and not variant.of_groups:
        raise UserError(
            f"attention_split '{split}': criterion '{variant.name}' scores no attention groups: choose none, or another "
            "criterion."
        )
    if split == "measured" and not variant.between_layers:
        raise UserError(
            f"attention_split 'measured' ranks units of all layers together, and scores of criterion '{variant.name}' are not "
            "comparable between layers: choose proportional, or a criterion in units of the model's output."
        )


def named(specs: str | dict | Variant | Iterable, spec: str | dict) -> str | None:
    """Return the name under which `specs` have the criterion `spec` with its settings, None where they lack it."""
    (wanted,) = variants(spec)
    same = (variant.name for variant in variants(specs) if (variant.member, variant.settings) == (wanted.member, wanted.settings))
    return next(same, None)


def with_missing(specs: list[str | dict], wanted: Iterable[str]) -> list[str | dict]:
    """Return `specs` and, of the criteria `wanted`, those that `specs` lack, under another name where theirs is taken."""
    for spec in wanted:
        if named(specs, spec) is None:
            taken = {variant.name for variant in variants(specs)}
            specs = [*specs, {spec: {}, "as": f"{spec}_default"} if spec in taken else spec]
    return specs
