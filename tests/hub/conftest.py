"""The stand-in, filled once, and processes of Python that see it as the hub."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hub import contents, server

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def filled():
    hub = contents.fill(server.Hub()).start()
    for name in contents.DATA_SETS:  # models are made when they are asked for
        hub.repository("dataset", name)
    yield hub
    hub.stop()


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """The folder of the caches and results of a user of the stand-in."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="session")
def environment(filled, everything):
    """The environment of that user; no token but what a test sets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HFPRUNE_"))}
    return kept | {
        "HF_ENDPOINT": filled.endpoint,
        "HF_HOME": str(everything / "hf"),
        "HFPRUNE_HOME": str(PROJECT),
        "HFPRUNE_CACHE": str(everything / "cache"),
        "HFPRUNE_RESULTS": str(everything / "results"),
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="session")
def process(environment):
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.stdin.close()


@pytest.fixture
def hub(filled):
    filled.heal()
    return filled


@pytest.fixture
def forget(everything):
    """A function that empties all caches."""
    return lambda: [shutil.rmtree(everything / name, ignore_errors=True) for name in ("hf", "cache", "results")]


@pytest.fixture
def answer(hub, process, forget):
    """Return a function that runs code in a process of its own and returns its variable `answer`; caches are empty at first.

    `said(function, ...)` gives a refusal's sentence; a busy hub is asked for `patience` seconds.
    """
    forget()

    def run(code, token="", offline=False, patience=20):
        job = {"code": textwrap.dedent(code), "token": token, "offline": offline, "patience": patience}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        told = list(iter(process.stdout.readline, "end\n"))
        found = json.loads(told[-1])
        assert "error" not in found, found["error"]
        return found["answer"]

    return run
