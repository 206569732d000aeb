"""The tier for a GPU, as far as it can be held to its word without one: what it needs, what it writes, what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hfprune_nb.cost.shapes import SHAPES

PROJECT = Path(__file__).resolve().parent.parent
FOUR = ("torch", "transformers", "lm-eval[hf]", "pytest")
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def brought(requirement, seen):
    """Add to `seen` what installing a requirement brings, as (name, extras)."""
    key = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
    if key in seen:
        return seen
    seen.add(key)
    try:
        needed = metadata.requires(requirement.name) or ()
    except metadata.PackageNotFoundError:  # of another platform
        return seen
    for text in needed:
        further = Requirement(text)
        if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            brought(further, seen)
    return seen


def tier(*arguments):
    """Run the tier in a process that can import only what the four packages bring, on a CPU where a device is asked for."""
    seen = set()
    for name in FOUR:
        brought(Requirement(name), seen)
    present = {name for name, _ in seen}
    modules = metadata.packages_distributions().items()
    absent = {module for module, owners in modules if not present & set(map(canonicalize_name, owners))} - {"hfprune_nb"}
    assert {"papermill", "pypi_simple", "tenacity", "xdist", "hypothesis", "matplotlib"} <= absent
    command = [sys.executable, "-c", BARE.format(absent=absent), "-m", "cuda", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)


def test_it_is_collected_with_the_four_packages_and_nothing_else():
    answer = tier("--collect-only")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = set(re.findall(r"^tests/gpu/(test_\w+)\.py::", answer.stdout, re.MULTILINE))
    assert found == {file.stem for file in (PROJECT / "tests" / "gpu").glob("test_*.py")}
    assert set(re.findall(r"^(tests/\w+)", answer.stdout, re.MULTILINE)) == {"tests/gpu"}


def test_it_writes_what_it_found(tmp_path):
    file = tmp_path / "found.json"
    chosen = [f"tests/gpu/test_{name}.py" for name in ("scoring", "processes")]
    answer = tier(*chosen, "--device", "cpu", "--cuda-report", file, "-k", "summed_in_float32 or spread")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    outcomes = {test["test"].rpartition("::")[2].partition("[")[0]: test for test in found["tests"]}
    assert len(found["tests"]) == 4 and len(outcomes) == 2
    assert 0 < outcomes["test_logits_are_summed_in_float32"]["measured"]["error"] < 1e-5
    skipped = outcomes["test_a_model_spread_over_devices_scores_as_on_one"]
    assert skipped["outcome"] == "skipped" and "two CUDA devices" in skipped["reason"]
    assert found["machine"]["device"] == "cpu" and found["versions"]["torch"] and "commit" in found["git"]
    assert 0 < sum(test["seconds"] for test in found["tests"]) < found["seconds"]


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    answer = tier("tests/gpu/test_processes.py", "--cuda-report", tmp_path / "found.json")
    assert answer.returncode == pytest.ExitCode.USAGE_ERROR and not list(tmp_path.iterdir())
    (sentence,) = [line for line in answer.stderr.splitlines() if line.strip()]
    assert "GPU" in sentence and "--device cpu" in sentence


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed on this machine")
def test_make_gpu_runs_the_tier_and_then_the_shapes_of_the_paper():
    planned = subprocess.run(["make", "--dry-run", "gpu"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert planned.index("-m pytest -m cuda") < planned.index("-m hfprune_nb cost")
    shapes = re.search(r"for shape in (.*); do", planned).group(1).split()
    assert shapes == ["llama-3.2-1b", "llama-2-7b", "qwen2.5-7b"] and set(shapes) <= SHAPES.keys()
