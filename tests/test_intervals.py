"""Intervals and tests against scipy, printed tables, and simulations of studies in which nothing or something differs."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.report.intervals import (
    Errors,
    estimate,
    holm,
    log_perplexity_frame,
    mean_interval,
    paired_difference,
    rank_correlation,
    rank_correlation_difference,
    spearman,
)

SLEEP = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
FAMILY = 9


def tidy(values, **columns):
    """Return a (seeds, items) array as the long frame that the module takes."""
    values = np.atleast_2d(values)
    index = pd.MultiIndex.from_product([range(values.shape[0]), range(values.shape[1])], names=["seed", "item"])
    return pd.DataFrame({"value": values.ravel()}, index=index).reset_index().assign(**columns)


def crossed(rng, shape, share, residual, n_seeds=3, n_items=16):
    """Return (*shape, seeds, items) of crossed effects around 0 whose mean has variance 1, of which seeds make `share`.

    `residual` is the part of the rest that is drawn anew for each seed and item.
    """
    by_seed = rng.normal(0, np.sqrt(share * n_seeds), (*shape, n_seeds, 1))
    by_item = rng.normal(0, np.sqrt((1 - share) * (1 - residual) * n_items), (*shape, 1, n_items))
    anew = rng.normal(0, np.sqrt((1 - share) * residual * n_items * n_seeds), (*shape, n_seeds, n_items))
    return by_seed + by_item + anew


def found_anything(p):
    """Return in which share of the families, the rows of `p`, Holm's correction leaves something below 5 %."""
    return np.mean([holm(row).min() < 0.05 for row in p])


def at_most_five_percent(rate, n_families):
    """Say whether a rate of false findings among so many families fits 5 % or less (three standard errors)."""
    return rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_families)


@pytest.mark.parametrize("values", [SLEEP, np.tile(SLEEP[:, None], (1, 5))], ids=["items of one seed", "seeds alone"])
def test_what_varies_over_one_thing_only_has_students_interval(values):
    # Student (1908), extra hours of sleep, paired: mean 1.58, 95 % interval 0.70 to 2.46, p 0.002833, as R's t.test prints.
    interval = mean_interval(tidy(values))
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-5)
    mean, errors = estimate(np.atleast_2d(values))
    assert errors.p_value(mean) == pytest.approx(0.002833, abs=1e-5)


# Fisher and Yates, Statistical Tables, Table VI: 5 % points of the distribution of Behrens and Fisher by the angle of the errors.
@pytest.mark.parametrize(
    "df, other_df, degrees, point",
    [(6, 6, 0, 2.447), (6, 6, 15, 2.440), (6, 6, 45, 2.435), (8, 6, 45, 2.364), (12, 6, 45, 2.301)],
)
def test_the_distribution_is_the_printed_one(df, other_df, degrees, point):
    angle = np.radians(degrees)
    for scales in ((np.cos(angle), np.sin(angle), df, other_df), (np.sin(angle), np.cos(angle), other_df, df)):
        errors = Errors(*map(np.float64, scales), items_alone=np.float64(1))
        assert errors.quantile(0.975) == pytest.approx(point, abs=1.5e-3)
        assert errors.p_value(np.array([-point, point])) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("seeds_df, items_df", [(1, 15), (2, 15), (2, 500), (15, 1)])
@pytest.mark.parametrize("degrees", [5, 45, 85])
def test_tails_of_one_and_two_degrees_of_freedom_are_those_of_draws(seeds_df, items_df, degrees):
    angle, rng = np.radians(degrees), np.random.default_rng(1)
    draws = np.cos(angle) * rng.standard_t(seeds_df, 400_000) + np.sin(angle) * rng.standard_t(items_df, 400_000)
    errors = Errors(*map(np.float64, (np.cos(angle), np.sin(angle), seeds_df, items_df, 1)))
    for tail in (0.2, 0.05, 0.05 / FAMILY):
        beyond = np.mean(np.abs(draws) > errors.quantile(1 - tail / 2))
        assert beyond == pytest.approx(tail, abs=4 * np.sqrt(tail / 400_000))


def test_standard_errors_are_those_of_crossed_effects():
    rng = np.random.default_rng(3)
    mean, errors = estimate(crossed(rng, (4000,), 0.6, 0.5, n_seeds=4, n_items=20))
    assert np.var(mean) == pytest.approx(1, rel=0.1)
    assert np.mean(errors.total**2) == pytest.approx(1, rel=0.1)
    # What is drawn anew for each seed and item stands with the seeds, and no item shares it.
    assert np.mean(errors.seeds**2) == pytest.approx(0.8, rel=0.1) and np.mean(errors.items**2) == pytest.approx(0.2, rel=0.1)


def test_one_seed_has_an_interval_over_items_no_p_value_and_says_so():
    values = np.random.default_rng(2).normal(size=50)
    difference = paired_difference(tidy(values), tidy(np.zeros(50)))
    test = stats.ttest_1samp(values, 0)
    assert np.isnan(difference.p) and difference.p_items == pytest.approx(test.pvalue) and "one seed" in difference.note
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval()), abs=1e-5)


def test_identical_seeds_add_no_width():
    values = np.random.default_rng(4).normal(size=60)
    one, three = (mean_interval(tidy(v)) for v in (values, [values] * 3))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_groups_weigh_equally_and_are_judged_apart():
    rng = np.random.default_rng(0)
    long, short = 1 + rng.normal(size=90), rng.normal(size=10)
    interval = mean_interval(pd.concat([tidy(long, group="a"), tidy(short, group="b")]))
    assert interval.mean == pytest.approx((long.mean() + short.mean()) / 2)
    # The mean of two independent means: Welch's test on their sum.
    test = stats.ttest_ind(long, -short, equal_var=False).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((test.low / 2, test.high / 2), abs=1e-6)


def test_only_items_of_every_seed_enter():
    frame = tidy([[1.0, 2.0, 3.0], [1.0, 2.0, 9.0]])
    interval = mean_interval(frame[~((frame["seed"] == 1) & (frame["item"] == 2))])
    assert interval.mean == 1.5 and interval.n_items == 2 and "1 of 3 items left out" in interval.note


@pytest.mark.parametrize("values, note", [([2.0, 2.0], "equal"), ([2.0], "single item")])
def test_what_shows_no_spread_has_no_interval(values, note):
    difference = paired_difference(tidy([values] * 3), tidy(np.zeros((3, len(values)))))
    assert np.isnan([difference.low, difference.high, difference.p, difference.p_items]).all() and note in difference.note
    assert difference.crosses_zero and difference.mean == 2


def test_perplexity_is_the_ratio_of_sums_and_its_error_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(6)
    tokens = rng.integers(50, 500, 60)
    nll = tokens * rng.normal(3, 0.3, 60)
    frame = log_perplexity_frame(pd.DataFrame({"seed": 0, "item": range(60), "nll": nll, "tokens": tokens}))
    ours = paired_difference(frame, frame.assign(value=0.0))
    assert ours.mean == pytest.approx(nll.sum() / tokens.sum())
    theirs = stats.bootstrap(
        (nll, tokens),
        lambda n, t, axis: n.sum(axis=axis) / t.sum(axis=axis),
        paired=True,
        rng=np.random.default_rng(8),
        vectorized=True,
    )
    assert ours.errors.total == pytest.approx(theirs.standard_error, rel=0.03)


def test_holm_on_worked_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm([0.01, np.nan, 0.04])
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.04]) and np.isnan(with_gap[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_order(p_values):
    adjusted, raw = holm(p_values), np.array(p_values)
    assert (adjusted >= raw).all() and (adjusted <= np.minimum(1, len(raw) * raw) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 30))
def test_a_difference_changes_sign_with_its_sides_and_its_p_value_agrees_with_its_interval(seed, n_seeds, n_items):
    rng = np.random.default_rng(seed)
    a, b = (tidy(rng.normal(size=(n_seeds, n_items)) + shift) for shift in (rng.uniform(0, 2), 0))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.mean == pytest.approx(-back.mean, abs=1e-12) and there.p == pytest.approx(back.p, nan_ok=True)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert (there.p_items if n_seeds == 1 else there.p) < 0.05 or there.crosses_zero
    assert (there.p_items if n_seeds == 1 else there.p) > 0.05 or not there.crosses_zero


def test_pairing_removes_what_the_items_share():
    rng = np.random.default_rng(9)
    hard = rng.normal(0, 5, 200)
    a, b = tidy(hard + 0.3 + rng.normal(0, 0.5, (3, 200))), tidy(hard + rng.normal(0, 0.5, (3, 200)))
    difference = paired_difference(a, b)
    assert not difference.crosses_zero and difference.p < 0.05 and difference.n_seeds == 3
    assert paired_difference(a, a).p == paired_difference(a, a).p_items == 1.0


def test_pairs_on_common_seeds_only_and_refuses_none():
    a, b = tidy(np.ones((3, 4))), tidy(np.zeros((1, 4)))
    assert paired_difference(a, b).n_seeds == 1
    with pytest.raises(UserError, match="share no seed"):
        paired_difference(a, b.assign(seed=9))


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.8, 0.95, 1])
def test_where_nothing_differs_five_percent_of_the_families_find_something(n_seeds, share):
    """Three seeds, 16 windows, nine comparisons: the bootstrap of seeds found something in up to 85 % of the families."""
    for residual in (0, 0.2, 0.9):
        mean, errors = estimate(crossed(np.random.default_rng(11), (700, FAMILY), share, residual, n_seeds))
        p = errors.p_value(mean)
        assert at_most_five_percent(found_anything(p), len(p)), residual
        assert np.mean(p >= 0.05) > 0.94, "the 95 % interval covers"


def test_where_three_criteria_are_equal_their_pairs_find_something_in_five_percent():
    """Three criteria at three ratios share seeds and windows, so that the nine differences depend on each other."""
    rng = np.random.default_rng(12)
    for share in (0.3, 0.8, 1):
        models = crossed(rng, (1000, 3, 3), share, 0.2) + crossed(rng, (1000, 1, 3), share, 0.2)
        pairs = np.concatenate([models[:, a] - models[:, b] for a, b in ((0, 1), (0, 2), (1, 2))], axis=1)
        mean, errors = estimate(pairs)
        assert at_most_five_percent(found_anything(errors.p_value(mean)), 1000)


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_averages_of_tasks_find_nothing_where_nothing_differs(share):
    """Right and wrong answers to tasks of unequal size; chances are symmetric around .5, so no cut at 0 or 1 favours a side."""
    rng, sizes = np.random.default_rng(13), (12, 24, 24, 60, 120)
    groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    rest = (0.16 + 0.4 / 3) * sum(1 / size for size in sizes) / len(sizes) ** 2
    shift = rng.normal(0, np.sqrt(3 * rest * share / (1 - share)), (500, FAMILY, 3, 1))
    easy, by_item = rng.uniform(0.25, 0.75, (500, FAMILY, 1, sum(sizes))), rng.choice([-0.2, 0.2], (500, FAMILY, 1, sum(sizes)))
    answers = [rng.uniform(size=(500, FAMILY, 3, sum(sizes))) < chance for chance in (easy + by_item + shift, easy - by_item)]
    mean, errors = estimate(answers[0].astype(float) - answers[1], groups=groups)
    assert at_most_five_percent(found_anything(errors.p_value(mean)), 500)


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_windows_of_heavy_tails_and_unequal_length_find_nothing_where_nothing_differs(share):
    """Of two equal criteria either may be the one that is far off at a window, so their difference is symmetric."""
    rng, shape = np.random.default_rng(14), (500, FAMILY)
    by_item = rng.laplace(0, 1, (*shape, 1, 16))
    by_seed = rng.normal(0, np.sqrt(3 * share / (1 - share) * 2.03 / 16), (*shape, 3, 1))
    values = by_item + by_seed + rng.normal(0, 0.3, (*shape, 3, 16))
    mean, errors = estimate(values, weights=rng.integers(100, 512, 16).astype(float))
    assert at_most_five_percent(found_anything(errors.p_value(mean)), 500)


def test_the_items_p_value_tests_the_average_that_is_printed():
    """A large task in which B wins more answers by little and A few by much: a sign test called B ahead by 650 to 416."""
    rng = np.random.default_rng(15)
    continuous = rng.exponential(1, (2000, 1, 800)) - 1  # mean 0, and 63 % of the differences below 0
    values = np.concatenate([continuous, rng.choice([-1.0, 0, 1], size=(2000, 1, 80))], axis=-1)
    mean, errors = estimate(values, groups=[np.arange(800), np.arange(800, 840), np.arange(840, 880)])
    assert at_most_five_percent(np.mean(errors.p_items(mean) < 0.05), 2000)
    wins, losses = (values > 0).sum((1, 2)), (values < 0).sum((1, 2))
    assert (
        np.mean([stats.binomtest(int(won), int(won + lost)).pvalue < 0.05 for won, lost in zip(wins[:50], losses, strict=False)])
        > 0.9
    )
    ahead = tidy(np.r_[np.full(650, -0.01), np.full(416, 0.2)] + rng.normal(0, 1e-3, 1066))
    found = paired_difference(ahead, ahead.assign(value=0.0))
    assert found.mean > 0 and found.low > 0 and found.p_items < 0.001


def test_a_true_difference_is_found_as_often_as_detectable_says():
    rng = np.random.default_rng(16)
    for n_seeds, share in ((3, 0.0), (3, 0.5), (3, 1.0), (5, 0.5)):
        values = crossed(rng, (3000,), share, 0.2, n_seeds, 40)
        anew, seeds = (1 - share) * 0.2, share
        errors = Errors(*map(np.float64, (np.sqrt(seeds + anew), np.sqrt((1 - share) * 0.8), n_seeds - 1, 39, 1)))
        for size in (1, FAMILY):
            mean, estimated = estimate(values + errors.detectable(size))
            power = np.mean(estimated.p_value(mean) < 0.05 / size)
            assert 0.74 <= power <= 0.86, (n_seeds, share, size, power)


def test_detectable_differences_on_textbook_values():
    # Bloom (1995): 2.80 standard errors at 5 % two-sided and 80 % power, 3.24 at 90 %.
    many = Errors(*map(np.float64, (0.6, 0.8, 1e6, 1e6, 0.8)))
    assert many.detectable() == pytest.approx(2.80, abs=0.005)
    assert many.detectable(power=0.9) == pytest.approx(3.24, abs=0.005)
    assert many.detectable(9) == pytest.approx(2.7729 + 0.8416, abs=1e-3)
    three = Errors(*map(np.float64, (1, 0, 2, 10, 0))).detectable()
    assert stats.nct.sf(stats.t.ppf(0.975, 2), 2, three) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    "frame, sentence",
    [
        (pd.DataFrame({"seed": [], "item": [], "value": []}), "no row"),
        (pd.DataFrame({"seed": [0], "value": [1.0]}), "'item'"),
        (tidy([np.nan, 1.0]), "not finite"),
        (pd.concat([tidy([1.0]), tidy([1.0])]), "twice"),
        (tidy([1.0, 2.0], weight=0.0), "positive"),
    ],
)
def test_bad_frames_are_refused(frame, sentence):
    with pytest.raises(UserError, match=sentence):
        mean_interval(frame)


def test_empty_series_are_refused():
    with pytest.raises(UserError, match="empty"):
        rank_correlation([], [])


def test_rank_correlation_on_a_textbook_ranking():
    # IQ and weekly hours of television of ten people: squared rank differences sum to 194, Spearman 1 - 6 * 194 / 990.
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    television = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    found = rank_correlation(iq, television)
    assert found.mean == pytest.approx(1 - 6 * 194 / 990) and found.low < found.mean < found.high and found.n_items == 10


def test_rank_correlation_within_groups_is_the_mean_of_scipys():
    rng = np.random.default_rng(14)
    group = np.repeat([0, 1, 2], 20)
    a, b = rng.normal(size=60) + 5 * group, rng.normal(size=60) + 5 * group
    expected = np.mean([stats.spearmanr(a[group == g], b[group == g]).statistic for g in range(3)])
    assert spearman(a, b, group) == pytest.approx(expected)
    assert rank_correlation(a, b, group).mean == pytest.approx(expected)
    assert rank_correlation(a, b).mean == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.ones(60)).mean == 0


def test_coverage_of_the_rank_correlation():
    rng, covered = np.random.default_rng(15), []
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a binormal with Pearson's 0.6
    for _ in range(300):
        x, noise = rng.normal(size=(2, 80))
        interval = rank_correlation(x, 0.6 * x + 0.8 * noise)
        covered.append(interval.low <= truth <= interval.high)
    assert 0.89 <= np.mean(covered) <= 0.98


def test_the_better_predictor_is_found_and_equal_ones_are_not_told_apart():
    rng = np.random.default_rng(16)
    target = rng.normal(size=150)
    good, poor, other = (target + spread * rng.normal(size=150) for spread in (0.2, 2.0, 2.0))
    better = rank_correlation_difference(good, poor, target)
    assert better.low > 0 and better.p < 0.01
    assert rank_correlation_difference(poor, other, target).crosses_zero
    assert rank_correlation_difference(poor, poor, target).p == 1.0
