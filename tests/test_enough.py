"""How much calibration is enough: predicted against realised overlap by simulation, and scoring that stops when it is."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.report import enough
from hfprune_nb.report.neurons import overlap
from hfprune_nb.runs.stages import STAGES

LAYERS, WIDTH, RATIO = 6, 1500, 0.3
SPECS = ["entropy", "wanda", "random"]


def scored(total, seed=0, spread=0.4, noise=1.0):
    """Return the scores after each window, sums of heavy-tailed contributions to neurons of log-normal importance."""
    rng = np.random.default_rng(seed)
    true = [np.exp(spread * rng.normal(size=WIDTH)) for _ in range(LAYERS)]
    sums = [(row * rng.lognormal(-(noise**2) / 2, noise, (total, WIDTH))).cumsum(axis=0) for row in true]
    return true, {n + 1: [row[n] for row in sums] for n in range(total)}


def at_powers(by_count, n):
    return {size: rows for size, rows in by_count.items() if size == n or (size < n and size.bit_count() == 1)}


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8, 0.99])
def test_overlap_of_normal_variables_is_that_of_the_integral(rho):
    cut = stats.norm.ppf(0.7)
    both = stats.multivariate_normal(cov=[[1, rho], [rho, 1]]).cdf([cut, cut])
    assert enough.jaccard(rho, 0.7) == pytest.approx(both / (1.4 - both), abs=1e-4)
    assert enough.correlation(enough.jaccard(rho, 0.7), 0.7) == pytest.approx(rho, abs=1e-6)


def test_overlap_at_chance_and_beyond_has_no_correlation():
    assert enough.correlation(0.0, 0.5) == 0 and enough.correlation(1.0, 0.5) == pytest.approx(1)


def test_twice_the_windows_are_as_reliable_as_spearman_and_brown_say():
    rng = np.random.default_rng(1)
    true, noise = rng.normal(size=200_000), rng.normal(size=(2, 4, 200_000))
    one = np.corrcoef(*(true + noise[:, 0]))[0, 1]
    four = np.corrcoef(*(true + noise.mean(axis=1)))[0, 1]
    assert enough.more(one, 4) == pytest.approx(four, abs=0.01)


@pytest.mark.parametrize(("n", "noise"), [(16, 1.0), (40, 1.0), (64, 1.0), (64, 1.5)])
def test_the_predicted_overlap_is_the_realised_one(n, noise):
    true, by_count = scored(64, noise=noise)
    found = enough.predicted(at_powers(by_count, n), RATIO)
    assert found == pytest.approx(overlap(by_count[n], true, RATIO), abs=0.02)


def test_the_windows_that_are_said_to_be_needed_reach_the_target():
    true, by_count = scored(160)
    needed = enough.needed(at_powers(by_count, 32), RATIO, 0.9)
    assert 64 < needed < 160
    assert overlap(by_count[round(needed)], true, RATIO) == pytest.approx(0.9, abs=0.015)


def run(by_count, target, asked):
    def score(model, ids, specs, folder):
        n = len(ids)
        asked.append(int(folder.name))
        named = {size: {"entropy": rows, "wanda": rows} for size, rows in at_powers(by_count, n).items()}
        return SimpleNamespace(snapshots=named)

    return enough.score_until(score, "", np.zeros((max(by_count), 2)), SPECS, [0.2, RATIO], target, folder=Path())


def test_scoring_stops_when_every_ratio_has_reached_the_target():
    true, by_count = scored(400)
    scores, reached = run(by_count, 0.93, asked := [])
    assert asked[0] == enough.FEWEST < asked[-1] == max(scores.snapshots) < 400
    assert set(reached["criterion"]) == {"entropy"} and (reached["predicted"] >= 0.93).all()
    assert min(overlap(by_count[asked[-1]], true, ratio) for ratio in (0.2, RATIO)) > 0.915


def test_a_corpus_that_ends_too_early_is_read_to_its_end():
    scores, reached = run(scored(40)[1], 0.97, asked := [])
    assert max(scores.snapshots) == asked[-1] == 40
    assert (reached["predicted"] < 0.97).all() and (reached["needed"] > 40).all()


def test_criteria_that_are_no_sums_cannot_say_when_to_stop():
    with pytest.raises(UserError, match="stop_at: scores of these criteria are no sums"):
        scores = SimpleNamespace(snapshots={16: {"wanda": [np.ones(3)]}, 32: {"wanda": [np.ones(3)]}})
        enough.score_until(lambda *_, folder: scores, "", np.zeros((40, 2)), SPECS, [0.3], 0.9, folder=Path())


@pytest.mark.parametrize(
    ("changes", "match"), [({"stop_at": 1.0}, "stop_at 1 is outside"), ({"stop_at": 0.9, "stop_ratios": []}, "stop_ratios")]
)
def test_a_target_out_of_reach_is_refused_before_anything_is_loaded(changes, match):
    with pytest.raises(UserError, match=match):
        STAGES["scoring"].check({"criteria": ["entropy"], "stop_at": 0.0, "stop_ratios": [0.3]} | changes)
