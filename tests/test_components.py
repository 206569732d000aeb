"""Variance components against known ones by simulation, and their table on synthetic studies."""

import matplotlib
import numpy as np
import pytest
import synthetic

from hfprune_nb.report.components import (
    KINDS,
    TOGETHER,
    components,
    components_figure,
    components_sentence,
    components_table,
    pooled,
)
from hfprune_nb.report.intervals import estimate
from hfprune_nb.report.results import collect

matplotlib.use("Agg")
TRUE = {"seed": 0.04, "item": 0.5, "rest": 1.0}


def differences(rng, n_seeds, n_items, true=TRUE, groups=1):
    """Return (seeds, items of all groups) with these variances; a seed moves all groups alike."""
    by_seed = rng.normal(0, true["seed"] ** 0.5, (n_seeds, 1))
    by_item = rng.normal(0, true["item"] ** 0.5, (1, groups * n_items))
    return by_seed + by_item + rng.normal(0, true["rest"] ** 0.5, (n_seeds, groups * n_items))


def test_a_large_study_finds_what_it_was_made_of():
    found = components(differences(np.random.default_rng(0), 200, 2000))
    assert {kind: getattr(found, kind) for kind in KINDS} == pytest.approx(TRUE, rel=0.12)


@pytest.mark.parametrize("groups", [1, 4])
def test_moments_are_unbiased_and_intervals_cover(groups):
    rng, n_seeds, n_items, draws = np.random.default_rng(1), 4, 12, 400
    places = list(np.arange(groups * n_items).reshape(groups, n_items))
    true = {"seed": TRUE["seed"], "item": TRUE["item"] / groups, "rest": TRUE["rest"] / groups}
    found = [components(differences(rng, n_seeds, n_items, groups=groups), None, places) for _ in range(draws)]
    for kind in KINDS:
        values = np.array([getattr(each, kind) for each in found])
        assert abs(values.mean() - true[kind]) < 4 * values.std() / draws**0.5
        held = np.mean([each.low[kind] <= true[kind] <= each.high[kind] for each in found])
        assert held > 0.95 - 3 * (0.05 * 0.95 / draws) ** 0.5, kind


def test_the_parts_add_up_to_the_error_of_the_difference():
    values = differences(np.random.default_rng(2), 6, 40, {"seed": 0.5, "item": 0.5, "rest": 1.0}, groups=3)
    places = list(np.arange(120).reshape(3, 40))
    found, (_, errors) = components(values, None, places), estimate(values, groups=places)
    assert errors.seeds**2 == pytest.approx(found.seed / 6 + found.rest / (6 * 40))
    assert errors.total**2 == pytest.approx(found.seed / 6 + found.item / 40 + found.rest / (6 * 40), rel=1e-6)


def test_weights_count_as_in_the_statistic():
    values = differences(np.random.default_rng(3), 5, 30)
    plain, equal = components(values), components(values, np.full(30, 127.0))
    assert (plain.seed, plain.item, plain.rest) == pytest.approx((equal.seed, equal.item, equal.rest))


def test_answers_that_tip_together_are_told_from_those_that_do_not():
    rng = np.random.default_rng(4)
    alone = [components(differences(rng, 3, 24, TRUE | {"seed": 0.0})).p for _ in range(400)]
    assert np.mean(np.array(alone) < 0.05) < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert components(differences(rng, 3, 24, TRUE | {"seed": 4.0})).p < 0.001


def test_one_seed_says_nothing_about_seeds():
    found = components(differences(np.random.default_rng(5), 1, 50))
    assert np.isnan(found.seed) and np.isnan(found.rest) and found.low["item"] < found.item < found.high["item"]


def test_every_measure_and_pair_has_its_row_and_its_picture(tmp_path):
    results = collect(synthetic.study(tmp_path, synthetic.THREE, (0.2,), n_items=20))
    table = components_table(results)
    pairs = table.long.groupby("column").size()
    assert set(pairs) == {3} and {"boolq", "average", "perplexity:c4", "js:c4", "kl:c4", "top1:c4"} <= set(pairs.index)
    assert (table.long["seed_low"] >= 0).all() and table.long["seed_share"].dropna().between(0, 1).all()
    assert "One seed" in table.display and TOGETHER in table.markdown()
    mean = pooled(table, "smollm2-135m", 0.2, "kl:c4")
    rows = table.long[table.long["column"] == "kl:c4"]
    assert mean["rest"] == pytest.approx(rows["rest"].mean()) and mean["seed"] >= 0
    figure = components_figure(table, "smollm2-135m")
    assert [ax.get_xlabel() for ax in figure.axes] == ["standard deviation"] * 4
    told = components_sentence(table, "smollm2-135m")
    assert "at 20 %" in told and f"{mean['rest'] ** 0.5:.3f} of the KL c4" in told
    assert "no variance" in components_figure(table, "other").axes[0].texts[0].get_text()
    assert "fewer than two" in components_sentence(table, "other") and components_table(None).display.empty
