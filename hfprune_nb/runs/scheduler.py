"""Running a study: what is missing or stale is computed, ready jobs first, several at a time, and what it did is written down."""

import contextlib
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.machine import processor
from hfprune_nb.runs import export, forecast, kernel, stage
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.display import Display
from hfprune_nb.runs.grid import Job, find_job, plan, without
from hfprune_nb.runs.locks import POLL_SECONDS, Lock
from hfprune_nb.runs.outlook import Outlook
from hfprune_nb.runs.stages import STAGES
from hfprune_nb.runs.status import Outcome, Summary, is_finished, status
from hfprune_nb.runs.study import Study
from hfprune_nb.runs.worker import arguments, become_worker, work

log = logging.getLogger(__name__)

SHOW_SECONDS = 5.0


def run(study: Study, workers: int | None = None, progress: bool = True, gpus: int = 0) -> Summary:
    """Compute what is missing or stale, `workers` notebooks at a time, export the results, and return what happened.

    With `gpus` as many notebooks run at a time, if `workers` does not say otherwise, each on GPUs of its own.

    A job that fails leaves its notebook; jobs that depend on it are skipped and the others go on. An interrupt stops
    the kernels before it is passed on.
    """
    summary = _work_through(study, plan(study), workers, progress, gpus)
    _export(study, summary.outcomes)
    return summary


def _work_through(study: Study, jobs: list[Job], workers: int | None, progress: bool, gpus: int = 0) -> Summary:
    began = time.monotonic()
    journal = _Journal(study)
    workers = workers or gpus or study.run["workers"]
    with Display(study.name, len(jobs), workers, progress) as display:
        outcomes = _Scheduler(study, workers, display, journal, gpus).work_through(jobs)
    summary = Summary(study, outcomes, time.monotonic() - began)
    _sweep(study, outcomes)
    if summary.count("done") < len(outcomes):
        states = {state: summary.count(state) for state in ("computed", "done", "failed", "skipped")}
        journal.tell(summary.text().splitlines()[-1], event="end", seconds=round(summary.seconds, 3), **states)
    return summary


def _export(study: Study, outcomes: list[Outcome]) -> None:
    """Export what is finished, unless the last job, which sums up all others, has no result."""
    finished = [outcome.job for outcome in outcomes if outcome.state in ("done", "computed")]
    if outcomes[-1].state in ("done", "computed") and not export.is_exported(study, finished):
        with Lock(study.folder / ".export.lock"):
            export.write(study, finished)


def run_job(study: Study, reference: str, gpus: int = 0) -> Outcome:
    """Compute one job, waiting for whoever computes it already; `done` when nothing was left to do.

    This is what a workflow engine calls for each job. Raises UserError when an input of the job is not finished.
    """
    job = find_job(study, reference)
    if is_finished(study, job):
        return Outcome(job, "done")
    if missing := [name for name in job.depends_on if not Artifact(study.folder / name).current]:
        raise UserError(f"{reference} needs {missing[0]}, which is not finished: run that job first")
    state, seconds, error = work(*arguments(study, job), gpus, wait_for_lock=True)
    outcome = Outcome(job, state, seconds, error)
    _Journal(study).settle(outcome)
    return outcome


def verify(study: Study, repair: bool = True, workers: int | None = None, progress: bool = False) -> tuple[list, Summary | None]:
    """Hash every file of every finished artifact; return (job, what is wrong) of the corrupt ones and how repairing went.

    With `repair` the corrupt ones are deleted and computed again, and after them those finished jobs whose inputs have
    other bytes now. Jobs that were never finished, or that run at the moment, are left alone.
    """
    jobs = [job for job in plan(study) if (study.folder / job.reference).is_dir()]
    jobs = [job for job in jobs if not stage.lock(Artifact(study.folder / job.reference)).taken()]
    corrupt = [(job, wrong) for job in jobs if (wrong := _corruption(Artifact(study.folder / job.reference)))]
    if not corrupt or not repair:
        return corrupt, None
    broken = {job.reference for job, _ in corrupt}
    jobs = [job for job in jobs if job.reference in broken or is_finished(study, job)]
    for reference in broken:
        shutil.rmtree(study.folder / reference)
    summary = _work_through(study, jobs, workers, progress)
    outcomes = status(study)
    if all(outcome.state == "done" for outcome in outcomes):
        _export(study, outcomes)
    return corrupt, summary


def _corruption(artifact: Artifact) -> str:
    """Return what is wrong with a finished artifact in one sentence; empty when every byte is as it was written."""
    try:
        artifact.check()
        read_json(artifact.path("notebook.ipynb"))
    except UserError as error:
        return str(error).split(":")[0]
    except (OSError, ValueError):
        return f"the notebook of {artifact.reference} is lost or unreadable"
    return ""


def removable(folder: Path, everything: bool = False) -> list[Path]:
    """Return what `clean` would delete of a study's results: artifacts and notebooks of all stages, or the whole folder."""
    if everything:
        return [folder] if folder.is_dir() else []
    # Exported pictures share a folder with the artifacts of the figures stage, so that folder itself stays.
    entries = [path for name in STAGES for path in sorted((folder / name).glob("*"))]
    return [path for path in entries if path.is_dir() or path.suffix == ".ipynb" or path.name.startswith(".")]


def clean(folder: Path, everything: bool = False) -> list[Path]:
    """Delete a study's artifacts, and with `everything` its exported files too; return what was deleted."""
    removed = removable(folder, everything)
    remove(folder, removed)
    return removed


def remove(folder: Path, doomed: list[Path]) -> None:
    """Delete these of a study's results, and stages' folders in which nothing is left."""
    for path in doomed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in STAGES:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()


class _Scheduler:
    """Settles jobs in plan order: finished ones at once, ready ones in worker processes, hopeless ones as skipped.

    A job that another runner holds stays in the queue: the others go on, and its result is picked up when it appears.
    """

    def __init__(self, study: Study, workers: int, display: Display, journal: "_Journal", gpus: int):
        self.study, self.workers, self.display, self.journal, self.gpus = study, workers, display, journal, gpus
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict = {}
        self.locks: dict[str, Lock] = {}
        self.broken: set[str] = set()
        self.pool: Executor | None = None
        self.processor = processor()

    def work_through(self, jobs: list[Job]) -> list[Outcome]:
        known = {job.reference for job in jobs}
        seconds = {name: need.seconds for name, need in forecast.needs(self.study, jobs).items()}
        self.outlook = Outlook(seconds, {job.reference: job.depends_on for job in jobs}, self.workers)
        waiting = [replace(job, depends_on=tuple(name for name in job.depends_on if name in known)) for job in jobs]
        try:
            while waiting or self.running:
                waiting = [job for job in waiting if not self._advance(job)]
                waiting += self._collect(elsewhere=bool(waiting) and len(self.running) < self.workers)
        except BaseException:
            self._stop()
            raise
        finally:
            if self.pool:
                self.pool.shutdown(cancel_futures=True)
        return [self.outcomes[job.reference] for job in jobs]

    def _advance(self, job: Job) -> bool:
        """Settle or start a job if that is possible now; return whether it left the queue."""
        if any(reference not in self.outcomes for reference in job.depends_on):
            return False
        lost = [name for name in job.depends_on if self.outcomes[name].state in ("failed", "skipped")]
        wanted = without(job, lost)
        if wanted is None:
            cause = self.outcomes[lost[0]].job
            self._settle(job, Outcome(job, "skipped", error=f"needs {cause.reference}, which has no result"))
        elif is_finished(self.study, wanted):
            self._settle(job, Outcome(wanted, "done"))
        elif len(self.running) < self.workers and not self._lock(wanted).taken():
            self._start(job, wanted)
        else:
            return False
        return True

    def _lock(self, job: Job) -> Lock:
        # Kept, because only who has watched a lock for a while can tell that its owner's heart stopped.
        artifact = Artifact(self.study.folder / job.reference)
        return self.locks.setdefault(job.reference, stage.lock(artifact))

    def _start(self, job: Job, wanted: Job) -> None:
        # Spawned, not forked: the front-door notebook that calls this has threads.
        self.pool = self.pool or ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), become_worker, (self.study.run["warm"],)
        )
        # What a run that was killed told last would be taken for this one's.
        stage.progress_file(Artifact(self.study.folder / wanted.reference)).unlink(missing_ok=True)
        self.journal.tell(event="start", job=wanted.reference, point=wanted.label)
        future = self.pool.submit(work, *arguments(self.study, wanted), self.gpus)
        self.running[future] = (job, wanted)
        self.outlook.start(job.reference)
        self._show()

    def _collect(self, elsewhere: bool) -> list[Job]:
        """Wait for a running job, a moment at most if others are computed `elsewhere`; return what must be tried again."""
        again = []
        finished = wait(self.running, POLL_SECONDS if elsewhere else SHOW_SECONDS, FIRST_COMPLETED).done
        self._show()
        if elsewhere and not self.running:
            time.sleep(POLL_SECONDS)
        for future in finished:
            job, wanted = self.running.pop(future)
            try:
                state, seconds, error = future.result()
            except BrokenProcessPool:
                # One worker that dies takes the others with it, so nobody knows whose fault it was: all try once more.
                self.pool = None
                state, seconds, error = "failed", 0.0, "its worker process was killed, most likely for lack of memory"
                if job.reference not in self.broken:
                    self.broken.add(job.reference)
                    state = "taken"
            if state == "taken":
                self.outlook.again(job.reference)
                again.append(job)
            else:
                self._settle(job, Outcome(wanted, state, seconds, error))
        return again

    def _settle(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.reference] = outcome
        if outcome.state != "done":
            log.info(outcome.line())
            self.journal.settle(outcome)
        self.outlook.end(job.reference, self._took(outcome))
        self._show()

    def _took(self, outcome: Outcome) -> float:
        """Return what a job took on a machine like this one, by its card if an earlier run computed it; 0 if nobody knows."""
        if outcome.state != "done":
            return outcome.seconds if outcome.state == "computed" else 0.0
        card = Artifact(self.study.folder / outcome.job.reference).card
        return card["seconds"] if card.get("processor") == self.processor else 0.0

    def _show(self) -> None:
        failed = sum(outcome.state == "failed" for outcome in self.outcomes.values())
        running = {
            job.reference: (f"{wanted.stage} {wanted.label}", stage.progress_file(Artifact(self.study.folder / wanted.reference)))
            for job, wanted in self.running.values()
        }
        self.display.show(self.outlook, len(self.outcomes), failed, running)

    def _stop(self) -> None:
        """Kill the kernels until every worker has come back, and leave no trace of the jobs that were under way."""
        while self.running and wait(self.running, timeout=0.2).not_done:
            for worker in multiprocessing.active_children():
                kernel.kill_children(worker.pid)
        for _, wanted in self.running.values():
            stage.failed_notebook(Artifact(self.study.folder / wanted.reference)).unlink(missing_ok=True)


class _Journal:
    """What a run did: lines for people in run.log, and for programs a JSON-lines file of this runner's own in log/."""

    def __init__(self, study: Study):
        self.folder = study.folder
        host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
        self.path = self.folder / "log" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{host}-{os.getpid()}.jsonl"

    def settle(self, outcome: Outcome) -> None:
        facts = {"point": outcome.job.label, "seconds": round(outcome.seconds, 3), "error": outcome.error}
        self.tell(outcome.line(), event=outcome.state, job=outcome.job.reference, **facts)

    def tell(self, line: str = "", **event) -> None:
        now = datetime.now(UTC)
        try:
            self._write(now, line, event)
        except OSError as error:  # on a full disk the results matter, not the words about them
            log.warning("nothing written to %s: %s", self.path, error.strerror)

    def _write(self, now: datetime, line: str, event: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now.isoformat(timespec="milliseconds")} | event) + "\n")
        if line:
            with (self.folder / "run.log").open("a", encoding="utf-8") as file:
                file.write(f"{now.isoformat(timespec='seconds')}  {line}\n")


def _sweep(study: Study, outcomes: list[Outcome]) -> None:
    """Delete what killed runs left beside jobs that are finished by now."""
    finished = {outcome.job.reference for outcome in outcomes if outcome.state in ("done", "computed")}
    for folder in {(study.folder / outcome.job.reference).parent for outcome in outcomes}:
        for path in folder.glob("*"):
            key = path.name.lstrip(".").split(".")[0]
            if path.name != key and f"{folder.name}/{key}" in finished and not stage.lock(Artifact(folder / key)).taken():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
