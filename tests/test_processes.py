"""Processes that share one request: they end with the one that launched them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PACKAGE = str(Path(__file__).resolve().parent.parent)
WORKER = """
import os, sys, time
from pathlib import Path
from hfprune_nb import processes

folder = Path(sys.argv[1])
with processes.member(folder) as rank:
    (folder / f"{rank}.partial").write_text(str(os.getpid()))
    (folder / f"{rank}.partial").rename(folder / f"{rank}.pid")
    time.sleep(120)
"""
LAUNCHER = "import pathlib, sys; from hfprune_nb import processes; processes.launch('worker', pathlib.Path(sys.argv[1]), 2)"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX feature")
def test_processes_end_with_a_launcher_that_was_killed(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([PACKAGE, str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", LAUNCHER, tmp_path], env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2 or parent.poll() is not None)
    started = psutil.Process(parent.pid).children(recursive=True)
    assert {int(path.read_text()) for path in tmp_path.glob("*.pid")} < {process.pid for process in started}
    parent.kill()
    parent.wait()
    left = psutil.wait_procs(started, timeout=60)[1]
    assert left == []
