"""The stages as a family: a new one is one file and its notebook, and everything that lists stages has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys

PACKAGE = Path(__file__).resolve().parent.parent / "hfprune_nb"
STAGE = '''
"""Stage 10: how far scores move under noise."""

from hfprune_nb.errors import UserError
from hfprune_nb.runs.stages.base import Input, Stage


class Robustness(Stage):
    name = "robustness"
    notebook = "10_robustness.ipynb"
    inputs = {"scores": Input("scoring", passes=("model", "seed"))}
    section = "robustness"
    axes = {"noises": "noise"}
    exported = True

    def check(self, values):
        if values["noise"] < 0:
            raise UserError("noise must not be negative")

    def work(self, parameters, known, ancestor):
        return 7, 11
'''
ROBUSTNESS = (
    'study: str = "toy"\nmodel: str = "tiny"\nscores: str = ""\nnoise: float = 0.1\ndraws: int = 4\nseed: int = 0',
    "(read(run.inputs['scores']), noise)",
)


@pytest.fixture
def project(tmp_path):
    """A toy project, and a package that has one file more."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "package" / "hfprune_nb", ignore=ignored)
    (tmp_path / "package" / "hfprune_nb" / "runs" / "stages" / "robustness.py").write_text(STAGE)
    project = toys.write_project(tmp_path / "project")
    toys.write_stage(project, "robustness", "10_robustness.ipynb", ROBUSTNESS)
    return project


def hfprune(project, *arguments):
    environment = os.environ | {"PYTHONPATH": str(project.parent / "package"), "HFPRUNE_HOME": str(project)}
    environment.pop("HFPRUNE_RESULTS", None)
    command = [sys.executable, "-m", "hfprune_nb", "study", *arguments]
    answer = subprocess.run(command, env=environment, cwd=project, capture_output=True, text=True)
    return answer.returncode, answer.stdout + answer.stderr


def test_a_new_stage_is_checked_planned_forecast_and_in_the_graph(project):
    toys.write_study(project, robustness={"draws": 2}, noises=[0.1, 0.5])
    status, said = hfprune(project, "graph", "toy")
    jobs = [job for job in json.loads(said)["jobs"] if job["stage"] == "robustness"]
    assert status == 0 and [job["point"] for job in jobs] == [
        f"tiny, seed {seed}{noise}" for noise in ("", ", noise 0.5") for seed in (0, 1)
    ]
    assert all(job["needs"][0].startswith("scoring/") for job in jobs)
    status, said = hfprune(project, "plan", "toy")
    (row,) = [line.split() for line in said.splitlines() if line.split()[0] == "robustness"]
    assert status == 0 and row[1:3] == ["4", "0"]
    for changes, sentence in (
        ({"robustnes": {}}, "unknown key 'robustnes', did you mean 'robustness'"),
        ({"robustness": {"draw": 2}}, "did you mean 'draws'"),
        ({"robustness": {"scores": "x"}}, "robustness.scores is set by the grid"),
        ({"robustness": {}, "noises": [-1.0]}, "noise must not be negative"),
    ):
        toys.write_study(project, **changes)
        status, said = hfprune(project, "plan", "toy")
        assert status == 2 and sentence in said and said.count("\n") == 1


def test_a_new_stage_is_left_out_of_studies_without_its_section(project):
    status, said = hfprune(project, "status", "toy")
    assert status == 0 and "12 jobs: 12 waiting" in said and "robustness" not in said
