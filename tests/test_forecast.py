"""The forecast: scheduling by hand-made graphs, rates that are found again, and the committed studies as they were measured."""

from datetime import datetime
from pathlib import Path

import pytest
import toys

from hfprune_nb.files import read_json
from hfprune_nb.runs import forecast, study
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.stages import STAGES

# Cards and logs of studies as they ran once: those in results/ are what the user's last run wrote.
MEASURED = sorted((Path(__file__).resolve().parent / "cards").glob("*/cards.json"))
STUDIES = Path(__file__).resolve().parent.parent / "notebooks" / "studies"


def predicted(cards, known):
    """What every run in `cards` needs by the rates `known`, and what it waits for."""
    parameters = {reference: card["parameters"] for reference, card in cards.items()}
    needs = {name: forecast.need(name.split("/")[0], values, known, parameters.get) for name, values in parameters.items()}
    depends = {
        name: tuple(r for value in values.values() for r in (value if isinstance(value, list) else [value]) if r in parameters)
        for name, values in parameters.items()
    }
    return needs, depends


@pytest.mark.parametrize(("workers", "seconds"), [(1, 12), (2, 7), (3, 6), (64, 6)])
def test_makespan_of_a_graph_by_hand(workers, seconds):
    """a 1, then b 2 and c 3 and d 4 after it, then e 2 after b and c."""
    times = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 2.0}
    depends = {"a": (), "b": ("a",), "c": ("a",), "d": ("a",), "e": ("b", "c")}
    assert forecast.makespan(times, depends, workers) == seconds


def test_finished_jobs_hold_nobody_up():
    assert forecast.makespan({"b": 2.0}, {"b": ("a",)}, 1) == 2
    assert forecast.makespan({}, {}, 1) == 0


def test_fitting_finds_the_rates_that_made_the_cards():
    known = forecast.rates()
    truth = known["devices"]["cpu"]["seconds_per_unit"] | {"scoring": 3e-11, "pruning": 4e-8, "calibration": 2.0}
    calibration = {"model": "smollm2-135m", "n_windows": 10, "seq_len": 100}
    scoring = {"model": "smollm2-135m", "calibration": "calibration/0", "criteria": ["entropy", "magnitude"], "device": "cpu"}
    parameters = {"calibration": calibration, "scoring": scoring, "pruning": {"model": "smollm2-135m", "device": "cpu"}}
    units = {"calibration": 1, "scoring": 10 * 100 * 2 * 134515008, "pruning": 134515008}
    cards = {
        f"{name}/0": {"stage": name, "parameters": values, "seconds": units[name] * truth[name], "peak_memory_bytes": 2e9}
        for name, values in parameters.items()
    }
    fitted = forecast.fit([(cards, 3.0)], known)
    assert fitted["seconds_per_unit"] == pytest.approx(truth) and fitted["startup_seconds"] == 3.0


def test_every_study_of_the_kit_has_a_forecast():
    for path in sorted(STUDIES.glob("*.yaml")):
        needs = forecast.needs(study.load(path))
        assert all(need.seconds > 0 and need.memory > 0 and need.disk > 0 for need in needs.values()), path.stem


def test_memory_counts_the_sums_of_every_weight_and_pair():
    """Scoring all criteria of offline-methods took 11 GB on SmolLM2-135M."""
    assert forecast.by_stage(study.load("offline-methods"))["scoring"]["memory"] == pytest.approx(11, rel=0.1)
    known, windows = forecast.rates(), {"n_windows": 32, "seq_len": 256}
    few, subsets = (
        STAGES["scoring"].memory({"model": "smollm2-135m", "calibration": "", "criteria": [spec]}, known, lambda _: windows)
        for spec in ("wanda", {"saap": {"subsets": 4}})
    )
    # Of gate, up and down: float64 sums of four subsets, and what two windows of 256 tokens add.
    assert subsets == pytest.approx(8 * (4 + 2) * 30 * 1536 * 3 * 576 / 1e9) and few < 0.01


def test_memory_counts_what_rounds_and_a_repair_keep():
    known, windows = forecast.rates(), {"n_windows": 32, "seq_len": 256}
    chosen = {"model": "smollm2-135m", "criteria": ["wanda", "obs"], "calibration": "windows"}
    pruning = {"model": "smollm2-135m", "scores": "scores", "criterion": "obs"}

    def memory(**changes):
        return STAGES["pruning"].memory(pruning | changes, known, {"scores": chosen, "windows": windows}.get)

    assert memory() == 0 and memory(rounds=2, criterion="wanda") < 0.01
    assert memory(compensation="flap_bias") == pytest.approx(30 * 1536**2 * 8 / 1e9)
    assert memory(rounds=2) == pytest.approx((1 + 2) * 30 * 1536**2 * 8 / 1e9)


def test_more_workers_never_take_longer_and_done_jobs_cost_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(toys.write_project(tmp_path)))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    monkeypatch.setattr(forecast, "rates", lambda: known)
    unit = dict.fromkeys(("calibration", "scoring", "pruning", "recovery", "evaluation", "figures"), 1.0)
    known = {
        "devices": {"cpu": {"startup_seconds": 3.0, "seconds_per_unit": unit, "base_gb": 1, "gb_per_billion_parameters": {}}},
        "models": {"default": 1}, "tasks": {"default": {"items": 5, "tokens": 2}}, "mlps": {"default": [1, 1, 1]},
    }  # fmt: skip
    for each in STAGES.values():
        monkeypatch.setattr(type(each), "work", lambda *_: (1, 0))
    loaded = study.load("toy")
    hours = [forecast.hours(loaded, workers) for workers in (1, 2, 8)]
    assert hours[0] * 3600 == pytest.approx(12 * 4.0) and hours == sorted(hours, reverse=True)
    monkeypatch.setattr(Artifact, "current", property(lambda self: True))
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Artifact, "card", property(lambda self: {"seconds": 1.0}))
    assert forecast.hours(loaded, 1, only_missing=True) == 0


@pytest.fixture(scope="module")
def fitted():
    """The rates as those of the measured studies."""
    cards = {path.parent.name: (read_json(path), path.with_name("run.log")) for path in MEASURED}
    known = forecast.rates()
    cpu = forecast.fit([(found, forecast.startup_seconds(found, log)) for found, log in cards.values()], known)
    return known | {"devices": known["devices"] | {"cpu": cpu}}


@pytest.mark.parametrize("cards_file", MEASURED, ids=lambda path: path.parent.name)
def test_one_set_of_rates_fits_every_measured_study(cards_file, fitted):
    """Within 30 %: the sum over all runs of a study, each as its notebook measured itself."""
    cards = read_json(cards_file)
    needs, _ = predicted(cards, fitted)
    expected = sum(need.seconds - fitted["devices"]["cpu"]["startup_seconds"] for need in needs.values())
    assert expected == pytest.approx(sum(card["seconds"] for card in cards.values()), rel=0.3)


def busy_seconds(cards):
    """Wall-clock during which at least one of the jobs was computed: a pause between two runs does not count."""
    spans = sorted((datetime.fromisoformat(c["started"]), datetime.fromisoformat(c["finished"])) for c in cards.values())
    busy, until = 0.0, spans[0][0]
    for began, ended in spans:
        busy += max(0.0, (ended - max(began, until)).total_seconds())
        until = max(until, ended)
    return busy


def test_the_measured_offline_study_took_as_long_as_predicted(fitted):
    """Within 30 %, two jobs at a time."""
    cards = read_json(next(path for path in MEASURED if path.parent.name == "offline"))
    needs, depends = predicted(cards, fitted)
    assert 3600 * forecast.total(needs, depends, workers=2) == pytest.approx(busy_seconds(cards), rel=0.3)


@pytest.mark.parametrize(("hours", "words"), [(0.5, "30 min"), (3.2, "3 h"), (72, "3.0 days")])
def test_durations_in_words(hours, words):
    assert forecast.in_words(hours) == words


@pytest.mark.parametrize(("here", "says"), [("A, avx2, 2 cores", False), ("B, amx_bf16, 64 cores", True)])
def test_a_plan_says_when_its_rates_are_another_machines(here, says, monkeypatch):
    monkeypatch.setattr(forecast, "processor", lambda: here)
    monkeypatch.setattr(forecast, "rates", lambda: {"devices": {"cpu": {"processor": "A, avx2, 2 cores"}, "gpu": {}}})
    sentence = forecast.elsewhere("cpu")
    assert (here in sentence and "A, avx2, 2 cores" in sentence) if says else sentence == ""
    assert forecast.elsewhere("gpu") == ""
