"""Intervals and paired tests for numbers that vary over calibration seeds and over evaluated items.

A long frame with the columns `seed`, `item` and `value` goes in; `weight` (default 1) and `group` (default one group)
are optional. The statistic of one seed is `sum(weight * value) / sum(weight)` within a group, averaged over groups with
equal weight, so the same code serves an accuracy (weight 1), a mean of tasks (group = task) and a log-perplexity
(value = nll per token, weight = tokens). The statistic of a model is the mean over its calibration seeds.

Seeds and items are crossed random effects: every seed's model answers the same items. The variance of the statistic is
`var(seed statistics) / S`, known from S seeds only, plus what the seeds share, the covariance that the items give them
(Hillis, Statistics in Medicine 26, 2007). The estimate is held against the distribution of Behrens and Fisher,
`seeds * t[S - 1] + items * t[n - 1]` with the two standard errors as scales: three seeds that happen to agree are no proof that
seeds agree. A bootstrap of seeds takes them for one, and so does one t with Satterthwaite's degrees of freedom: where nothing
differs, they find something in up to 85 % and 20 % of the families of nine comparisons with three seeds, after Holm. This
distribution does in 5 % or less whatever the share of the seeds, also with two seeds (simulated in the tests).
One seed says nothing about others: it has an interval over items and no p-value. What remains: where 16 items with one-sided
outliers decide alone, it is up to 11 %, with 40 items 6 %; differences of equal criteria have their outliers on both sides.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from hfprune_nb.errors import UserError

LEVEL = 0.95
POWER = 0.8
ONE_SEED = "one seed: interval over items only"
# For the notes under tables: what Holm's correction holds, and where it does not (both simulated in the tests).
FAMILY_ERROR = (
    "Where nothing differs, 5 % of the families of comparisons or fewer get a verdict (simulated); with 16 to 40 items whose "
    "outliers are all on one side, which then decide alone, it is up to 11 %."
)
# Abscissae of a trapezoidal rule: equal steps of asinh(t) reach far into the heavy tails of one or two degrees of freedom.
STEP = 0.1
NODES = np.sinh(np.arange(-14, 14 + STEP / 2, STEP))


@dataclass(frozen=True)
class Errors:
    """The standard errors of an estimate and their degrees of freedom, numbers or arrays of one shape.

    seeds, items : what calibration seeds add and what items add; items_alone : the error over items for these seeds as they are.
    """

    seeds: np.ndarray
    items: np.ndarray
    seeds_df: np.ndarray | np.float64
    items_df: np.ndarray
    items_alone: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """The standard error over seeds and items."""
        return np.hypot(self.seeds, self.items)

    @property
    def seed_share(self) -> np.ndarray:
        """The share of the seeds in the variance."""
        return self.seeds**2 / self.total**2

    def p_value(self, estimate) -> np.ndarray:
        """Return `P(|seeds * t + items * t'| > |estimate|)`, the two-sided p-value of an estimate whose true value is 0.

        The trapezoidal rule is exact to .3 % of p where p is above .0005 (the tests hold it against tables).
        """
        estimate, seeds, items = map(np.abs, np.broadcast_arrays(estimate, self.seeds, self.items))
        swap = seeds < items
        wide, narrow = np.where(swap, items, seeds)[..., None], np.where(swap, seeds, items)[..., None]
        wide_df = np.where(swap, self.items_df, self.seeds_df)[..., None]
        narrow_df = np.where(swap, self.seeds_df, self.items_df)[..., None]
        density = _student(NODES, narrow_df) * np.sqrt(1 + NODES**2) * STEP
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = special.stdtr(wide_df, (narrow * NODES - estimate[..., None]) / wide)
            outside = special.stdtr(narrow_df[..., 0], -np.fmax(NODES[-1], estimate / narrow[..., 0]))
        # Without any spread only an estimate of exactly 0 agrees with 0.
        known = np.where((wide[..., 0] == 0) & (estimate == 0), 1.0, 2 * (density * beyond).sum(-1) + 2 * outside)
        return np.minimum(known, 1)

    def p_equivalent(self, estimate, margin) -> np.ndarray:
        """Return the p-value of two one-sided tests against `|difference| >= margin` (Schuirmann 1987).

        Where it is low, that is excluded; it is below 5 % where the 90 % interval lies within the margin.
        """
        room = margin - np.abs(estimate)
        beyond = self.p_value(room) / 2
        return np.where(room > 0, beyond, 1 - beyond)

    def bound(self, estimate) -> float:
        """Return the size beyond which a true difference is excluded at 5 % (one-sided): the smallest margin that would be."""
        return float(np.abs(estimate) + self.quantile(LEVEL))

    def p_items(self, estimate) -> np.ndarray:
        """Return the two-sided p-value of Student's t over items, for these seeds only."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(estimate == 0, 1.0, 2 * stats.t.sf(np.abs(estimate) / self.items_alone, self.items_df))

    def quantile(self, probability: float) -> float:
        """Return the upper quantile of `seeds * t + items * t'`, for one estimate; NaN where an error is unknown."""
        if not np.isfinite(self.total):
            return np.nan
        tail = 2 * (1 - probability)
        scales = ((self.seeds, self.seeds_df), (self.items, self.items_df))
        # A sum is beyond both quantiles only where one of its terms is beyond its own.
        highest = sum(scale * stats.t.isf(tail / 4, df) for scale, df in scales if scale)
        return optimize.brentq(lambda value: self.p_value(value) - tail, 0, highest, xtol=1e-9 * highest) if highest else 0.0

    def detectable(self, n_comparisons: int = 1, power: float = POWER) -> float:
        """Return the true difference that a two-sided test at 5 % finds with the chance `power`.

        The level is 5 % over `n_comparisons`, the strictest of Holm's procedure. The chance is that of the noncentral t with
        Satterthwaite's degrees of freedom (within .06 in the tests); 2.80 standard errors for one comparison of many seeds and
        items (Bloom, Minimum detectable effects, Evaluation Review 19, 1995).
        """
        critical = self.quantile(1 - (1 - LEVEL) / n_comparisons / 2)
        if not critical > 0:
            return critical
        df = self.total**4 / (self.seeds**4 / self.seeds_df + self.items**4 / self.items_df)
        return float(self.total * special.nctdtrinc(df, 1 - power, critical / self.total))


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % interval; the bounds are NaN, and `note` says why, where none can be given."""

    mean: float
    low: float
    high: float
    n_seeds: int
    n_items: int
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """A paired difference A - B with its 95 % interval and two-sided p-values: over seeds and items, and over items alone."""

    mean: float
    low: float
    high: float
    p: float
    p_items: float
    errors: Errors
    n_seeds: int
    n_items: int
    note: str = ""

    @property
    def crosses_zero(self) -> bool:
        """Whether the interval holds zero; an interval that could not be computed counts as holding it."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Sample:
    """What every seed has of every item: values (seeds, items), weights (items,), the item positions of each group, and notes."""

    values: np.ndarray
    weights: np.ndarray
    groups: list[np.ndarray]
    notes: list[str]

    @property
    def n_seeds(self) -> int:
        """The number of seeds."""
        return self.values.shape[0]

    @property
    def n_items(self) -> int:
        """The number of items of all groups."""
        return self.values.shape[1]


def mean_interval(frame: pd.DataFrame) -> Interval:
    """Return the mean over calibration seeds and items with its 95 % interval.

    `frame` is described at the top of this module; only items that every seed has enter, a note counts the others.
    Raises UserError on an empty frame, a missing column, a value that is not finite, or an item that occurs twice.
    """
    sample = _align(frame)
    mean, _, half, note = _judge(sample)
    return Interval(mean, mean - half, mean + half, sample.n_seeds, sample.n_items, note)


def log_perplexity_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return windows (nll, tokens) as value = nll per token and weight = tokens, whose statistic is log-perplexity."""
    _require(frame, ("seed", "item", "nll", "tokens"))
    return frame.assign(value=frame["nll"] / frame["tokens"], weight=frame["tokens"]).drop(columns=["nll", "tokens"])


def paired_difference(a: pd.DataFrame, b: pd.DataFrame) -> Difference:
    """Return A - B on the seeds and items that both frames hold, with its 95 % interval and p-values.

    The p-value agrees with the interval: below 5 % where it excludes zero. With one seed it is NaN, `p_items` is not.
    Raises UserError when the two frames share no seed or no item.
    """
    sample = paired_sample(a, b)
    mean, errors, half, note = _judge(sample)
    judged = sample.n_seeds > 1 and np.isfinite(half)
    p = float(errors.p_value(mean)) if judged else np.nan
    p_items = float(errors.p_items(mean)) if np.isfinite(half) else np.nan
    return Difference(mean, mean - half, mean + half, p, p_items, errors, sample.n_seeds, sample.n_items, note)


def paired_sample(a: pd.DataFrame, b: pd.DataFrame) -> Sample:
    """Return A - B on the seeds and items that both frames hold; errors as `paired_difference`."""
    return _align(_pair(a, b))


def estimate(values: np.ndarray, weights: np.ndarray | None = None, groups: list | None = None) -> tuple[np.ndarray, Errors]:
    """Return the statistic of `values` (..., seeds, items) and its standard errors, both of the leading shape.

    weights : (items,), default 1. groups : item positions of each group, default one group. With one seed the error of the
    seeds is 0 and that of the items theirs alone. Errors are NaN where a group holds a single item.
    """
    n_seeds, n_items = values.shape[-2:]
    weights = np.ones(n_items) if weights is None else weights
    groups = [np.arange(n_items)] if groups is None else groups
    per_seed, alone, residual, squares = (np.float64(0) for _ in range(4))
    with np.errstate(divide="ignore", invalid="ignore"):
        for group in groups:
            part, share, free = values[..., group], weights[group] / weights[group].sum(), len(group) - 1
            mean = part @ share
            per_seed = per_seed + mean / len(groups)
            # What each item adds to the weighted mean, linear in the values and in the weights (the delta method).
            influence = (part - mean[..., None]) * share * len(group) / len(groups)
            by_item = influence.mean(axis=-2)
            variance = (by_item**2).sum(-1) / np.float64(free) / len(group)
            rest = ((influence - by_item[..., None, :]) ** 2).sum((-2, -1)) / np.float64(free) / len(group)
            alone, residual, squares = alone + variance, residual + rest, squares + variance**2 / np.float64(free)
        items_df = np.where(alone > 0, alone**2 / squares, n_items - len(groups))
    shared, seeds = alone, np.zeros_like(alone)
    if n_seeds > 1:
        shared = np.maximum(alone - residual / (n_seeds * (n_seeds - 1)), 0)
        seeds = per_seed.std(axis=-1, ddof=1) / np.sqrt(n_seeds)
    return per_seed.mean(axis=-1), Errors(seeds, np.sqrt(shared), np.float64(max(n_seeds - 1, 1)), items_df, np.sqrt(alone))


def holm(p_values) -> np.ndarray:
    """Return Holm's step-down adjusted p-values in the given order; NaN stays NaN and does not count in the family.

    >>> holm([0.01, 0.04, 0.03, float("nan")])
    array([0.03, 0.06, 0.06,  nan])
    """
    p_values = np.asarray(p_values, dtype=float)
    adjusted = np.full(p_values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    ascending = known[np.argsort(p_values[known], kind="stable")]
    factors = np.arange(len(ascending), 0, -1)
    adjusted[ascending] = np.minimum(1, np.maximum.accumulate(factors * p_values[ascending]))
    return adjusted


def spearman(a, b, group=None) -> float:
    """Return Spearman's correlation of two series; with `group` (one label per element) its mean over groups.

    A series that is constant within a group has the correlation 0 there.
    """
    left, right, groups = _series(a, b, group)
    return float(np.mean([_spearman(left[members], right[members]) for members in groups]))


def rank_correlation(a, b, group=None) -> Interval:
    """Return `spearman` with its 95 % interval over elements, each of which stands for its group.

    The standard error is the jackknife's: a bootstrap of ranks makes ties, which shrink correlations in small groups.
    """
    values, groups = _pseudo_values(a, b, group)
    mean = spearman(a, b, group)
    half, note = _half_width(mean, estimate(values, groups=groups)[1])
    return Interval(mean, max(mean - half, -1.0), min(mean + half, 1.0), 1, len(a), note)


def rank_correlation_difference(a, b, target, group=None) -> Difference:
    """Return how much better `a` than `b` correlates with `target` (`spearman`), paired on the elements, over which p is."""
    (left, groups), (right, _) = _pseudo_values(a, target, group), _pseudo_values(b, target, group)
    mean, errors = spearman(a, target, group) - spearman(b, target, group), estimate(left - right, groups=groups)[1]
    half, note = _half_width(mean, errors)
    p = float(errors.p_items(mean)) if np.isfinite(half) else np.nan
    return Difference(mean, mean - half, mean + half, p, p, errors, 1, len(target), note)


def _series(a, b, group) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return both series as arrays and the positions of each group."""
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if left.size == 0:
        raise UserError("the series to correlate are empty: give at least two elements")
    return left, right, _positions(np.zeros(len(left)) if group is None else np.asarray(group))


def _student(t: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Return the density of Student's t; that of scipy.stats costs more than the integral that needs it."""
    scale = special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - np.log(df * np.pi) / 2
    return np.exp(scale - (df + 1) / 2 * np.log1p(t**2 / df))


def _positions(labels) -> list[np.ndarray]:
    codes = pd.factorize(labels)[0]
    return [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation along the last axis."""
    left, right = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (stats.rankdata(x, axis=-1) for x in (a, b)))
    scale = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    return np.divide((left * right).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def _pseudo_values(a, b, group) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the jackknife's pseudo-values of `spearman`, (1, elements), and the positions of each group."""
    left, right, groups = _series(a, b, group)
    found = np.empty((1, len(left)))
    for members in groups:
        n = len(members)
        others = members[np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)]
        found[0, members] = n * _spearman(left[members], right[members]) - (n - 1) * _spearman(left[others], right[others])
    return found, groups


def _require(frame: pd.DataFrame, columns) -> None:
    if missing := [name for name in columns if name not in frame]:
        raise UserError(f"the frame lacks the column {missing[0]!r}: give one row per seed and item")
    if frame.empty:
        raise UserError("the frame holds no row: give at least one item")


def _pair(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return A - B as the value of each seed and item that both hold, with the weights and groups of A."""
    for frame in (a, b):
        _require(frame, ("seed", "item", "value"))
    keys = [name for name in ("seed", "item", "group") if name in a and name in b]
    pairs = a.merge(b[[*keys, "value"]], on=keys, suffixes=("", "_b"))
    if pairs.empty:
        raise UserError("the two models share no seed and item to be paired on: evaluate both on the same ones")
    return pairs.assign(value=pairs["value"] - pairs["value_b"])


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if values.size == 0:
        raise UserError(f"{name} is empty: give at least one value")
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds {np.sum(~np.isfinite(values))} values that are not finite: leave them out")
    return values


def _align(frame: pd.DataFrame) -> Sample:
    _require(frame, ("seed", "item", "value"))
    frame = frame.assign(weight=frame.get("weight", 1.0), group=frame.get("group", ""))
    _finite(frame["value"].to_numpy(dtype=float), "the value column")
    if not (frame["weight"] > 0).all():
        raise UserError("the weight column holds values that are not positive: leave empty windows out")
    if frame.duplicated(["seed", "group", "item"]).any():
        raise UserError("one item occurs twice for the same seed: give one row per seed and item")
    table = frame.pivot(index=["group", "item"], columns="seed", values="value")
    complete = table.dropna()
    if complete.empty:
        raise UserError("no item is common to all seeds: evaluate every seed with the same items")
    left_out = len(table) - len(complete)
    notes = [f"{left_out} of {len(table)} items left out, not common to all seeds"] if left_out else []
    if complete.shape[1] == 1:
        notes.append(ONE_SEED)
    weights = frame.groupby(["group", "item"])["weight"].mean().reindex(complete.index)
    groups = _positions(complete.index.get_level_values("group"))
    return Sample(complete.to_numpy(dtype=float).T, weights.to_numpy(dtype=float), groups, notes)


def _half_width(mean: float, errors: Errors) -> tuple[float, str]:
    """Return half the width of an estimate's interval, NaN with a note where there is none."""
    half = errors.quantile((1 + LEVEL) / 2)
    if not np.isfinite(half):
        return np.nan, "a single item: no interval"
    return (half, "") if half or not mean else (np.nan, "all values are equal: no interval")


def _judge(sample: Sample) -> tuple[float, Errors, float, str]:
    """Return a sample's statistic, its errors, half the width of its interval and the notes."""
    mean, errors = estimate(sample.values, sample.weights, sample.groups)
    half, note = _half_width(float(mean), errors)
    return float(mean), errors, half, "; ".join([*sample.notes, note] if note else sample.notes)
