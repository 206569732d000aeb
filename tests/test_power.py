"""The power plan: designs reach their power in simulated studies, costs follow the rates, the command plans from artifacts."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import synthetic

from hfprune_nb.cli import main
from hfprune_nb.errors import UserError
from hfprune_nb.inputs.calibration import Windows
from hfprune_nb.report import power
from hfprune_nb.report.intervals import estimate
from hfprune_nb.report.results import collect, columns
from hfprune_nb.runs import artifacts, forecast, lineage, parameters

matplotlib.use("Agg")
MODEL = "smollm2-135m"
COSTS = power.Costs(
    fixed=0.001, seed=0.04, window=3e-5, item=dict.fromkeys([*synthetic.TASKS, "crows_pairs_english"], 2e-5), models=3
)


def asked(seed=0.02, item=(1.0,), rest=(2.0,), most=10_000, family=1, costs=COSTS):
    variances = power.Variances(seed, np.array(item), np.array(rest))
    return power.Question(variances, 4 * seed, costs, (), np.full(len(item), most), family)


def found_in(question, design, detect, draws=1500):
    """Return how often studies of this design with a true difference `detect` find it."""
    seeds, n = design
    rng, v, groups = np.random.default_rng(7), question.variances, len(question.variances.item)
    # The parts of the groups' means, each group's items on the scale of the group itself.
    item, rest = (np.repeat(np.sqrt(part) * groups, n) for part in (v.item, v.rest))
    values = detect + rng.normal(0, np.sqrt(v.seed), (draws, seeds, 1)) + rng.normal(0, 1, (draws, 1, n * groups)) * item
    values = values + rng.normal(0, 1, (draws, seeds, n * groups)) * rest
    mean, errors = estimate(values, groups=list(np.arange(n * groups).reshape(groups, n)))
    return (errors.p_value(mean) < 0.05 / question.family).mean()


@pytest.mark.parametrize(
    "parts, detect",
    [
        ({"seed": 0.02}, 0.5),
        ({"seed": 0.0, "family": 3}, 0.5),
        ({"seed": 0.2, "item": (0.1,), "rest": (0.5,)}, 0.6),
        ({"seed": 0.01, "item": (0.1, 0.4, 0.0), "rest": (0.5, 0.2, 0.3)}, 0.5),
    ],
)
def test_proposed_designs_reach_eighty_percent(parts, detect):
    question = asked(**parts)
    design = question.cheapest(detect)
    # The noncentral t stands for a sum of two; Monte Carlo adds three hundredths.
    assert 0.73 <= found_in(question, design, detect) <= 0.85, design


def test_no_neighbour_of_the_cheapest_design_is_cheaper_and_finds_as_much():
    question = asked()
    seeds, n = question.cheapest(0.3)
    assert question.detectable(seeds, n) <= 0.3 < question.detectable(seeds, n - 1)
    for other in (seeds - 1, seeds + 1):
        few = next((m for m in range(2, 4000, 20) if question.detectable(other, m) <= 0.3), 4000) - 20
        assert question.hours(other, few) >= question.hours(seeds, n - 20)


def test_what_costs_more_is_used_less():
    plain = asked().cheapest(0.3)
    dear_seeds = asked(costs=power.Costs(0.001, 4.0, 3e-5, {}, 3)).cheapest(0.3)
    dear_items = asked(costs=power.Costs(0.001, 0.04, 3e-2, {}, 3)).cheapest(0.3)
    assert dear_seeds[0] < plain[0] < dear_items[0] and dear_seeds[1] > plain[1] > dear_items[1]


def test_seeds_alone_cannot_replace_items_nor_items_seeds():
    assert asked(item=(1.0,), most=20).cheapest(0.1) is None
    assert asked(seed=1.0, most=100_000).cheapest(0.5)[0] > (2.8 / 0.5) ** 2
    assert asked(seed=1.0).seeds_for(0.5) > (2.8 / 0.5) ** 2


def test_a_prudent_design_takes_more_seeds():
    question = asked()
    assert question.prudent().cheapest(0.3)[0] > question.cheapest(0.3)[0]


def test_the_prudent_variance_is_above_the_true_one_in_four_of_five_studies():
    by_seed = np.random.default_rng(3).normal(0, 0.5, (4000, 3, 3))  # studies, criteria, seeds
    pairs = [by_seed[:, a] - by_seed[:, b] for a, b in ((0, 1), (0, 2), (1, 2))]
    spread = np.mean([pair.var(axis=-1, ddof=1) for pair in pairs], axis=0)
    assert np.mean(power.spread_limit(spread, (3 - 1) * (3 - 1)) > 2 * 0.5**2) == pytest.approx(0.8, abs=0.02)


def test_variances_are_those_of_the_study(tmp_path):
    results = collect(synthetic.study(tmp_path, synthetic.THREE, (0.2,), seeds=(0, 1, 2, 3), n_items=20))
    wanted = {column.name: column for column in columns(results, MODEL)}
    windows = power.question(results, MODEL, 0.2, wanted["kl:c4"], COSTS)
    assert windows.family == 3 and windows.available.tolist() == [power.MOST_WINDOWS] and windows.tasks == ()
    average = power.question(results, MODEL, 0.2, wanted["average"], COSTS, family=9)
    assert average.tasks == tuple(sorted(synthetic.TASKS)) and average.family == 9
    assert len(average.variances.item) == 4 and average.available.tolist() == [1000] * 4
    table = power.power_table(results, {MODEL: COSTS}, {"average": 5.0, "perplexity": 0.01, "js": 0.003})
    rows = table.long.set_index(["measure", "design"])
    assert rows.loc[("js", "today"), ["seeds", "items"]].tolist() == [4, 30]
    assert rows.loc[("average", "today"), ["seeds", "items"]].tolist() == [4, 20]
    cheapest = table.long[table.long["design"] == "cheapest"].dropna(subset="hours")
    assert len(cheapest) and (cheapest["detectable"] <= cheapest["detect"]).all()
    fewer = rows.loc[("average", "fewer tasks")] if ("average", "fewer tasks") in rows.index else None
    assert fewer is None or fewer["hours"] < rows.loc[("average", "cheapest"), "hours"]
    assert "calibration seeds" in power.paper_sentence(table, MODEL) and "can be found today" in power.power_sentence(
        table, MODEL
    )
    figure = power.power_figure(results, {MODEL: COSTS}, table, MODEL)
    assert [ax.get_xlabel() for ax in figure.axes] == ["hours"] * 3
    with pytest.raises(UserError, match="ratio 0.4: no model was pruned"):
        power.power_table(results, {MODEL: COSTS}, ratio=0.4)
    assert power.power_table(None, {}).display.empty and "no design" in power.power_sentence(power.power_table(None, {}), MODEL)


def chain(study, n_items=20):
    """Write a study's evaluations with what they were made from, as finished artifacts; return those of the evaluations."""

    def put(stage, key, inputs, make=None, **given):
        writer = artifacts.Writer(study / stage / f"{key:016x}")
        (make or (lambda to: to.mkdir(parents=True)))(writer.partial)
        values = parameters.complete(stage, given)
        card = {"stage": stage, "parameters": values, "seconds": 5000.0, "peak_memory_bytes": 1e9, "versions": {}}
        return writer.finish(values, dict.fromkeys(inputs, ""), card)

    made = [put("evaluation", 99, [], lambda to: synthetic.evaluation(to, n_items=n_items), device="cpu")]
    for seed in (0, 1, 2):
        # Each seed has a document of the one before, whose window begins 128 tokens later.
        text = Windows(np.zeros((2, 256)), [f"{seed}", f"{seed + 1}"], [0, 128], [900, 900])
        windows = put("calibration", seed, [], text.save, seed=seed)
        given = {"calibration": windows.reference, "criteria": list(synthetic.THREE), "device": "cpu"}
        scores = put("scoring", seed, [windows.reference], **given)
        for i, name in enumerate(synthetic.THREE):
            given = {"scores": scores.reference, "criterion": name, "ratio": 0.2, "device": "cpu"}
            pruned = put("pruning", 10 * seed + i, [scores.reference], **given)
            given = {"pruned": pruned.reference, "device": "cpu", "tasks": [*synthetic.TASKS]}
            inputs = [pruned.reference, made[0].reference]
            write = lambda to, n=name, s=seed: synthetic.evaluation(to, n, 0.2, s, n_items=n_items)  # noqa: E731
            made.append(put("evaluation", 10 * seed + i, inputs, write, **given))
    return made


def test_seeds_say_how_much_text_they_share(tmp_path):
    made = chain(tmp_path / "study")
    assert "share 33 % of their documents and 16.7 % of their tokens (mean of 3 pairs)" in lineage.shared_text(made)
    assert lineage.shared_text(made[:1]) == "", "the dense model has no calibration text"


def test_hours_are_those_of_the_forecast(tmp_path):
    made = chain(tmp_path / "study")
    found = lineage.lineage(made)
    assert len(found) == 10 + 9 + 3 + 3
    spent = lineage.hours(made)
    assert (
        set(spent) == {"evaluation", "pruning", "scoring", "calibration"} and list(spent.values()) == sorted(spent.values())[::-1]
    )
    assert forecast.in_words(sum(spent.values())) in lineage.cost_sentence(made)
    costs = power.Costs(**lineage.unit_hours(made, MODEL, synthetic.THREE))
    one, known = made[1].parameters, forecast.rates()
    every = {reference: artifact.parameters for reference, artifact in found.items()}
    seconds = forecast.need(
        "evaluation", one | {"tasks": [], "perplexity_corpora": ["c4-sample"]}, known, every.__getitem__
    ).seconds
    start = known["devices"]["cpu"]["startup_seconds"]
    assert costs.window * one["n_windows"] * 3600 + start == pytest.approx(seconds)
    assert costs.hours(2, 10) - costs.hours(1, 10) == pytest.approx(costs.seed + 3 * 10 * costs.window)
    assert costs.hours(2, items={"boolq": 5}) == pytest.approx(costs.hours(2) + 7 * 5 * costs.item["boolq"])
    own = power.Costs(**lineage.unit_hours(made, MODEL, synthetic.THREE, own=True))
    assert own.seed > costs.seed and own.window != costs.window, "5,000 seconds for every job, more than by any rates"
    assert (
        lineage.unit_hours(made, "other", synthetic.THREE) is None
        and lineage.unit_hours(made[:1], MODEL, synthetic.THREE) is None
    )


def test_the_command_plans_from_what_is_finished(tmp_path, monkeypatch, capsys):
    made = chain(tmp_path / "offline")

    jobs = [SimpleNamespace(stage="evaluation", reference=artifact.reference) for artifact in made]
    loaded = SimpleNamespace(name="offline", folder=tmp_path / "offline", run={"workers": 2}, jobs=jobs)
    monkeypatch.setattr("hfprune_nb.cli.study._load", lambda options: loaded)
    assert main.main(["study", "power", "offline", "--detect", "5", "--detect-js", "0.003"]) == 0
    said = capsys.readouterr().out
    assert "cheapest" in said and "whole test sets" in said and "calibration seeds" in said and "log-perplexity" not in said
    loaded.jobs = []
    assert main.main(["study", "power", "offline"]) == 2 and "no finished evaluation yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["study", "power", "offline", "--detect", "0"])
    assert "must be a number above 0" in capsys.readouterr().err
