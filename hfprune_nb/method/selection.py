"""Which neurons and attention groups stay: from importance and a budget to the indices that each layer keeps."""

from collections.abc import Callable
from fractions import Fraction

import torch

from hfprune_nb import allocations, criteria
from hfprune_nb.allocations import Allocation, Units
from hfprune_nb.errors import UserError
from hfprune_nb.models import attention_groups, count_parameters, gated_mlps, resolve_dtype

SPLITS = ("none", "proportional", "measured")


def allocate(
    model,
    ratio: float = 0.0,
    neuron_ratio: float = 0.0,
    multiple_of: int = 1,
    allocation: str | dict = "uniform",
    importance=None,
    criterion: str | dict | None = None,
    groups: list | None = None,
    levels: int = 0,
    scores: dict | None = None,
    measure=None,
) -> Allocation:
    """Return the `Allocation` for `model`; arguments and errors as in `allocations.allocate`.

    importance : (neurons,) for each layer, checked as `kept_neurons` does. criterion : the spec of the one that it comes from;
    raises UserError when the allocation compares layers and its scores cannot be compared. groups : the attention groups that
    each layer keeps, as `kept_groups` gives them: the neurons then make up the rest of the ratio. scores : as `read_scores` gives
    them; measure : a `Measurement` of the model. Of a measured allocation `found` holds also `joint_kl`, in nats, what the losses
    of all MLPs do together, and `joint_kl_exact`, the same before `multiple_of` and `levels`.
    """
    (variant,) = allocations.variants(allocation)
    if criterion is not None:
        allocations.check(variant, criteria.variants(criterion)[0])
    if importance is not None:
        importance = check_importance(importance)
    mlps = gated_mlps(model)
    gone = zip(attention_groups(model), groups, strict=True) if groups is not None else ()
    elsewhere = sum((unit.width - len(kept)) * unit.parameters_per_group for unit, kept in gone)
    plan = allocations.allocate(
        [Units(mlp.width, mlp.parameters_per_neuron) for mlp in mlps],
        count_parameters(model),
        ratio,
        neuron_ratio,
        multiple_of,
        variant,
        importance,
        elsewhere,
        levels,
        scores,
        [mlp.down.weight for mlp in mlps],
        measure,
    )
    if "measure" in variant.member.needs:
        for name, widths in {"joint_kl": plan.width_after, "joint_kl_exact": plan.width_exact}.items():
            removed = [allocations.lowest(row, len(row) - width) for row, width in zip(importance, widths, strict=True)]
            (plan.found[name],) = measure.divergence([dict(enumerate(removed))], variant.settings["windows"])
    return plan


def kept_groups(
    split: str,
    model,
    ratio: float,
    importance: list | None = None,
    of_groups: list | None = None,
    criterion: str | dict | None = None,
) -> list[torch.Tensor] | None:
    """Return for each layer the indices of the attention groups that stay, equally many in all layers; None for all of them.

    split : how much of the `ratio` of all parameters the attention gives. `none`: nothing. `proportional`: the fraction that the
    MLPs give. `measured`: what the attention has in one ranking of all neurons and groups of all layers by importance per
    parameter, meant for estimates of the damage itself, as `kl_fisher`'s: sums of absolute first-order changes compare units
    of such different size less well. As layers lose whole groups, each the same number, this is rounded; the first group of a
    layer to go is its least important, and one always stays. importance : (neurons,) for each layer; of_groups : (groups,)
    for each layer, by the same criterion. Raises UserError for an unknown split, a ratio of neurons, and scores that cannot
    be compared between layers.
    """
    if split not in SPLITS:
        raise UserError(f"attention_split '{split}' is unknown: choose one of {', '.join(SPLITS)}.")
    if split == "none":
        return None
    if not ratio:
        raise UserError(f"attention_split '{split}' shares out a ratio of all parameters: give ratio in place of neuron_ratio.")
    units, mlps = attention_groups(model), gated_mlps(model)
    of_groups, importance = check_importance(of_groups, "attention groups"), check_importance(importance)
    layers, size, budget = len(units), units[0].parameters_per_group, Fraction(str(ratio)) * count_parameters(model)
    if split == "proportional":
        neurons = sum(mlp.width * mlp.parameters_per_neuron for mlp in mlps)
        share = budget / (neurons + layers * units[0].width * size) * units[0].width
    else:
        criteria.check_split(split, criteria.variants(criterion)[0])
        share = Fraction(_lowest_groups(mlps, importance, of_groups, size, budget), layers)
    removed = min(int(share + Fraction(1, 2)), units[0].width - 1, int(budget / (layers * size)))
    return kept_neurons(of_groups, [unit.width - removed for unit in units])


def _lowest_groups(mlps, importance, of_groups, size, budget) -> int:
    """Return how many groups are among the units of lowest importance per parameter that together hold `budget` parameters."""
    sizes = torch.cat([torch.full(row.shape, mlp.parameters_per_neuron) for mlp, row in zip(mlps, importance, strict=True)])
    groups, neurons = torch.cat(of_groups).double(), torch.cat(importance).double()
    sizes = torch.cat([sizes, torch.full(groups.shape, size)])
    order = torch.argsort(torch.cat([neurons, groups]) / sizes, stable=True)
    within = sizes[order].cumsum(0) <= int(budget)
    return int((order[within] >= len(neurons)).sum())


def read_scores(allocation: str | dict, scored: list[str | dict], load: Callable[[str], list]) -> dict[str, list]:
    """Return the scores that an allocation reads beside importance, by the spec that it names: (neurons,) for each layer.

    scored : the specs of the criteria that the model was scored with; load : gives the scores by a criterion's name. Raises
    UserError for scores that are not there.
    """
    (variant,) = allocations.variants(allocation)
    found = {}
    for spec in variant.member.reads:
        name = criteria.named(scored, spec)
        if name is None:
            raise UserError(f"allocation '{variant.name}' reads scores of criterion '{spec}': score the model with it too.")
        found[spec] = load(name)
    return found


def within_rounding(importance, widths: list[int], dtype: str | torch.dtype) -> int:
    """Return how many kept neurons rounding alone may have put above the most important one that goes, in all layers together.

    widths : neurons kept in each layer; dtype : in which the model was scored. Counted is what lies within one unit in the last
    place; where a criterion is a small difference, as self-distillation is, precision decides more.
    """
    unit, found = torch.finfo(resolve_dtype(dtype)).eps, 0
    for row, width in zip(check_importance(importance), widths, strict=True):
        ordered = row.double().sort().values
        if 0 < width < len(ordered):
            highest = ordered[-width - 1]
            found += int((ordered[-width:] <= highest + unit * highest.abs()).sum())
    return found


def importance_lost(importance, widths: list[int]) -> list[float]:
    """Return for each layer the fraction of its importance that is lost with all but its `widths` most important neurons.

    importance : (neurons,) for each layer; neurons without positive importance count nothing.

    >>> importance_lost([[0.5, 0.25, 0.25]], [2])
    [0.25]
    """
    kept = kept_neurons(importance, widths)
    rows = [torch.as_tensor(row).double().clamp(min=0) for row in importance]
    return [float(1 - row[indices].sum() / row.sum()) if row.any() else 0.0 for row, indices in zip(rows, kept, strict=True)]


def kept_neurons(importance, width_after: list[int]) -> list[torch.Tensor]:
    """Return for each layer the indices, ascending, of its most important neurons.

    importance : (neurons,) for each layer, higher = keep; of equals, the one with the lower index is removed first. Raises
    UserError when it holds NaN or is the same everywhere in a layer.

    >>> kept_neurons([[0.3, 0.1, 0.2], [1.0, 2.0, 3.0]], [2, 1])
    [tensor([0, 2]), tensor([2])]
    """
    rows = check_importance(importance)
    orders = (torch.argsort(row, stable=True) for row in rows)
    return [order[len(order) - width :].sort().values for order, width in zip(orders, width_after, strict=True)]


def rank_last(importance, kept, before) -> list[torch.Tensor]:
    """Return importance in which all neurons outside `kept` stand below every one in it, in the order of `before`.

    importance, before : (neurons,) for each layer; kept : indices for each layer.
    """
    highest = max(row.max() for row in before if len(row))
    lowest = min(0, *(row[indices].min() for row, indices in zip(importance, kept, strict=True) if len(indices)))
    rows = [row - highest - 1 + lowest for row in before]
    for row, own, indices in zip(rows, importance, kept, strict=True):
        row[indices] = own[indices]
    return rows


def check_importance(importance, criterion: str = "importance") -> list[torch.Tensor]:
    """Return importance as a tensor (neurons,) for each layer; raise UserError where it is not finite or ranks nothing."""
    rows = [torch.as_tensor(row) for row in importance]
    for layer, row in enumerate(rows):
        if not torch.isfinite(row).all():
            raise UserError(
                f"{criterion}: scores of layer {layer} are NaN or infinite: score with dtype float32, or check the weights."
            )
        if len(row) > 1 and (row == row[0]).all():
            raise UserError(
                f"{criterion}: all scores of layer {layer} are equal (no gradient reached it), so nothing can be ranked."
            )
    return rows
