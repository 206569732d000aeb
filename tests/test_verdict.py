"""The verdict's sentences say what the tables say and no more; equivalence tests by simulation."""

import json

import numpy as np
import pandas as pd
import pytest
import synthetic
from test_intervals import crossed

from hfprune_nb.errors import UserError
from hfprune_nb.report.criterion import criterion_table
from hfprune_nb.report.intervals import Errors, estimate
from hfprune_nb.report.paired import EXCLUDED, paired_table
from hfprune_nb.report.results import collect
from hfprune_nb.report.table import Table
from hfprune_nb.report.verdict import carried_by_one_task, decided, headline, verdict, write
from hfprune_nb.runs.stages import STAGES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return collect(synthetic.study(tmp_path_factory.mktemp("study"), n_items=30))


@pytest.fixture(scope="module")
def criterion(results):
    return criterion_table(results)


@pytest.fixture(scope="module")
def paired(results):
    return paired_table(results)


def sentences(criterion, paired, **changes):
    changed = Table("paired", "", paired.long.assign(**changes), paired.display, ())
    return verdict(criterion, changed, "It took a day.")["sentences"]


def test_five_sentences_name_winner_size_cost_and_advice(criterion, paired):
    told = sentences(criterion, paired)
    assert 3 <= len(told) <= 5 and "It took a day." in told and all(text.endswith(".") for text in told)
    found = decided(headline(paired))
    surest = found.sort_values(["p_holm", "p"]).iloc[0]
    low, high = sorted(abs(surest[["low", "high"]].astype(float)))
    assert f"Of {len(headline(paired))} comparisons" in told[0] and f"{len(found)} are decided" in told[0]
    assert f"[{low:.3f}, {high:.3f}]" in told[0] or f"[{low:.1f}, {high:.1f}]" in told[0]
    assert told[-1].startswith("Take Entropy (HFPrune)"), "which does the least damage in these artifacts"


def test_nothing_undecided_is_called_better_and_nothing_decided_is_recommended_against(criterion, paired):
    told = sentences(criterion, paired, verdict="interval crosses zero")
    assert not any(" better than" in text for text in told) and told[0].startswith("None of")
    assert "cannot tell" in told[-1] and "leave" not in told[-1]
    raw = sentences(criterion, paired, verdict="One-hot CE better, not after Holm")
    assert raw[0] == told[0]


def test_what_is_excluded_follows_the_margin(criterion, paired, results):
    (open_,) = [text for text in sentences(criterion, paired) if "margins" in text]
    assert "remains possible" in open_ and "0.5 points" in open_
    wide = paired_table(results, {"average": 60.0, "perplexity": 30.0, "js": 1.0, "kl": 30.0})
    assert (wide.long["p_equivalent"] < 0.05).all() and wide.display["Bound"].str.endswith(EXCLUDED).all()
    (excluded,) = [text for text in sentences(criterion, wide) if "Excluded is a difference" in text]
    assert "by 60 points" in excluded or "by 30 nats" in excluded or "by 1 of JS distance" in excluded
    assert (paired.long["bound"] >= paired.long["mean"].abs()).all()
    at_bound = [row["margin"] < row["bound"] for row in paired.long.to_dict("records") if row["p_equivalent"] >= 0.05]
    assert all(at_bound), "what is not excluded lies below the bound"


def test_measures_that_disagree_are_told(criterion, paired):
    long = paired.long.assign(verdict="interval crosses zero")
    two = long[(long["a"] == "entropy") & (long["b"] == "one_hot_ce") & (long["ratio"] == 0.2)]
    split = two[two["measure"].isin(("average", "js"))].assign(verdict="A better", mean=1.0)
    told = verdict(criterion, Table("paired", "", split, paired.display, ()))["sentences"][-1]
    assert "Choose by the measure that you need" in told


def test_it_is_written_for_readers_and_machines(criterion, paired, tmp_path):
    found = verdict(criterion, paired)
    paragraph, facts = (path.read_text() for path in write(found, tmp_path))
    assert paragraph.count("\n") == 1 and paragraph.strip() == " ".join(found["sentences"])
    assert json.loads(facts) == found and len(json.loads(facts)["comparisons"]) == len(headline(paired))


@pytest.mark.parametrize("margin", [0, -1, "half"])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(UserError, match="margins: that of js must be a number above 0"):
        STAGES["figures"].check({"margins": {"js": margin}})


def test_a_task_that_carries_an_average_is_named():
    scores = {"entropy": (10.0, 50.0, 50.0, 90.0), "one_hot_ce": (70.0, 51.0, 50.0, 0.0)}
    tasks = {"boolq": "acc, %", "piqa": "acc, %", "race": "acc, %", "crows_pairs": "pct_stereotype, %"}
    cells = pd.DataFrame(
        {"model": "m", "criterion": name, "ratio": 0.1, "column": task, "measure": "task", "mean": value, "label": label}
        for name, values in scores.items()
        for (task, label), value in zip(tasks.items(), values, strict=True)
    )
    row = {"model": "m", "ratio": 0.1, "column": "average_without_crows", "measure": "average", "a": "entropy", "b": "one_hot_ce"}
    row |= {"verdict": "One-hot CE better", "mean": (-60 - 1) / 3}
    told = carried_by_one_task(Table("criterion", "", cells, cells, ()), pd.DataFrame([row]))
    assert told == [
        "Of the -20.3 points between the averages of Entropy (HFPrune) and One-hot CE on m at 10 %, boolq alone makes -20.0."
    ]
    undecided = pd.DataFrame([row | {"verdict": "One-hot CE better, not after Holm"}])
    assert carried_by_one_task(Table("criterion", "", cells, cells, ()), undecided) == []
    even = cells.assign(mean=cells["criterion"].map({"entropy": 40.0, "one_hot_ce": 60.0}))
    assert carried_by_one_task(Table("criterion", "", even, even, ()), pd.DataFrame([row | {"mean": -20.0}])) == []


def test_equivalence_agrees_with_the_ninety_percent_interval():
    errors = Errors(np.float64(1.0), np.float64(0.7), np.float64(2), np.float64(15), np.float64(0.7))
    reach = errors.quantile(0.95)
    assert errors.p_equivalent(0.5, 0.5 + reach) == pytest.approx(0.05, abs=1e-4)
    assert errors.bound(-0.5) == pytest.approx(0.5 + reach)
    assert errors.p_equivalent(2.0, 1.0) > 0.5 and errors.p_equivalent(0.0, 50.0) < 0.01


@pytest.mark.parametrize("n_seeds, share", [(2, 0.5), (3, 0.0), (3, 0.5), (3, 0.95), (10, 0.5)])
def test_a_true_difference_of_the_margin_is_excluded_in_five_percent(n_seeds, share):
    draws, margin = 2000, 6.0  # in standard errors: wide enough for three seeds to exclude anything at all
    values = margin + crossed(np.random.default_rng(8), (draws,), share, 0.5, n_seeds=n_seeds)
    mean, errors = estimate(values)
    rate = (errors.p_equivalent(mean, margin) < 0.05).mean()
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
    nothing = (errors.p_equivalent(mean - margin, margin) < 0.05).mean()
    assert nothing > (0.9 if n_seeds > 2 and share < 0.9 else 0.3 if n_seeds > 2 else 0), "where nothing differs it is excluded"
