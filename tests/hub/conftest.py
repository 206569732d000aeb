"""The stand-in, filled once, and fresh processes of Python that see it as the hub."""

import json
import os
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
    yield hub
    hub.stop()


@pytest.fixture
def hub(filled):
    filled.heal()
    return filled


@pytest.fixture
def home(tmp_path):
    """An empty cache of the clients, of the kit, and no results."""
    return tmp_path / "home"


@pytest.fixture
def environment(hub, home):
    """The environment of a user whose hub is the stand-in; no token but what a test sets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HFPRUNE_"))}
    return kept | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "hf"),
        "HFPRUNE_HOME": str(PROJECT),
        "HFPRUNE_CACHE": str(home / "cache"),
        "HFPRUNE_RESULTS": str(home / "results"),
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


@pytest.fixture
def answer(environment):
    """Return a function that runs code in a fresh process and returns its variable `answer`; `said` is the error, if any.

    The code runs with `patience` seconds for a busy hub, half a second for one that never answered.
    """

    def run(code, token="", offline=False, patience=20):
        settings = {"HF_TOKEN": token} if token else {}
        settings |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        program = f"""
import json, sys
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
hub.PATIENCE, hub.SHORT_PATIENCE, hub.TIMEOUT = {patience}, 0.4, 3.0
def said(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except UserError as error:
        return str(error)
{textwrap.dedent(code)}
sys.stdout.write("\\n" + json.dumps(answer))
"""
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | settings, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
