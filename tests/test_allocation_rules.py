"""Allocation rules: hand-made scores and measurements, exact budgets, least loss against brute force, few widths."""

import itertools
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_nb import allocations, models
from hfprune_nb.allocations import Budget, Units
from hfprune_nb.allocations.sensitivity import height, minorant
from hfprune_nb.errors import UserError
from hfprune_nb.method import pruning, scoring, selection
from hfprune_nb.method.measurement import Measurement
from hfprune_nb.models.hooks import silenced


class Toy:
    """Measures what a formula says: the KL of a layer is `weight * (share of it that is gone) ** power`, and KL adds up."""

    def __init__(self, weights, widths, powers):
        self.laws = list(zip(weights, widths, powers, strict=True))
        self.measured = []

    def divergence(self, ablations, windows):
        self.measured += ablations
        return [sum(self.law(layer, len(gone)) for layer, gone in each.items()) for each in ablations]

    def law(self, layer, gone):
        weight, width, power = self.laws[layer]
        return weight * (gone / width) ** power

    def influence(self, windows):
        return [weight for weight, _, _ in self.laws]


def evidence(seed=0, widths=(50, 50, 50, 50)):
    """Return units and what any rule may ask for, of layers whose scores grow with depth."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.rand(2, width, dtype=torch.float64, generator=generator) for width in widths]
    rows = [(1 + layer) * values[0] for layer, values in enumerate(random)]
    scores = [(1 + layer) ** 2 * values[1] for layer, values in enumerate(random)]
    down = [torch.randn(6, width, generator=generator) for width in widths]
    measure = Toy([3.0, 1.0, 2.0, 0.5][: len(widths)], widths, [2, 1, 3, 2][: len(widths)])
    return [Units(width, 5) for width in widths], {
        "importance": rows,
        "scores": {"wanda": scores},
        "down": down,
        "measure": measure,
    }


def plan(rule, ratio, given=None, **settings):
    units, known = given or evidence()
    total = 5 * sum(unit.width for unit in units)
    return allocations.allocate(units, total, neuron_ratio=ratio, allocation=rule, **known, **settings)


# What holds for all


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(allocations.names()), st.integers(0, 999), st.floats(0.02, 0.7), st.floats(0.01, 0.2))
def test_every_rule_spends_the_budget_exactly_within_bounds_and_takes_more_of_the_model_for_more(rule, seed, ratio, more):
    given = evidence(seed, (50, 33, 50))
    found, next_one = plan(rule, ratio, given), plan(rule, ratio + more, given)
    assert abs(found.missed_neurons) <= 0.5 and sum(found.width_after) > sum(next_one.width_after) - 1
    assert all(0 <= after <= before for after, before in zip(found.width_after, found.width_before, strict=True))
    assert rule == "depth" or min(found.width_after) >= 1
    assert found.width_exact == found.width_after and found == plan(rule, ratio, given)
    if rule in (
        "uniform",
        "global",
        "global_normalised",
        "sensitivity",
    ):  # but for rounding
        assert all(later <= first + 1 for first, later in zip(found.width_after, next_one.width_after, strict=True))


@pytest.mark.parametrize("rule", ["dlp", "owl", "isc_rank", "sensitivity", "depth"])
def test_what_a_rule_lacks_is_told_in_one_sentence(rule):
    units, known = evidence()
    for lacking in allocations.create(rule).needs:
        with pytest.raises(UserError, match=f"allocation '{rule}' needs .*: ") as caught:
            plan(rule, 0.2, (units, known | {lacking: None}))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="reads scores of criterion 'wanda'"):
        selection.read_scores("dlp", ["entropy", {"wanda": {"p": 2}}], dict.fromkeys)
    found = selection.read_scores("owl", ["entropy", {"wanda": {}, "as": "norms"}], lambda name: [name])
    assert found == {"wanda": ["norms"]} and selection.read_scores("uniform", ["entropy"], None) == {}


# Spread about the uniform ratio


@pytest.mark.parametrize("spec", [{"dlp": {"reach": 0.15}}, {"dlp": {"of": "neurons", "statistic": "mean"}}, "owl", "isc_rank"])
def test_removed_fractions_have_the_ratio_as_mean_and_twice_the_reach_as_range(spec):
    (variant,) = allocations.variants(spec)
    widths = (4000,) * 4
    found = plan(spec, 0.3, evidence(1, widths))
    removed = [1 - after / 4000 for after in found.width_after]
    assert statistics.mean(removed) == pytest.approx(0.3, abs=1e-4)
    assert max(removed) - min(removed) == pytest.approx(2 * variant.settings["reach"], abs=1e-3)


def test_dlp_takes_most_where_the_median_of_the_weights_scores_is_largest():
    units = [Units(1000, 3)] * 3
    down = [torch.ones(4, 1000)] * 3
    scores = {"wanda": [torch.full((1000,), value, dtype=torch.float64) for value in (1.0, 3.0, 2.0)]}
    importance = [torch.arange(1000.0)] * 3
    found = allocations.allocate(
        units, 9000, neuron_ratio=0.5, allocation={"dlp": {"reach": 0.1}}, importance=importance, scores=scores, down=down
    )
    assert found.width_after == [600, 400, 500]


def test_owl_keeps_most_where_most_weights_stand_out():
    units, down = [Units(1000, 3)] * 3, [torch.ones(4, 1000) for _ in range(3)]
    rows = [torch.ones(1000, dtype=torch.float64) for _ in range(3)]
    rows[1][:20] = 50.0  # 2 % of the weights exceed five times the mean, 1 % in the third layer
    rows[2][:10] = 50.0
    found = allocations.allocate(
        units, 9000, neuron_ratio=0.5, allocation={"owl": {"reach": 0.1}}, scores={"wanda": rows}, down=down
    )
    assert found.width_after == [400, 600, 500]


def test_layers_in_the_order_of_their_measured_loss_keep_more_in_equal_steps():
    found = plan({"isc_rank": {"reach": 0.15}}, 0.5, evidence(0, (1000,) * 4))
    assert sorted(found.width_after) == [350, 450, 550, 650]
    measure = Toy([3.0, 1.0, 2.0, 0.5], (1000,) * 4, [2, 1, 3, 2])
    damage = [measure.law(layer, 500) for layer in range(4)]
    assert np.argsort(found.width_after).tolist() == np.argsort(damage).tolist()


# One ranking of normalised scores


@pytest.mark.parametrize("by", ["deviation", "mean", "norm"])
def test_normalised_ranking_does_not_see_the_units_of_a_layer(by):
    units, known = evidence()
    scaled = known | {"importance": [1000.0**layer * row for layer, row in enumerate(known["importance"])]}
    found = plan({"global_normalised": {"by": by}}, 0.4, (units, known))
    assert plan({"global_normalised": {"by": by}}, 0.4, (units, scaled)).width_after == found.width_after
    assert plan("global", 0.4, (units, scaled)).width_after != plan("global", 0.4, (units, known)).width_after
    assert min(plan({"global_normalised": {"by": by, "floor": 0.58}}, 0.4, (units, known)).width_after) == 29


def test_standardised_scores_are_those_of_flap():
    units, known = evidence(3)
    rows = [((row - row.mean()) / row.std(correction=0)).numpy() for row in known["importance"]]
    threshold = np.sort(np.concatenate(rows))[round(0.4 * 200)]
    assert plan("global_normalised", 0.4, (units, known)).width_after == [int((row >= threshold).sum()) for row in rows]


# Measured sensitivity


@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_the_minorant_is_convex_below_the_points_and_touches_what_it_keeps(values, gaps):
    points = [(0, 0.0), *zip(itertools.accumulate(gaps), values, strict=False)]
    curve = minorant(points)
    slopes = [(high - low) / (right - left) for (left, low), (right, high) in itertools.pairwise(curve)]
    assert all(first <= second + 1e-9 for first, second in itertools.pairwise(slopes))
    assert set(curve) <= set(points) and {points[0], points[-1]} <= set(curve)
    assert all(height(curve, x) <= y + 1e-9 for x, y in points)
    for left, middle, right in itertools.combinations(points, 3):  # greatest: no chord of points lies below it
        between = left[1] + (right[1] - left[1]) * (middle[0] - left[0]) / (right[0] - left[0])
        assert height(curve, middle[0]) <= between + 1e-9


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(3, 20))
def test_sensitivity_finds_the_cheapest_widths_of_three_layers(seed, removed):
    random = np.random.default_rng(seed)
    widths = (10, 10, 10)
    units, known = evidence(seed, widths)
    known["measure"] = Toy(random.uniform(0.1, 3, 3), widths, random.integers(1, 4, 3))
    found = plan("sensitivity", removed / 30, (units, known))
    curves = [minorant([(0, 0.0), *((n, known["measure"].law(layer, n)) for n in (1, 2, 4, 6, 10))]) for layer in range(3)]
    costs = [
        sum(height(curve, gone) for curve, gone in zip(curves, each, strict=True))
        for each in itertools.product(range(10), repeat=3)
        if sum(each) == removed
    ]
    assert found.found["predicted_kl"] == pytest.approx(min(costs), rel=1e-9, abs=1e-12)


def test_sensitivity_measures_the_lowest_neurons_of_one_layer_at_a_time():
    units, known = evidence()
    plan("sensitivity", 0.2, (units, known))
    assert all(len(each) == 1 for each in known["measure"].measured)
    for each in known["measure"].measured:
        ((layer, gone),) = each.items()
        order = known["importance"][layer].argsort()
        assert sorted(gone) == sorted(order[: len(gone)].tolist())
    assert {len(next(iter(each.values()))) for each in known["measure"].measured} == {5, 10, 20, 30, 50}


# Whole MLPs


@pytest.mark.parametrize(
    ("ratio", "spec", "expected"),
    [
        (0.2, "depth", [40, 40, 40, 40]),  # no layer fits in
        (0.25, "depth", [50, 50, 50, 0]),
        (0.6, "depth", [40, 0, 40, 0]),
        (0.6, {"depth": {"by": "influence"}}, [40, 0, 40, 0]),
        (0.6, {"depth": {"protect": 1}}, [40, 0, 0, 40]),
    ],
)
def test_depth_drops_the_cheapest_layers_that_fit_and_takes_the_rest_from_all_others(ratio, spec, expected):
    found = plan(spec, ratio)
    assert found.width_after == expected
    assert found.found["dropped_layers"] == [layer for layer, width in enumerate(expected) if not width]


# Few widths


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(2, 60), min_size=2, max_size=7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_few_levels_are_kept_and_miss_the_budget_by_less_than_a_step_of_every_layer(wished, levels, step, least):
    units, keep = [Units(60, 3)] * len(wished), Fraction(sum(map(Fraction, wished)))
    try:
        found = Budget(keep, step, levels=levels).widths(wished, units, [least] * len(units))
    except UserError:
        assert round(keep / step) < -(-least // step) * len(units)
        return
    assert len(set(found)) <= levels and all(width % step == 0 and least <= width <= 60 for width in found)
    assert abs(sum(found) - keep) <= step * len(wished)


def test_levels_group_what_is_near_and_leave_dropped_layers_alone():
    units = [Units(100, 3)] * 6
    assert Budget(Fraction(300), levels=2).widths([20, 22, 24, 80, 78, 76], units) == [22, 22, 22, 78, 78, 78]
    assert plan("depth", 0.3, levels=1).width_after == [47, 47, 47, 0], "140 neurons of three layers are not to be had"
    assert plan("depth", 0.3, levels=1).missed_neurons == pytest.approx(-1)
    whole = plan({"global": {"floor": 0.1}}, 0.4, levels=2, multiple_of=4)
    assert len(set(whole.width_after)) <= 2 and len(set(whole.width_exact)) > 2 and sum(whole.width_exact) == 120
    with pytest.raises(UserError, match="levels -1 is negative"):
        plan("global", 0.4, levels=-1)
    with pytest.raises(UserError, match="levels 1: layers of such different widths cannot share so few"):
        Budget(Fraction(40), levels=1).widths([35, 5], [Units(40, 3), Units(10, 3)], [30, 1])


def test_importance_lost_is_the_share_of_those_that_go():
    rows = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 1.0])]
    assert selection.importance_lost(rows, [2, 0]) == pytest.approx([0.3, 1.0])


# Measured on a model


def test_measured_divergence_is_that_of_silenced_models_and_is_asked_once(tiny, token_windows):
    model = tiny("llama", "float64")
    ids, measure = torch.as_tensor(token_windows[:3]), Measurement(model, token_windows, progress=False)
    ablations = [{0: [1, 2, 5]}, {2: range(40)}, {0: [3], 1: [4]}, {}]
    found = measure.divergence(ablations, 3)
    for each, value in zip(ablations, found, strict=True):
        kept = [[i for i in range(40) if i not in each.get(layer, ())] for layer in range(3)]
        with torch.no_grad():
            dense = model(input_ids=ids).logits.log_softmax(-1)
            with silenced(model, kept):
                changed = model(input_ids=ids).logits.log_softmax(-1)
        assert value == pytest.approx(float((dense.exp() * (dense - changed)).sum(-1).mean()), rel=1e-6, abs=1e-12)
    model.forward = None  # whoever measures again fails
    assert measure.divergence(ablations[::-1], 3) == found[::-1]
    with pytest.raises(UserError, match="windows 99: there are 9 calibration windows"):
        measure.divergence(ablations[:1], 99)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3"])
def test_influence_is_the_angle_by_which_an_mlp_turns_the_residual_stream(architecture, tiny, token_windows):
    model = tiny(architecture, "float64")
    seen = []
    with torch.no_grad():
        handles = [layer.mlp.register_forward_hook(lambda *call: seen.append(call[-1])) for layer in model.get_decoder().layers]
        outputs = model(input_ids=torch.as_tensor(token_windows[:2]), output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
    found = Measurement(model, token_windows, progress=False).influence(2)
    for layer in range(2):  # the last output has the final norm on it
        behind = outputs[layer + 1]
        cosine = torch.cosine_similarity(behind - seen[layer], behind, dim=-1).mean()
        assert found[layer] == pytest.approx(float(1 - cosine), rel=1e-9)


def test_a_measured_allocation_tells_what_all_losses_do_together(tiny, token_windows):
    model = tiny("llama", "float64")
    importance = scoring.score(model, token_windows[:3], ["entropy"], progress=False).importance["entropy"]
    measure = Measurement(model, token_windows, progress=False)
    chosen = {"neuron_ratio": 0.4, "importance": importance, "measure": measure, "criterion": "entropy"}
    found = selection.allocate(model, allocation={"sensitivity": {"windows": 2}}, multiple_of=7, **chosen)
    assert found.width_after != found.width_exact and found.found["joint_kl"] != found.found["joint_kl_exact"]
    ids = torch.as_tensor(token_windows[:2])
    with torch.no_grad():
        dense = model(input_ids=ids).logits.log_softmax(-1)
        pruning.narrow(model, selection.kept_neurons(importance, found.width_after))
        changed = model(input_ids=ids).logits.log_softmax(-1)
    joint = float((dense.exp() * (dense - changed)).sum(-1).mean())
    assert found.found["joint_kl"] == pytest.approx(joint, rel=1e-6)
    assert [mlp.width for mlp in models.gated_mlps(model)] == found.width_after
