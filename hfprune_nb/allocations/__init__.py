"""Allocations: how many neurons each layer keeps; one file each, found by their `name`: a new file here is a new allocation.

An allocation turns importance and a budget into widths; it knows no model. Specs name them as those of criteria do: `uniform`,
or `{global: {floor: 0.1}, as: global_10}`.
"""

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from numbers import Integral, Real

from hfprune_nb.allocations.base import Allocation, AllocationRule, Budget, MeasuredRule, SpreadRule, Units, lowest
from hfprune_nb.errors import UserError
from hfprune_nb.families import Family, Variant

__all__ = [
    "Allocation",
    "AllocationRule",
    "Budget",
    "MeasuredRule",
    "SpreadRule",
    "Units",
    "allocate",
    "check",
    "check_windows",
    "create",
    "lowest",
    "names",
    "variants",
]

_NEEDS = {
    "scores": "scores of {reads}: score the model with it too",
    "down": "the weights of down_proj: allocate for a model",
    "measure": "calibration windows to measure on: give a Measurement",
}

_FAMILY: Family[AllocationRule, Variant] = Family(__name__, AllocationRule, "allocations", Variant)  # type: ignore[type-abstract]


def names() -> list[str]:
    """Return the names of all allocations, in alphabetical order."""
    return list(_FAMILY.classes())


def create(name: str, **settings) -> AllocationRule:
    """Return the allocation `name` with `settings`; raise UserError for an unknown name or setting, or a bad value."""
    return _FAMILY.find(name)(**settings)


def variants(specs: str | dict | Variant | Iterable) -> list[Variant]:
    """Return the variants that `specs` name, in their order; errors as `families.Family.variants`.

    >>> [(variant.name, variant.settings) for variant in variants(["uniform", {"global": {"floor": 0.3}, "as": "global_30"}])]
    [('uniform', {}), ('global_30', {'floor': 0.3})]
    """
    return _FAMILY.variants(specs)


def check(allocation: Variant, criterion) -> None:
    """Raise UserError for an allocation that ranks neurons of different layers by scores that cannot be compared.

    criterion : a variant of the criteria's family.
    """
    if allocation.member.needs_comparable and not criterion.between_layers:
        raise UserError(
            f"allocation '{allocation.name}' ranks neurons of all layers together, and scores of criterion '{criterion.name}' "
            "are not comparable between layers: choose allocation uniform, or a criterion in units of the model's output."
        )


def check_windows(allocation: Variant, windows: int) -> None:
    """Raise UserError for an allocation that measures on more calibration windows than there are."""
    if (needed := allocation.settings.get("windows", 0)) > windows:
        raise UserError(
            f"allocation '{allocation.name}' measures on {needed} calibration windows, and there are {windows}: lower its "
            "setting windows, or take more."
        )


def allocate(
    units: list[Units],
    dense_parameters: int,
    ratio: float = 0.0,
    neuron_ratio: float = 0.0,
    multiple_of: int = 1,
    allocation: str | dict | Variant = "uniform",
    importance: list | None = None,
    elsewhere: int = 0,
    levels: int = 0,
    scores: dict | None = None,
    down: list | None = None,
    measure=None,
) -> Allocation:
    """Spend a pruning ratio on the layers.

    Parameters
    ----------
    units : what each layer can lose; dense_parameters : of the whole model, tied embeddings counted once.
    ratio : fraction of ALL parameters to remove; neuron_ratio : fraction of the neurons to remove. Exactly one is non-zero.
    multiple_of : kept widths are multiples, at least one, for widths that matrix kernels like.
    allocation : the spec of one; importance : a tensor (neurons,) for each layer where it needs one, higher = keep.
    elsewhere : parameters that are removed with other units, and count as part of the ratio.
    levels : how many different widths there may be, of layers that keep anything; 0: any number.
    scores, down, measure : what else it needs, as in `AllocationRule`.

    Without `multiple_of` and `levels` the achieved ratio is exact to the neuron, and within half a neuron per layer where all
    layers shall be equally wide. Raises UserError when the ratio is outside (0, 1), cannot be reached with MLP neurons alone, or
    rounds to nothing removed, and for an unknown allocation or one that lacks what it needs.
    """
    (variant,) = variants(allocation)
    if bool(ratio) == bool(neuron_ratio):
        raise UserError("ratio, neuron_ratio: give exactly one of the two, and leave the other at 0.")
    name, value = ("neuron_ratio", neuron_ratio) if neuron_ratio else ("ratio", ratio)
    if not isinstance(value, Real) or not 0 < value < 1:
        raise UserError(f"{name} {value!r} is outside (0, 1): it is the fraction to remove, for example 0.2.")
    sizes = {unit.parameters for unit in units}
    if len(sizes) > 1:
        raise UserError(f"model: a neuron has {min(sizes)} parameters in one layer and {max(sizes)} in another: not supported.")
    before, requested = [unit.width for unit in units], Fraction(str(value))
    narrowest = min(width for width in before if width)
    if not isinstance(multiple_of, Integral) or not 1 <= multiple_of <= narrowest:
        raise UserError(f"multiple_of {multiple_of} is no whole number from 1 to {narrowest}, the model's smallest MLP width.")
    if variant.member.needs_importance and importance is None:
        raise UserError(f"allocation '{variant.name}' needs importance: score the model first.")
    if levels < 0:
        raise UserError(f"levels {levels} is negative: it is the number of different widths, or 0 for any.")
    needed = {name: {"scores": scores, "down": down, "measure": measure}[name] for name in variant.member.needs}
    for name, given in needed.items():
        if given is None:
            words = _NEEDS[name].format(reads=" and ".join(variant.member.reads))
            raise UserError(f"allocation '{variant.name}' needs {words}.")
    removed = requested * sum(before) if neuron_ratio else (requested * dense_parameters - elsewhere) / units[0].parameters
    budget = Budget(sum(before) - removed, multiple_of, f"{name} {value}", dense_parameters, levels)
    rule = variant.create()
    exact = rule.plan(units, importance, replace(budget, multiple_of=1, levels=0), **needed)
    after = rule.plan(units, importance, budget, **needed) if multiple_of > 1 or levels else exact
    if sum(after) >= sum(before) and not elsewhere:
        raise UserError(f"{name} {value} with multiple_of {multiple_of} removes no neuron: raise {name} or lower multiple_of.")
    return Allocation(
        variant.name,
        variant.spec,
        requested,
        bool(neuron_ratio),
        before,
        after,
        exact,
        units[0].parameters,
        dense_parameters,
        elsewhere,
        rule.found,
    )
