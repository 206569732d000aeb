"""What is left of a run, on a clock of the test's own, and how a person is told."""

import io
import json
import logging
import sys
import time

import pytest

from hfprune_nb import machine
from hfprune_nb.runs import display
from hfprune_nb.runs.outlook import Outlook

SECONDS = {"scoring/a": 100.0, "scoring/b": 100.0, "evaluation/a": 50.0, "evaluation/b": 50.0, "figures/all": 10.0}
DEPENDS = {
    "scoring/a": (),
    "scoring/b": (),
    "evaluation/a": ("scoring/a",),
    "evaluation/b": ("scoring/b",),
    "figures/all": ("evaluation/a", "evaluation/b"),
}


class Clock:
    """Time that passes when the test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def outlook(clock):
    return Outlook(SECONDS, DEPENDS, 1, clock)


def test_before_anything_ran_the_forecast_stands(outlook):
    assert outlook.left() == sum(SECONDS.values()) and outlook.share() == 0


def test_time_passes_while_a_job_runs(outlook, clock):
    outlook.start("scoring/a")
    clock.now += 60
    assert outlook.left() == 250 and outlook.share() == pytest.approx(60 / 310)


def test_a_stage_takes_the_pace_of_its_finished_jobs_and_others_that_of_all(outlook):
    """A machine on which scoring takes four times its forecast and evaluation twice."""
    outlook.end("scoring/a", 400.0)
    assert outlook.left() == 4 * (100 + 50 + 50 + 10)
    outlook.end("evaluation/a", 100.0)
    everything = (400 + 100) / (100 + 50)
    assert outlook.left() == pytest.approx(4 * 100 + 2 * 50 + everything * 10)
    assert outlook.share() == pytest.approx(500 / (500 + outlook.left()))


def test_a_job_that_overruns_corrects_the_rest_before_it_ends(outlook, clock):
    outlook.start("scoring/a")
    clock.now += 300
    assert outlook.left() == 3 * (100 + 50 + 50 + 10)


def test_what_a_running_job_says_is_left_is_believed(outlook, clock):
    outlook.start("scoring/a")
    clock.now += 90
    assert outlook.left({"scoring/a": 70.0}) == 70 + 100 + 50 + 50 + 10


def test_failed_and_skipped_jobs_leave_the_rest_without_a_say_in_the_pace(outlook):
    outlook.end("scoring/a")
    outlook.end("evaluation/a")
    assert outlook.left() == 160 and outlook.share() == pytest.approx(150 / 310)


def test_a_job_that_somebody_else_took_waits_again(outlook, clock):
    outlook.start("scoring/a")
    clock.now += 50
    outlook.again("scoring/a")
    assert outlook.left() == 310


def test_two_workers_share_what_is_left(clock):
    assert Outlook(SECONDS, DEPENDS, 2, clock).left() == 100 + 50 + 10


def test_all_done_is_all(outlook):
    for name in SECONDS:
        outlook.end(name, 1.0)
    assert outlook.share() == 1 and outlook.left() == 0


@pytest.fixture
def running(tmp_path):
    file = tmp_path / "progress.json"
    told = {"what": "scoring", "n": 250, "total": 1000, "unit": "tok", "rate": 5.0, "time": time.time()}
    file.write_text(json.dumps(told), encoding="utf-8")
    return {"scoring/a": ("scoring tiny, seed 0", file)}


def test_a_log_has_a_line_a_minute_while_something_runs(outlook, clock, running, caplog):
    caplog.set_level(logging.INFO, "hfprune_nb.runs")
    with display.Display("toy", 5, 1, False, clock) as shown:
        shown.show(outlook, 0, 0, {})
        assert not caplog.messages
        outlook.start("scoring/a")
        for _ in range(25):
            shown.show(outlook, 1, 0, running)
            clock.now += 5
    assert len(caplog.messages) == 3  # at 0, 60 and 120 s
    first = caplog.messages[0]
    assert first.startswith("toy: 0%, 1/5 jobs, about 6 min left; scoring tiny, seed 0 (scoring 25%, 5 tok/s, 2 min left")


def test_a_terminal_has_a_bar_for_the_run_and_one_for_each_job(outlook, running, capsys):
    outlook.end("scoring/b", 100.0)
    outlook.start("scoring/a")
    with display.Display("toy", 5, 2, True) as shown:
        shown.show(outlook, 1, 1, running)
    said = capsys.readouterr().err
    assert "toy:  28%|" in said and "1/5 jobs, 1 failed, about 4 min left" in said
    assert "scoring tiny, seed 0:  25%|" in said and "5 tok/s, 2 min left" in said


def test_plain_text_is_asked_for_by_the_environment(outlook, running, monkeypatch):
    monkeypatch.setenv("HFPRUNE_PROGRESS", "log")
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    with display.Display("toy", 5, 1, True) as shown:
        shown.show(outlook, 1, 0, running)
    assert said.getvalue().count("\n") == 1 and "|" not in said.getvalue()


def test_the_processor_is_named_with_its_units(tmp_path):
    described = tmp_path / "cpuinfo"
    described.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_bf16\n", encoding="utf-8")
    assert machine.processor(described).startswith("Some CPU, amx_bf16, ")
    assert machine.processor(tmp_path / "none").endswith(" cores")
