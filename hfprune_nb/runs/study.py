"""Studies: a YAML file becomes a grid of stage runs, of which `run` computes exactly those that are missing or stale.

Every cell of the grid knows its key before anything runs, so a study can be stopped anywhere and resumed. A cell is
computed again when a file of it was changed or lost, or when an input has other bytes than it had then; an input that
was recomputed to the same bytes stops there (early cut-off).
"""

import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.progress import bar as progress_bar
from hfprune_nb.progress import told
from hfprune_nb.runs import forecast, kernel, publication, stage
from hfprune_nb.runs.artifacts import Artifact, address
from hfprune_nb.runs.locks import POLL_SECONDS, Lock

log = logging.getLogger(__name__)

# A criterion that reads weights alone: one seed says all.
WEIGHTS_ONLY = ("magnitude",)
# Criteria that read no calibration text: controls, which are not tuned afterwards unless recovery_criteria names them.
TEXTLESS = (*WEIGHTS_ONLY, "random")
# Stages that run only where the study file has a section, and which one that is.
OPTIONAL = {"recovery": "recovery", "cost": "cost", "experiments": "experiments", "questions": "experiments"}
# What the grid sets, and a section of the study file therefore must not.
GRID = {
    "calibration": {"model", "seed"},
    "scoring": {"model", "seed", "criteria"},
    "pruning": {"model", "seed", "criterion", "ratio", "neuron_ratio"},
    "recovery": {"model"},
    "evaluation": {"model"},
    "cost": {"model"},
    "experiments": {"model"},
}
SETTINGS = {"workers": 2, "threads": 1, "timeout_minutes": 60.0, "offline": False}


@dataclass(frozen=True)
class Study:
    """A study file, checked; without `criteria` it has none of the cells that follow calibration.

    `sections`: stage -> parameters of its notebook, optional stages only where the file has them; `compensations`: the
    light repairs of every pruned model, `none` among them; `recovery_criteria`: of which models are tuned; `run`: workers,
    threads, and so on.
    """

    path: Path
    name: str
    description: str
    models: list[str]
    seeds: list[int]
    criteria: list[str]
    ratios: list[float]
    neuron_ratios: list[float]
    compensations: list[str]
    recovery_criteria: list[str]
    assets: list[str]
    sections: dict[str, dict]
    run: dict

    @property
    def folder(self) -> Path:
        """The study's results folder."""
        return stage.study_folder(self.name)


@dataclass(frozen=True)
class Cell:
    """One stage run of the grid: all its parameters, the references it depends on, and its place in the grid."""

    stage: str
    parameters: dict
    depends_on: tuple[str, ...]
    place: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of its artifact."""
        return address(self.stage, self.parameters)

    @property
    def reference(self) -> str:
        """`stage/key`."""
        return f"{self.stage}/{self.key}"

    @property
    def label(self) -> str:
        """Its place in words, such as `smollm2-135m, seed 0, entropy, 0.2`."""
        words = [f"seed {value}" if name == "seed" else str(value) for name, value in self.place.items() if value != ""]
        return ", ".join(words)


@dataclass(frozen=True)
class Outcome:
    """A cell is `done` (found finished), `computed`, `failed` or `skipped`; in a status also `running` or `waiting`.

    `error`: the first line of what went wrong; `note`: of a running cell how far it is and who runs it.
    """

    cell: Cell
    state: str
    seconds: float = 0.0
    error: str = ""
    note: str = ""

    def line(self) -> str:
        """Return one line: state, stage, place, and the error, the progress or the seconds if there are any."""
        note = self.error or self.note or (f"{self.seconds:.1f} s" if self.seconds else "")
        return f"{self.state:<8}  {self.cell.stage:<11}  {self.cell.label:<52}  {note}".rstrip()


@dataclass(frozen=True)
class Summary:
    """The outcomes of a whole study, in plan order."""

    study: Study
    outcomes: list[Outcome]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every cell is finished."""
        return all(outcome.state in ("done", "computed") for outcome in self.outcomes)

    def count(self, state: str) -> int:
        """Return how many cells are in a state."""
        return sum(outcome.state == state for outcome in self.outcomes)

    def text(self) -> str:
        """Return the closing words: one line for every failed cell with its notebook, and the totals."""
        total = len(self.outcomes)
        if self.count("done") == total:
            return f"study {self.study.name} is finished: {total} cells, nothing to do ({self.seconds:.1f} s)"
        states = ", ".join(f"{self.count(state)} {state}" for state in ("computed", "done", "failed", "skipped"))
        failed = [outcome for outcome in self.outcomes if outcome.state == "failed"]
        lines = [f"{outcome.line()} (see {outcome.cell.reference}.failed.ipynb)" for outcome in failed]
        return "\n".join([*lines, f"study {self.study.name}: {total} cells in {self.seconds:.0f} s: {states}"])


def find(name: str | Path) -> Path:
    """Return the study file `name`: a path, or a name in notebooks/studies; raises UserError when there is none."""
    folder = paths.notebooks() / "studies"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in folder.glob("*.yaml")]
    raise UserError(f"no study file {str(name)!r}: {stage.suggest(str(name), known)}")


def load(name: str | Path) -> Study:
    """Read and check a study file (see `find`).

    Raises UserError for an unknown key (with the nearest valid one), a wrong type, an empty or repeated grid axis, a
    ratio outside (0, 1), or a section's parameter that the stage's notebook does not have or that the grid sets.
    """
    path = find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} must be a mapping with models, seeds, criteria and ratios")
    fields = {"name": path.stem, "description": ""}
    _refuse_unknown(content, [*Study.__dataclass_fields__.keys() - {"path", "sections"}, *stage.STAGES], path.name)
    fields |= {key: value for key, value in content.items() if key not in stage.STAGES}
    fields["run"] = _settings(path.name, fields.get("run") or {})
    for text in ("name", "description"):
        if not isinstance(fields[text], str):
            raise UserError(f"{path.name}: {text} must be text, not {fields[text]!r}")
    # A file that only measures cost or runs experiments needs no grid.
    grid = not content.keys() & {"cost", "experiments"} or bool(content.keys() & {"criteria", "ratios", "neuron_ratios"})
    required = {"models", *(("seeds", "criteria") if grid else ())}
    axes = {"models": str, "seeds": int, "criteria": str, "compensations": str, "recovery_criteria": str, "assets": str}
    for axis, kind in axes.items():
        fields[axis] = _axis(path.name, axis, fields.get(axis, []), kind, may_be_empty=axis not in required)
    for axis in ("ratios", "neuron_ratios"):
        values = _axis(path.name, axis, fields.get(axis, []), (int, float), may_be_empty=True)
        fields[axis] = [float(ratio) for ratio in values]
        if outside := [ratio for ratio in fields[axis] if not 0 < ratio < 1]:
            raise UserError(f"{path.name}: {axis} must lie between 0 and 1, not {outside[0]:g}")
    if grid and bool(fields["ratios"]) == bool(fields["neuron_ratios"]):
        raise UserError(f"{path.name}: give either ratios (of all parameters) or neuron_ratios (of the MLP neurons)")
    for name in fields["recovery_criteria"]:
        if name not in fields["criteria"]:
            raise UserError(f"{path.name}: recovery_criteria: unknown {name!r}, {stage.suggest(name, fields['criteria'])}")
    fields["recovery_criteria"] = fields["recovery_criteria"] or [name for name in fields["criteria"] if name not in TEXTLESS]
    used = [name for name in stage.STAGES if name not in OPTIONAL or content.keys() & {name, OPTIONAL[name]}]
    sections = {name: _section(path.name, name, content.get(name) or {}) for name in used}
    study = Study(path=path, sections=sections, **fields)
    stage.study_folder(study.name)
    return study


def plan(study: Study) -> list[Cell]:
    """Return the cells of a study in the order in which ready ones are started; equal studies give equal plans.

    Dense evaluations come first, because every other evaluation waits for one; the figures and the questions wait for
    everything that they show. The dense model is tuned once, as the control of every tuned model.
    """
    cells = {}

    def add(name, place, depends_on=(), **values):
        parameters = stage.complete(name, study.sections[name] | values)
        cell = Cell(name, parameters, tuple(depends_on), place)
        return cells.setdefault(cell.reference, cell).reference

    for name in ("cost", "experiments"):
        for model in study.models if name in study.sections else ():
            add(name, {"model": model}, model=model)
    if study.criteria:
        _add_grid(study, add)
    for name in ("figures", "questions"):
        if name in study.sections and (study.criteria or name == "questions"):
            lists = {
                parameter: [reference for reference, cell in cells.items() if cell.stage == given.stage]
                for parameter, given in stage.STAGES[name].inputs.items()
            }
            add(name, {}, [reference for references in lists.values() for reference in references], **lists)
    return list(cells.values())


def _add_grid(study: Study, add) -> None:
    """Add calibration, scoring, pruning, recovery and evaluation of every model, seed, criterion and ratio."""
    axis = "ratio" if study.ratios else "neuron_ratio"
    chains = [(model, seed) for model in study.models for seed in study.seeds]
    dense = {model: add("evaluation", {"model": model, "criterion": "dense"}, model=model) for model in study.models}
    calibration, scores = {}, {}
    for model, seed in chains:
        calibration[model, seed] = add("calibration", {"model": model, "seed": seed}, model=model, seed=seed)
    for model, seed in chains:
        used = calibration[model, seed]
        own = {"model": model, "seed": seed}
        scores[model, seed] = add("scoring", own, [used], calibration=used, criteria=study.criteria, **own)
    repairs = [{"compensation": kind} for kind in study.compensations] or [{}]
    places = [
        {"model": model, "seed": seed, "criterion": criterion, axis: ratio, **repair}
        for model in study.models
        for ratio in study.ratios or study.neuron_ratios
        for criterion in study.criteria
        for repair in repairs
        for seed in (study.seeds[:1] if criterion in WEIGHTS_ONLY else study.seeds)
    ]
    pruned = []
    for place in places:
        used = scores[place["model"], place["seed"]]
        values = {"ratio": 0.0, "neuron_ratio": 0.0} | place
        place[axis] = f"{place[axis]:.4g}"
        if place.get("compensation") == "none":
            del place["compensation"]
        pruned.append((place, add("pruning", place, [used], scores=used, **values)))
    for place, used in pruned:
        model = place["model"]
        add("evaluation", place, [used, dense[model]], model=model, pruned=used, reference=dense[model])
    if "recovery" in study.sections:
        untuned = [({"model": model, "criterion": "dense"}, "") for model in study.models]
        untuned += [(place, used) for place, used in pruned if place["criterion"] in study.recovery_criteria]
        for place, used in untuned:
            place, model = place | {"recovery": "tuned"}, place["model"]
            tuned = add("recovery", place, [used] if used else [], model=model, pruned=used)
            given = {"pruned": used, "recovered": tuned, "reference": dense[model]}
            add("evaluation", place, filter(None, given.values()), model=model, **given)


def run(study: Study, workers: int | None = None, progress: bool = True, gpus: int = 0) -> Summary:
    """Compute what is missing or stale, `workers` notebooks at a time, publish the results, and return what happened.

    With `gpus` as many notebooks run at a time, if `workers` does not say otherwise, each on GPUs of its own.

    A cell that fails leaves its notebook; cells that depend on it are skipped and the others go on. An interrupt stops
    the kernels before it is passed on.
    """
    summary = _work_through(study, plan(study), workers, progress, gpus)
    _publish(study, summary.outcomes)
    return summary


def _work_through(study: Study, cells: list[Cell], workers: int | None, progress: bool, gpus: int = 0) -> Summary:
    began = time.monotonic()
    journal = _Journal(study)
    with progress_bar(len(cells), "cell", study.name, enabled=progress) as bar:
        outcomes = _Scheduler(study, workers or gpus or study.run["workers"], bar, journal, gpus).work_through(cells)
    summary = Summary(study, outcomes, time.monotonic() - began)
    _sweep(study, outcomes)
    if summary.count("done") < len(outcomes):
        states = {state: summary.count(state) for state in ("computed", "done", "failed", "skipped")}
        journal.tell(summary.text().splitlines()[-1], event="end", seconds=round(summary.seconds, 3), **states)
    return summary


def _publish(study: Study, outcomes: list[Outcome]) -> None:
    """Publish what is finished, unless the last cell, which sums up all others, has no result."""
    finished = [outcome.cell for outcome in outcomes if outcome.state in ("done", "computed")]
    if outcomes[-1].state in ("done", "computed") and not publication.is_published(study, finished):
        with Lock(study.folder / ".publication.lock"):
            publication.publish(study, finished)


def find_cell(study: Study, reference: str) -> Cell:
    """Return the cell of a study that is called `stage/key`; raises UserError when it has none."""
    for cell in plan(study):
        if cell.reference == reference:
            return cell
    raise UserError(f"study {study.name} has no cell {reference!r}: `hfprune study graph {study.name}` lists them")


def run_cell(study: Study, reference: str, gpus: int = 0) -> Outcome:
    """Compute one cell, waiting for whoever computes it already; `done` when nothing was left to do.

    This is what a workflow engine calls for each job. Raises UserError when an input of the cell is not finished.
    """
    cell = find_cell(study, reference)
    if is_finished(study, cell):
        return Outcome(cell, "done")
    if missing := [name for name in cell.depends_on if not Artifact(study.folder / name).current]:
        raise UserError(f"{reference} needs {missing[0]}, which is not finished: run that cell first")
    state, seconds, error = _work(*_job(study, cell), gpus, wait_for_lock=True)
    outcome = Outcome(cell, state, seconds, error)
    _Journal(study).settle(outcome)
    return outcome


def graph(study: Study) -> dict:
    """Return the study for a workflow engine: its run settings and cells, each with what it needs and the file it ends with."""
    wanted = needs(study)
    cells = [
        {
            "reference": cell.reference,
            "stage": cell.stage,
            "needs": list(cell.depends_on),
            "place": cell.label,
            "output": str(study.folder / cell.reference / "notebook.ipynb"),
            # A request, not a forecast: engines stop what takes more.
            "minutes": 10 + math.ceil(3 * wanted[cell.reference].seconds / 60),
            "memory_mb": 1000 + math.ceil(1500 * wanted[cell.reference].memory),
            "gpus": _gpus_wanted(cell.parameters),
        }
        for cell in plan(study)
    ]
    return {"study": study.name, "folder": str(study.folder), "assets": study.assets, **study.run, "cells": cells}


def _gpus_wanted(parameters: dict) -> int:
    """Return how many GPUs a stage run with these parameters needs: one for each of its processes."""
    return parameters.get("processes", 1) if forecast.device(parameters) == "gpu" else 0


def verify(study: Study, repair: bool = True, workers: int | None = None, progress: bool = False) -> tuple[list, Summary | None]:
    """Hash every file of every finished artifact; return (cell, what is wrong) of the damaged ones and how repairing went.

    With `repair` the damaged ones are deleted and computed again, and after them those finished cells whose inputs have
    other bytes now. Cells that were never finished, or that run at the moment, are left alone.
    """
    cells = [cell for cell in plan(study) if (study.folder / cell.reference).is_dir()]
    cells = [cell for cell in cells if not stage.lock(Artifact(study.folder / cell.reference)).taken()]
    damaged = [(cell, wrong) for cell in cells if (wrong := _damage(Artifact(study.folder / cell.reference)))]
    if not damaged or not repair:
        return damaged, None
    broken = {cell.reference for cell, _ in damaged}
    cells = [cell for cell in cells if cell.reference in broken or is_finished(study, cell)]
    for reference in broken:
        shutil.rmtree(study.folder / reference)
    summary = _work_through(study, cells, workers, progress)
    outcomes = status(study)
    if all(outcome.state == "done" for outcome in outcomes):
        _publish(study, outcomes)
    return damaged, summary


def _damage(artifact: Artifact) -> str:
    """Return what is wrong with a finished artifact in one sentence; empty when every byte is as it was written."""
    try:
        artifact.check()
        read_json(artifact.path("notebook.ipynb"))
    except UserError as error:
        return str(error).split(":")[0]
    except (OSError, ValueError):
        return f"the notebook of {artifact.reference} is lost or unreadable"
    return ""


def status(study: Study) -> list[Outcome]:
    """Return the state of every cell as the files tell it: `done`, `failed` with its error, `running` or `waiting`."""
    return [_state(study, cell) for cell in plan(study)]


def plan_table(study: Study):
    """Return the plan as a pandas DataFrame: one row per cell with stage, place in the grid, state and key."""
    import pandas as pd

    rows = [{"stage": o.cell.stage, **o.cell.place, "state": o.state, "key": o.cell.key} for o in status(study)]
    return pd.DataFrame(rows, dtype=object).fillna("")


def needs(study: Study) -> dict[str, forecast.Need]:
    """Return reference -> what that cell of the study will need, by measured rates."""
    cells = {cell.reference: cell for cell in plan(study)}
    known = forecast.rates()
    return {
        name: forecast.need(cell.stage, cell.parameters, known, lambda reference: cells[reference].parameters)
        for name, cell in cells.items()
    }


def hours(study: Study, workers: int, only_missing: bool = False) -> float:
    """Return how many hours the study will take on so many workers or GPUs, whole or what is missing of it."""
    wanted = needs(study)
    if only_missing:
        wanted = {outcome.cell.reference: wanted[outcome.cell.reference] for outcome in status(study) if outcome.state != "done"}
    return forecast.total(wanted, {cell.reference: cell.depends_on for cell in plan(study)}, workers)


def overdue(study: Study) -> list[Cell]:
    """Return the cells that by the forecast will be stopped by `run.timeout_minutes`."""
    wanted = needs(study)
    return [cell for cell in plan(study) if wanted[cell.reference].seconds > 60 * study.run["timeout_minutes"]]


def forecast_table(study: Study):
    """Return the forecast as a pandas DataFrame: one row per stage with cells, done, tokens, hours of one worker, GB."""
    import pandas as pd

    wanted, rows = needs(study), {}
    for outcome in status(study):
        each = wanted[outcome.cell.reference]
        row = rows.setdefault(
            outcome.cell.stage, {"cells": 0, "done": 0, "tokens": 0.0, "hours": 0.0, "memory": 0.0, "disk": 0.0}
        )
        row["cells"] += 1
        row["done"] += outcome.state == "done"
        row["tokens"] += each.tokens
        row["hours"] += each.seconds / 3600
        row["memory"] = max(row["memory"], each.memory)
        row["disk"] += each.disk
    return pd.DataFrame.from_dict(rows, orient="index")


def published(study: Study, kind: str, suffix: str) -> list[Path]:
    """Return the published files of a kind (`tables`, `figures` or `notebooks`) that end in `suffix`, sorted."""
    return publication.files(study.folder, kind, suffix)


def removable(study: Study, everything: bool = False) -> list[Path]:
    """Return what `clean` would delete: the artifacts and notebooks of all stages, or the whole results folder."""
    if everything:
        return [study.folder] if study.folder.is_dir() else []
    # Published pictures share a folder with the artifacts of the figures stage, so that folder itself stays.
    entries = [path for name in stage.STAGES for path in sorted((study.folder / name).glob("*"))]
    return [path for path in entries if path.is_dir() or path.suffix == ".ipynb" or path.name.startswith(".")]


def clean(study: Study, everything: bool = False) -> list[Path]:
    """Delete the study's artifacts, and with `everything` its published files too; return what was deleted."""
    removed = removable(study, everything)
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in stage.STAGES:
        with contextlib.suppress(OSError):
            (study.folder / name).rmdir()
    return removed


class _Scheduler:
    """Settles cells in plan order: finished ones at once, ready ones in worker processes, hopeless ones as skipped.

    A cell that another runner holds stays in the queue: the others go on, and its result is picked up when it appears.
    """

    def __init__(self, study: Study, workers: int, bar, journal: "_Journal", gpus: int):
        self.study, self.workers, self.bar, self.journal, self.gpus = study, workers, bar, journal, gpus
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict = {}
        self.locks: dict[str, Lock] = {}
        self.broken: set[str] = set()
        self.pool: Executor | None = None

    def work_through(self, cells: list[Cell]) -> list[Outcome]:
        known = {cell.reference for cell in cells}
        waiting = [replace(cell, depends_on=tuple(name for name in cell.depends_on if name in known)) for cell in cells]
        try:
            while waiting or self.running:
                waiting = [cell for cell in waiting if not self._advance(cell)]
                waiting += self._collect(elsewhere=bool(waiting) and len(self.running) < self.workers)
        except BaseException:
            self._stop()
            raise
        finally:
            if self.pool:
                self.pool.shutdown(cancel_futures=True)
        return [self.outcomes[cell.reference] for cell in cells]

    def _advance(self, cell: Cell) -> bool:
        """Settle or start a cell if that is possible now; return whether it left the queue."""
        if any(reference not in self.outcomes for reference in cell.depends_on):
            return False
        lost = [name for name in cell.depends_on if self.outcomes[name].state in ("failed", "skipped")]
        wanted = _without(cell, lost)
        if wanted is None:
            cause = self.outcomes[lost[0]].cell
            self._settle(cell, Outcome(cell, "skipped", error=f"needs {cause.reference}, which has no result"))
        elif is_finished(self.study, wanted):
            self._settle(cell, Outcome(wanted, "done"))
        elif len(self.running) < self.workers and not self._lock(wanted).taken():
            self._start(cell, wanted)
        else:
            return False
        return True

    def _lock(self, cell: Cell) -> Lock:
        # Kept, because only who has watched a lock for a while can tell that its owner's heart stopped.
        artifact = Artifact(self.study.folder / cell.reference)
        return self.locks.setdefault(cell.reference, stage.lock(artifact))

    def _start(self, cell: Cell, wanted: Cell) -> None:
        # Spawned, not forked: the front-door notebook that calls this has threads.
        self.pool = self.pool or ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_parent
        )
        self.journal.tell(event="start", cell=wanted.reference, place=wanted.label)
        self.running[self.pool.submit(_work, *_job(self.study, wanted), self.gpus)] = (cell, wanted)
        self._show()

    def _collect(self, elsewhere: bool) -> list[Cell]:
        """Wait for a running cell, a moment at most if others are computed `elsewhere`; return what must be tried again."""
        again = []
        finished = wait(self.running, POLL_SECONDS if elsewhere else None, FIRST_COMPLETED).done
        if elsewhere and not self.running:
            time.sleep(POLL_SECONDS)
        for future in finished:
            cell, wanted = self.running.pop(future)
            try:
                state, seconds, error = future.result()
            except BrokenProcessPool:
                # One worker that dies takes the others with it, so nobody knows whose fault it was: all try once more.
                self.pool = None
                state, seconds, error = "failed", 0.0, "its worker process was killed, most likely for lack of memory"
                if cell.reference not in self.broken:
                    self.broken.add(cell.reference)
                    state = "taken"
            if state == "taken":
                again.append(cell)
            else:
                self._settle(cell, Outcome(wanted, state, seconds, error))
        return again

    def _settle(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.reference] = outcome
        if outcome.state != "done":
            log.info(outcome.line())
            self.journal.settle(outcome)
        self.bar.update()
        self._show()

    def _show(self) -> None:
        self.bar.set_postfix_str("; ".join(f"{wanted.stage} {wanted.label}" for _, wanted in self.running.values()))

    def _stop(self) -> None:
        """Kill the kernels until every worker has come back, and leave no trace of the cells that were under way."""
        while self.running and wait(self.running, timeout=0.2).not_done:
            for worker in multiprocessing.active_children():
                kernel.kill_children(worker.pid)
        for _, wanted in self.running.values():
            stage.failed_notebook(Artifact(self.study.folder / wanted.reference)).unlink(missing_ok=True)


_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number), "TOKENIZERS_PARALLELISM": "false"}


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _job(study: Study, cell: Cell) -> tuple:
    """Return the arguments of `_work` for a cell."""
    environment = _threads(study.run["threads"]) | (_OFFLINE if study.run["offline"] else {})
    return study.folder / cell.reference, cell.parameters, environment, study.run["timeout_minutes"] * 60


def _work(
    folder: Path, parameters: dict, environment: dict, timeout_seconds: float, gpus: int, wait_for_lock: bool = False
) -> tuple[str, float, str]:
    """Execute one cell; return `computed`, `done`, `failed`, or `taken` by another process, its seconds and its error."""
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
            with _gpus(gpus, parameters) as chosen:
                stage.execute(folder.parent.name, folder.parents[1].name, parameters, environment | chosen, timeout_seconds)
    except Exception as failure:
        # Who lost the lock meanwhile, because the machine slept, leaves the cell to whoever has it now.
        state, error = ("failed", stage.sentence_of(failure)) if lock.held else ("taken", "")
    finally:
        lock.release()
    return state, time.monotonic() - began, error


@contextlib.contextmanager
def _gpus(number: int, parameters: dict):
    """Wait until as many of this machine's first `number` visible GPUs are free as a stage run with these parameters needs.

    Keeps them and yields what shows them alone to a kernel. A balanced model gets all; a run that needs none still takes one,
    so that no more run at a time than there are GPUs.
    """
    if not number:
        yield {}
        return
    needed = number if parameters.get("device") == "balanced" else max(1, _gpus_wanted(parameters))
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


class _Journal:
    """What a run did: lines for people in run.log, and for programs a JSON-lines file of this runner's own in log/."""

    def __init__(self, study: Study):
        self.folder = study.folder
        host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
        self.path = self.folder / "log" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{host}-{os.getpid()}.jsonl"

    def settle(self, outcome: Outcome) -> None:
        facts = {"place": outcome.cell.label, "seconds": round(outcome.seconds, 3), "error": outcome.error}
        self.tell(outcome.line(), event=outcome.state, cell=outcome.cell.reference, **facts)

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
    """Delete what killed runs left beside cells that are finished by now."""
    finished = {outcome.cell.reference for outcome in outcomes if outcome.state in ("done", "computed")}
    for folder in {(study.folder / outcome.cell.reference).parent for outcome in outcomes}:
        for path in folder.glob("*"):
            key = path.name.lstrip(".").split(".")[0]
            if path.name != key and f"{folder.name}/{key}" in finished and not stage.lock(Artifact(folder / key)).taken():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _without(cell: Cell, lost: list[str]) -> Cell | None:
    """Return `cell` without the list entries that were lost, or None when it cannot run without them."""
    if not lost:
        return cell
    inputs = stage.STAGES[cell.stage].inputs
    parameters = dict(cell.parameters)
    for name, given in inputs.items():
        if given.many:
            parameters[name] = [reference for reference in parameters[name] if reference not in lost]
        elif parameters[name] in lost:
            return None
    # An empty list would mean every artifact in the folder, also those of other settings.
    if any(given.many and cell.parameters[name] and not parameters[name] for name, given in inputs.items()):
        return None
    return replace(cell, parameters=parameters, depends_on=tuple(set(cell.depends_on) - set(lost)))


def is_finished(study: Study, cell: Cell) -> bool:
    """Return whether nothing is left to do for a cell."""
    return stage.is_complete(Artifact(study.folder / cell.reference))


def _state(study: Study, cell: Cell) -> Outcome:
    artifact = Artifact(study.folder / cell.reference)
    failed = stage.failed_notebook(artifact)
    if is_finished(study, cell):
        return Outcome(cell, "done", artifact.card["seconds"])
    lock = stage.lock(artifact)
    if lock.taken():
        return Outcome(cell, "running", note=f"{told(stage.progress_file(artifact))} ({lock.owner()})".strip())
    if failed.is_file():
        return Outcome(cell, "failed", error=read_json(failed)["metadata"]["hfprune"]["error"])
    waits_for = [name for name in cell.depends_on if not Artifact(study.folder / name).done]
    return Outcome(cell, "waiting", note=f"for {waits_for[0]}" if waits_for else "")


def _refuse_unknown(given: dict, known, where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, {stage.suggest(str(key), known)}")


def _axis(where: str, name: str, values, kind, may_be_empty: bool) -> list:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(values, list) or not (values or may_be_empty):
        raise UserError(f"{where}: {name} must be a list with at least one entry")
    for value in values:
        if type(value) not in kinds:
            raise UserError(f"{where}: {name} must hold {kinds[-1].__name__} values, not {value!r}")
    if len(set(values)) < len(values):
        raise UserError(f"{where}: {name} names an entry twice")
    return values


def _settings(where: str, given: dict) -> dict:
    _refuse_unknown(given, SETTINGS, f"{where}, section run")
    for name, value in given.items():
        allowed = (int, float) if name == "timeout_minutes" else (type(SETTINGS[name]),)
        if type(value) not in allowed or (type(value) is not bool and value <= 0):
            wanted = "true or false" if allowed == (bool,) else f"a positive {allowed[-1].__name__}"
            raise UserError(f"{where}: run.{name} must be {wanted}, not {value!r}")
    return SETTINGS | given


def _section(where: str, name: str, given: dict) -> dict:
    taken = GRID.get(name, set()) | stage.STAGES[name].inputs.keys() | {"study"}
    if both := sorted(taken & given.keys()):
        raise UserError(f"{where}: {name}.{both[0]} is set by the grid of the study: remove it from the section")
    try:
        return stage.check_parameters(stage.notebook_path(name), given)
    except UserError as error:
        raise UserError(f"{where}, section {name}: {error}") from None
