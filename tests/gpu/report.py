"""What the tier leaves behind: one JSON file with device, versions, and the outcome, seconds and errors of each test."""

import json
import subprocess
import time
from pathlib import Path

import torch

from hfprune_nb.cost import timing
from hfprune_nb.runs.provenance import surroundings


class Report:
    """A pytest plugin that writes the outcomes of the tests that run on `device` into `file`.

    What a test measures it gives to pytest's fixture `record_property`.
    """

    def __init__(self, device: str, file: Path):
        self.device, self.file, self.started, self.tests = device, file, time.perf_counter(), []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.tests.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 3),
                    "measured": dict(report.user_properties),
                    "reason": reason,
                }
            )

    def pytest_sessionfinish(self):
        made = surroundings()
        found = {
            "machine": timing.machine(self.device) | _gpus(self.device),
            "versions": made["versions"],
            "git": made["git"],
            "seconds": round(time.perf_counter() - self.started, 1),
            "tests": self.tests,
        }
        self.file.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"report: {self.file}")


def _gpus(device):
    if not device.startswith("cuda"):
        return {}
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": p.name, "capability": [p.major, p.minor], "bytes": p.total_memory} for p in properties],
    }


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
