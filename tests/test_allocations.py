"""Allocations: exact budgets, one rounding for all rules, one ranking over layers, and specs that are read or refused."""

import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfprune_nb import allocations, criteria, models
from hfprune_nb.allocations import Budget, Units
from hfprune_nb.errors import UserError
from hfprune_nb.method import selection

layers = st.lists(st.tuples(st.integers(1, 60), st.floats(-50, 120)), min_size=1, max_size=9)


def rows(*lists):
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


def test_facts_wait_for_no_heavy_import():
    code = (
        "import sys; from hfprune_nb import allocations; allocations.variants(allocations.names()); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("name", allocations.names())
def test_every_allocation_states_its_facts(name):
    rule = allocations.create(name)
    assert rule.name == name and rule.label and rule.source
    assert rule.needs_importance or not rule.needs_comparable
    assert all(getattr(rule, setting) == facts.default for setting, facts in rule.settings.items())


# The rounding


@given(layers, st.integers(1, 7), st.fractions(0, 1, max_denominator=997))
def test_rounded_widths_spend_the_budget_within_the_bounds_of_every_layer(given_layers, step, share):
    units, wished = [Units(width, 3) for width, _ in given_layers], [wish for _, wish in given_layers]
    keep = share * sum(unit.width for unit in units)
    most = [unit.width // step for unit in units]
    total = min(round(keep / step), sum(most))
    least = sum(min(1, high) for high in most)
    if total < least:
        with pytest.raises(UserError, match="cannot be reached"):
            Budget(keep, step).widths(wished, units)
        return
    found = Budget(keep, step).widths(wished, units)
    assert sum(found) == total * step and all(width % step == 0 for width in found)
    assert all(min(1, high) * step <= width <= high * step for width, high in zip(found, most, strict=True))


@given(layers)
def test_wishes_that_fit_are_rounded_to_a_neighbour(given_layers):
    units, wished = [Units(200, 3) for _ in given_layers], [Fraction(wish) + 70 for _, wish in given_layers]
    keep = round(sum(wished))
    wished[0] += keep - sum(wished)
    found = Budget(Fraction(keep), 1).widths(wished, units)
    assert sum(found) == keep and all(abs(width - wish) < 1 for width, wish in zip(found, wished, strict=True))


def test_a_bound_moves_the_others_by_one_shift_and_the_largest_fractions_come_first():
    units = [Units(10, 3), Units(20, 3), Units(20, 3)]
    # 5 neurons that the first layer cannot hold go to the others, equally.
    assert Budget(Fraction(30)).widths([15, 10, 5], units) == [10, 13, 7], "12.5 and 7.5: of equal fractions the first"
    assert Budget(Fraction(30)).widths([9.6, 10.3, 10.1], units) == [10, 10, 10]
    assert Budget(Fraction(31)).widths([9.6, 10.3, 11.1], units, least=[0, 0, 15]) == [8, 8, 15]


@given(st.lists(st.integers(8, 60), min_size=1, max_size=6), st.integers(1, 8), st.floats(0.05, 0.8))
def test_layers_of_different_width_lose_the_same_fraction_under_a_uniform_allocation(widths, step, ratio):
    units = [Units(width, 3) for width in widths]
    try:
        plan = allocations.allocate(units, 3 * sum(widths), neuron_ratio=ratio, multiple_of=step)
    except UserError:
        return
    if len(set(widths)) > 1 and step == 1:
        assert abs(plan.missed_neurons) <= 0.5
        for width, kept in zip(widths, plan.width_after, strict=True):
            assert kept == 1 or abs(kept - (1 - ratio) * width) < 1.5
    assert all(kept % step == 0 for kept in plan.width_after)


# One ranking over layers


def test_global_keeps_the_most_important_neurons_of_all_layers():
    units = [Units(4, 5)] * 3
    importance = rows([9, 8, 7, 6], [1, 2, 3, 4], [5, 0.5, 5.5, 0.1])
    plan = allocations.allocate(units, 60, neuron_ratio=0.5, allocation="global", importance=importance)
    assert plan.width_after == [4, 1, 1], "each layer keeps one, then the six highest"
    plan = allocations.allocate(units, 60, neuron_ratio=0.5, allocation={"global": {"floor": 0.5}}, importance=importance)
    assert plan.width_after == [2, 2, 2] and plan.spec == {"global": {"floor": 0.5}}
    ties = rows([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1])
    plan = allocations.allocate(units, 60, neuron_ratio=0.5, allocation="global", importance=ties)
    assert plan.width_after == [1, 1, 4], "of equals the first layer's go first"


@given(st.integers(0, 99), st.floats(0.05, 0.85), st.floats(0, 0.1), st.sampled_from([1, 4]))
def test_global_spends_the_budget_exactly_and_respects_its_floor(seed, ratio, floor, step):
    generator = torch.Generator().manual_seed(seed)
    widths = [16, 24, 40]
    importance = [torch.rand(width, dtype=torch.float64, generator=generator) ** 3 for width in widths]
    units, total = [Units(width, 5) for width in widths], sum(widths)
    plan = allocations.allocate(
        units,
        5 * total + 77,
        neuron_ratio=ratio,
        multiple_of=step,
        allocation={"global": {"floor": floor}},
        importance=importance,
    )
    assert abs(plan.missed_neurons) <= step / 2 and all(width % step == 0 for width in plan.width_after)
    assert all(kept >= max(1, floor * width) for kept, width in zip(plan.width_after, widths, strict=True))
    if step == 1 and floor == 0:
        kept = selection.kept_neurons(importance, plan.width_after)
        lowest = min(float(row[indices[1:]].min()) for row, indices in zip(importance, kept, strict=True) if len(indices) > 1)
        gone = [
            row[torch.isin(torch.arange(len(row)), indices, invert=True)] for row, indices in zip(importance, kept, strict=True)
        ]
        assert sum(int((row > lowest).sum()) for row in gone) == 0


def test_a_floor_that_leaves_too_little_to_remove_is_refused():
    with pytest.raises(UserError, match=r"neuron_ratio 0.5 cannot be reached.*floor"):
        allocations.allocate(
            [Units(4, 5)] * 2,
            60,
            neuron_ratio=0.5,
            allocation={"global": {"floor": 0.9}},
            importance=rows([1, 2, 3, 4], [1, 2, 3, 4]),
        )


# Which criteria it goes with, and how it is named


BY_WEIGHT = {"entropy": {"aggregation": "weight"}, "as": "by_weight"}
RELATIVE = {"llm_bip": {"norm": "relative"}, "as": "relative"}


def test_settings_decide_whether_scores_can_be_compared():
    assert [variant.between_layers for variant in criteria.variants(["entropy", BY_WEIGHT, "llm_bip", RELATIVE])] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "criterion", criteria.variants([*criteria.names(), BY_WEIGHT, RELATIVE]), ids=lambda variant: variant.name
)
def test_only_comparable_scores_are_ranked_over_layers(criterion, tiny):
    model = tiny("llama")
    importance = [torch.arange(mlp.width) for mlp in models.gated_mlps(model)]
    chosen = {"neuron_ratio": 0.2, "importance": importance, "criterion": criterion.spec}
    assert selection.allocate(model, allocation="uniform", **chosen).name == "uniform"
    if criterion.between_layers:
        assert selection.allocate(model, allocation="global", **chosen).name == "global"
        return
    with pytest.raises(UserError, match=f"criterion '{criterion.name}' are not comparable between layers") as caught:
        selection.allocate(model, allocation="global", **chosen)
    assert "\n" not in str(caught.value)


def test_specs_name_variants_with_settings_and_labels_of_their_own():
    uniform, tenth = allocations.variants(["uniform", {"global": {"floor": 0.1}, "as": "global_10"}])
    assert (uniform.name, uniform.spec, uniform.label) == ("uniform", "uniform", "Uniform")
    assert (tenth.name, tenth.label) == ("global_10", "Global (floor 0.1)")
    assert allocations.variants(tenth.spec) == [tenth] and tenth.create().floor == 0.1
    assert sorted([tenth, uniform], key=lambda variant: variant.order) == [uniform, tenth]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("unifrom", "allocation 'unifrom' is unknown: did you mean 'uniform'"),
        ({"global": {"flor": 0.1}}, "has no setting 'flor': did you mean 'floor'"),
        ({"uniform": {"alpha": 1}}, "has no setting 'alpha': it has none"),
        ({"global": {"floor": -0.1}}, "floor -0.1 is not a number of at least 0 and at most 1"),
        ({"global": {"floor": "half"}}, "floor 'half' is not a number"),
        ({"global": {}, "uniform": {}}, "is no allocation"),
        (3, "is no allocation"),
    ],
)
def test_bad_specs_get_one_sentence(spec, words):
    with pytest.raises(UserError, match=words) as caught:
        allocations.variants([spec])
    assert "\n" not in str(caught.value)
