"""The doctor: what it finds wrong, and that it says what to do; machines are made up."""

import os
from pathlib import Path

import pytest

from hfprune_nb.cli import doctor
from hfprune_nb.cli.main import main
from hfprune_nb.cost import timing
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets, hub
from hfprune_nb.runs import study

REQUIRED = ["torch>=2.8", "lm-eval==0.4.13", 'pytest; extra == "dev"']
LOCK = "# pins\ntorch==2.13.0\nlm_eval==0.4.13\n"


@pytest.mark.parametrize(
    ("installed", "state", "words"),
    [
        ({"torch": "2.13.0+cpu", "lm_eval": "0.4.13"}, "ok", "all 2 are there, in the versions of the lock"),
        ({"torch": "2.14.0", "lm_eval": "0.4.13"}, "note", "torch 2.14.0 (lock: 2.13.0)"),
        ({"torch": "2.7.1", "lm_eval": "0.4.13"}, "wrong", "torch 2.7.1: `make setup`"),
        ({"torch": "2.13.0"}, "wrong", "lm-eval is missing"),
    ],
)
def test_packages_are_held_against_requirements_and_lock(installed, state, words):
    found = doctor.packages(REQUIRED, installed, LOCK)
    assert found.state == state and words in found.words


def test_an_old_python_is_wrong():
    assert doctor.python((3, 10)).state == "wrong" and doctor.python((3, 12)).state == "ok"


def test_a_folder_that_cannot_be_written_names_its_variable(tmp_path, monkeypatch):
    (fine,) = doctor.folders({"results": tmp_path / "not" / "yet"})
    assert fine.state == "ok" and "GB free" in fine.words
    monkeypatch.setattr(os, "access", lambda *_: False)
    (refused,) = doctor.folders({"results": tmp_path})
    assert refused.state == "wrong" and "HFPRUNE_RESULTS" in refused.words


@pytest.mark.parametrize(("rate", "state"), [(6e8, "note"), (2e11, "ok")])
def test_a_processor_without_units_for_bfloat16_is_told(rate, state):
    found = doctor.speed({"bfloat16": rate, "float32": 6e10}, "CPU")
    assert found.state == state and ("keep dtype float32" in found.words) == (state == "note")


@pytest.mark.parametrize(
    ("room", "state", "words"), [(100.0, "ok", "fits: at most"), (0.8, "note", "--workers 1"), (0.1, "note", "does not fit: ")]
)
def test_a_study_fits_or_not(room, state, words):
    found = doctor.study("smoke", study.load("smoke"), room)
    assert found.state == state and words in found.words


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    asked = []

    def unreachable(name, path):
        asked.append(name)
        raise UserError(f"model '{name}' is not cached and the hub is out of reach: connect once, or give a local path.")

    monkeypatch.setattr(hub, "file", unreachable)
    monkeypatch.setattr(hub, "has_token", lambda: False)
    token, only = doctor.access({"b/b", "a/a"})
    assert token.state == only.state == "note" and asked == ["a/a"] and "hf auth login" in token.words


def test_a_gated_model_does_not_hide_the_others(monkeypatch):
    def gated(name, path):
        if name == "a/a":
            raise UserError("model 'a/a' is gated and your token has no access: accept its licence.")
        return Path(path)

    monkeypatch.setattr(hub, "file", gated)
    monkeypatch.setattr(hub, "has_token", lambda: True)
    assert [found.state for found in doctor.access({"b/b", "a/a"})] == ["ok", "note", "ok"]


@pytest.mark.parametrize(("version", "status", "last"), [("2.13.0", 0, "nothing is wrong"), ("2.0", 1, "1 things are wrong")])
def test_the_exit_status_says_whether_something_is_wrong(version, status, last, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: [f"torch=={version}"])
    monkeypatch.setattr(timing, "matmul_peak", lambda device: {"bfloat16": 1e9, "float32": 1e11})
    monkeypatch.setattr(assets, "is_cached", lambda name: name == "smollm2-135m")
    monkeypatch.setattr(doctor, "_studies", lambda: {"smoke": study.load("smoke")})
    assert main(["doctor", "--no-hub"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last and all(line.split()[0] in ("ok", "note", "wrong") for line in lines[:-1])
    if not status:
        assert any(line.startswith("ok     smoke") for line in lines) and any("cached: smollm2-135m" in line for line in lines)
