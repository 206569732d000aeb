"""Studies in processes of their own that can be killed, and what must hold of them afterwards."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from hfprune_nb.runs.artifacts import Artifact

COMMAND = [sys.executable, "-c", "import sys; from hfprune_nb.cli.main import main; sys.exit(main())"]
PACKAGE = str(Path(__file__).resolve().parent.parent)
LEFTOVER = re.compile(r"\.(partial|old|new|lock|scratch|progress\.json|running\.ipynb|failed\.ipynb)$")


class Runner:
    """A study whose commands run in processes of their own; `changes` are those of their environment."""

    def __init__(self, folder: Path, **changes: str):
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": PACKAGE, "HFPRUNE_RESULTS": str(folder.parent)} | changes

    def begin(self, *arguments):
        command = [*COMMAND, "study", *(arguments or ("run",)), self.folder.name]
        return subprocess.Popen(
            command, env=self.environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments, timeout=900):
        process = self.begin(*arguments)
        said, _ = process.communicate(timeout=timeout)
        return process.returncode, said

    def exported(self):
        """The bytes of every exported table and figure."""
        files = [path for kind in ("tables", "figures") for path in (self.folder / kind).glob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def digests(self):
        return {artifact.reference: artifact.digest for artifact in map(Artifact, self.sealed())}

    def sealed(self):
        """When each artifact was finished."""
        return {done.parent: done.stat().st_mtime_ns for done in self.folder.glob("*/*/DONE")}

    def events(self, kind):
        lines = [line for path in self.folder.glob("log/*.jsonl") for line in path.read_text().splitlines()]
        return Counter(event.get("job") for event in map(json.loads, lines) if event["event"] == kind)

    def leftovers(self):
        return [path.name for path in self.folder.rglob("*") if LEFTOVER.search(path.name)]


def same(study: Runner, undisturbed: Runner):
    """Assert that a study ended as the undisturbed one did, and that nothing is left of what disturbed it."""
    assert study.exported() == undisturbed.exported() != {}
    assert study.digests() == undisturbed.digests()
    assert study.leftovers() == []


def kill_and_resume(study: Runner, undisturbed: Runner, moments: int, longest: float, seed: int):
    """Kill the runner's process group so many times, each within `longest` seconds, begin anew if it finished, resume at last."""
    chance, survived = random.Random(seed), 0
    while survived < moments:
        process = study.begin()
        time.sleep(chance.uniform(0.5, longest))
        if process.poll() is None:
            survived += 1
            os.killpg(process.pid, signal.SIGKILL)
        elif process.returncode == 0:
            same(study, undisturbed)
            shutil.rmtree(study.folder)
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
    status, said = study.run()
    assert status == 0, said
    same(study, undisturbed)
