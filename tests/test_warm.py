"""Warm kernels are as cold ones, but for the seconds: same surroundings, same end, and no memory of what was before."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import toys
from faults import PACKAGE, Runner

from hfprune_nb.runs import warm

pytestmark = pytest.mark.skipif(not warm.is_possible(), reason="kernels start cold here: no Linux, or a GPU")

REPORT = """\
import json, multiprocessing, os, random, signal, sys
import matplotlib.pyplot as plt, numpy, torch
import edited
shown = ("PATH", "MPLBACKEND", "PYTHONHASHSEED", "OMP_NUM_THREADS", "MARK")
facts = {name: os.environ.get(name) for name in shown} | {
    "path": sys.path, "folder": os.getcwd(), "main": __name__, "hash": hash("a"), "threads": torch.get_num_threads(),
    "leads": os.getpgid(0) == os.getsid(0) == os.getpid(), "interrupt": str(signal.getsignal(signal.SIGINT)),
    "method": multiprocessing.get_start_method(), "process": multiprocessing.current_process().name,
    "squares": multiprocessing.Pool(1).map(abs, [-1]),
}
drawn = [random.random(), numpy.random.random(), torch.rand(()).item()]
json.dump([facts, edited.VALUE, drawn, os.getpid()], open(f"{name}.json", "w"))
plt.plot([1, 2]);
"""
# Runs the notebook cold, then twice warm; the module that it imports is edited in between.
RUNS = """\
from pathlib import Path
from hfprune_nb.runs import kernel, warm
if __name__ == "__main__":
    warm.LIBRARIES[:] = ["torch", "matplotlib.pyplot", "ipykernel.kernelapp"]
    for number, name in enumerate(("cold", "warm", "warm again")):
        kernel.warm_starts = number > 0
        Path("modules/edited.py").write_text(f"VALUE = {'x' * number!r}")
        kernel.run(Path("report.ipynb"), Path(f"{name}.ipynb"), {"name": name}, {"MARK": "m"})
"""


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_warm_kernel_is_as_a_cold_one(tmp_path):
    toys.write_notebook(tmp_path / "report.ipynb", 'name: str = ""', REPORT)
    (tmp_path / "runs.py").write_text(RUNS)
    (tmp_path / "modules").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([PACKAGE, str(tmp_path / "modules")]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "runs.py"], cwd=tmp_path, env=environment, check=True)
    names = ("cold", "warm", "warm again")
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    facts, values, chances, pids = zip(*found, strict=True)
    assert facts[0]["MARK"] == "m" and facts[0]["leads"] and facts == (facts[0],) * 3
    assert values == ("", "x", "xx"), "a module that was edited is read again"
    assert len(set(pids)) == 3 and len({number for numbers in chances for number in numbers}) == 9
    cold, *others = (toys.pictures(tmp_path / f"{name}.ipynb") for name in names)
    assert len(cold) == 1 and others == [cold, cold]


def test_the_server_loads_nothing_of_the_package_and_has_one_thread():
    code = "import importlib, json, sys, threading; [importlib.import_module(name) for name in json.loads(sys.argv[1])]; "
    code += "import torch; print(threading.active_count(), torch.cuda.is_initialized(), 'hfprune_nb' in sys.modules)"
    command = [sys.executable, "-c", code, json.dumps(warm.LIBRARIES)]
    assert subprocess.check_output(command, text=True).split() == ["1", "False", "False"]


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_runner_that_is_killed_leaves_no_process(tmp_path, start):
    project = toys.write_project(tmp_path)
    hang = "import os, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
    hang += "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\ntime.sleep(600)"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=hang)
    toys.write_study(project, seeds=[0], criteria=["entropy"], run={"workers": 1, "offline": True, "warm": start == "warm"})
    process = Runner(project / "results" / "toy", HFPRUNE_HOME=str(project)).begin()
    pids = project / "notebooks" / "pids"
    while not (pids.is_file() and len(pids.read_text().split()) == 2):
        assert process.poll() is None
        time.sleep(0.2)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert {int(pid) for pid in pids.read_text().split()} < set(family)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(family) == []
