"""One job in a worker process: its lock, its GPUs, its kernel's environment."""

import contextlib
import itertools
import os
import signal
import tempfile
import time
from pathlib import Path

from hfprune_nb.errors import UserError
from hfprune_nb.runs import kernel, stage
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.forecast import gpus_wanted
from hfprune_nb.runs.grid import Job
from hfprune_nb.runs.locks import POLL_SECONDS, Lock
from hfprune_nb.runs.study import Study

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number), "TOKENIZERS_PARALLELISM": "false"}


def become_worker(warm: bool) -> None:
    """Prepare this process for `work`: it ends with the scheduler, to which it leaves Ctrl-C; its kernels start `warm` or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.end_with_parent()
    kernel.warm_starts = warm


def arguments(study: Study, job: Job) -> tuple[Path, dict, dict[str, str], float]:
    """Return the arguments of `work` for a job."""
    environment = _threads(study.run["threads"]) | (_OFFLINE if study.run["offline"] else {})
    return study.folder / job.reference, job.parameters, environment, study.run["timeout_minutes"] * 60


def work(
    folder: Path, parameters: dict, environment: dict, timeout_seconds: float, gpus: int, wait_for_lock: bool = False
) -> tuple[str, float, str]:
    """Execute one job; return `computed`, `done`, `failed`, or `taken` by another process, its seconds and its error."""
    artifact = Artifact(folder)
    lock = stage.lock(artifact)
    try:
        if wait_for_lock:
            lock.wait()
        elif not lock.take():
            return "taken", 0.0, ""
    except OSError as failure:
        return "failed", 0.0, stage.sentence_of(failure)
    began = time.monotonic()
    state, error = "computed", ""
    try:
        if stage.is_complete(artifact):
            state = "done"
        else:
            with gpus_for(gpus, parameters) as chosen:
                stage.execute(folder.parent.name, folder.parents[1].name, parameters, environment | chosen, timeout_seconds)
    except Exception as failure:
        # Who lost the lock meanwhile, because the machine slept, leaves the job to whoever has it now.
        state, error = ("failed", stage.sentence_of(failure)) if lock.held else ("taken", "")
    finally:
        lock.release()
    return state, time.monotonic() - began, error


@contextlib.contextmanager
def gpus_for(number: int, parameters: dict):
    """Wait until as many of this machine's first `number` visible GPUs are free as a stage run with these parameters needs.

    Keeps them and yields what shows them alone to a kernel. A balanced model gets all; a run that needs none still takes one,
    so that no more run at a time than there are GPUs.
    """
    if not number:
        yield {}
        return
    needed = number if parameters.get("device") == "balanced" else max(1, gpus_wanted(parameters))
    if needed > number:
        raise UserError(f"processes {needed} are more than the {number} GPUs of --gpus: lower processes or raise --gpus.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:number] if visible else [str(slot) for slot in range(number)]
    slots = {name: Lock(Path(tempfile.gettempdir()) / "hfprune-gpus" / f".{name}.lock") for name in names}
    while len(taken := list(itertools.islice((name for name in slots if slots[name].take()), needed))) < needed:
        # Whoever waits holds nothing: two that hold a part of what they need would wait for each other.
        for name in taken:
            slots[name].release()
        time.sleep(POLL_SECONDS)
    try:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(taken)}
    finally:
        for name in taken:
            slots[name].release()
