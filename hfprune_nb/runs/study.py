"""Studies: a YAML file becomes a grid of stage runs, of which `run` computes exactly those that are missing or stale.

Every cell of the grid knows its key before anything runs, so a study can be stopped anywhere and resumed. A cell is
computed again when a file of it was changed or lost, or when an input has other bytes than it had then; an input that
was recomputed to the same bytes stops there (early cut-off).
"""

import contextlib
import logging
import multiprocessing
import shutil
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.progress import bar as progress_bar
from hfprune_nb.runs import kernel, publication, stage
from hfprune_nb.runs.artifacts import Artifact, address, read_json

log = logging.getLogger(__name__)

# Criteria that read no calibration text: one seed says all.
WEIGHTS_ONLY = ("magnitude",)
# What the grid sets, and a section of the study file therefore must not.
GRID = {
    "calibration": {"model", "seed"},
    "scoring": {"model", "seed", "criteria"},
    "pruning": {"model", "seed", "criterion", "ratio", "neuron_ratio"},
    "evaluation": {"model"},
}
SETTINGS = {"workers": 2, "threads": 1, "timeout_minutes": 60.0, "offline": False}


@dataclass(frozen=True)
class Study:
    """A study file, checked. `sections`: stage -> parameters of its notebook; `run`: workers, threads, and so on."""

    path: Path
    name: str
    description: str
    models: list[str]
    seeds: list[int]
    criteria: list[str]
    ratios: list[float]
    neuron_ratios: list[float]
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
    """A cell is `done` (found finished), `computed`, `failed` or `skipped`; in a status also `running` or `waiting`."""

    cell: Cell
    state: str
    seconds: float = 0.0
    error: str = ""

    def line(self) -> str:
        """Return one line: state, stage, place, and the error or the seconds if there are any."""
        note = self.error or (f"{self.seconds:.1f} s" if self.seconds else "")
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
    fields = {"name": path.stem, "description": "", "assets": [], "ratios": [], "neuron_ratios": []}
    _refuse_unknown(content, [*Study.__dataclass_fields__.keys() - {"path", "sections"}, *stage.STAGES], path.name)
    fields |= {key: value for key, value in content.items() if key not in stage.STAGES}
    fields["run"] = _settings(path.name, fields.get("run") or {})
    for text in ("name", "description"):
        if not isinstance(fields[text], str):
            raise UserError(f"{path.name}: {text} must be text, not {fields[text]!r}")
    for axis, kind in {"models": str, "seeds": int, "criteria": str, "assets": str}.items():
        fields[axis] = _axis(path.name, axis, fields.get(axis), kind, may_be_empty=axis == "assets")
    for axis in ("ratios", "neuron_ratios"):
        fields[axis] = [float(ratio) for ratio in _axis(path.name, axis, fields[axis], (int, float), may_be_empty=True)]
        if outside := [ratio for ratio in fields[axis] if not 0 < ratio < 1]:
            raise UserError(f"{path.name}: {axis} must lie between 0 and 1, not {outside[0]:g}")
    if bool(fields["ratios"]) == bool(fields["neuron_ratios"]):
        raise UserError(f"{path.name}: give either ratios (of all parameters) or neuron_ratios (of the MLP neurons)")
    sections = {name: _section(path.name, name, content.get(name) or {}) for name in stage.STAGES}
    study = Study(path=path, sections=sections, **fields)
    stage.study_folder(study.name)
    return study


def plan(study: Study) -> list[Cell]:
    """Return the cells of a study in the order in which ready ones are started; equal studies give equal plans.

    Dense evaluations come first, because every other evaluation waits for one; the figures wait for everything.
    """
    cells = {}

    def add(name, place, depends_on=(), **values):
        parameters = stage.complete(name, study.sections[name] | values)
        cell = Cell(name, parameters, tuple(depends_on), place)
        return cells.setdefault(cell.reference, cell).reference

    axis = "ratio" if study.ratios else "neuron_ratio"
    unset = {"ratio": 0.0, "neuron_ratio": 0.0}
    chains = [(model, seed) for model in study.models for seed in study.seeds]
    prunings = [
        (model, seed, criterion, ratio)
        for model in study.models
        for ratio in study.ratios or study.neuron_ratios
        for criterion in study.criteria
        for seed in (study.seeds[:1] if criterion in WEIGHTS_ONLY else study.seeds)
    ]
    dense = {model: add("evaluation", {"model": model, "criterion": "dense"}, model=model) for model in study.models}
    calibration, scores, pruned = {}, {}, {}
    for model, seed in chains:
        calibration[model, seed] = add("calibration", {"model": model, "seed": seed}, model=model, seed=seed)
    for model, seed in chains:
        used = calibration[model, seed]
        own = {"model": model, "seed": seed}
        scores[model, seed] = add("scoring", own, [used], calibration=used, criteria=study.criteria, **own)
    for model, seed, criterion, ratio in prunings:
        used = scores[model, seed]
        own = {"model": model, "seed": seed, "criterion": criterion}
        place = own | {axis: f"{ratio:.4g}"}
        own |= unset | {axis: ratio}
        pruned[model, seed, criterion, ratio] = add("pruning", place, [used], scores=used, **own)
    for (model, seed, criterion, ratio), used in pruned.items():
        place = {"model": model, "seed": seed, "criterion": criterion, axis: f"{ratio:.4g}"}
        add("evaluation", place, [used, dense[model]], model=model, pruned=used, reference=dense[model])
    lists = {
        parameter: [reference for reference, cell in cells.items() if cell.stage == given.stage]
        for parameter, given in stage.STAGES["figures"].inputs.items()
    }
    add("figures", {}, [reference for references in lists.values() for reference in references], **lists)
    return list(cells.values())


def run(study: Study, workers: int | None = None, progress: bool = True) -> Summary:
    """Compute what is missing or stale, `workers` notebooks at a time, publish the results, and return what happened.

    A cell that fails leaves its notebook; cells that depend on it are skipped and the others go on. An interrupt stops
    the kernels before it is passed on.
    """
    began = time.monotonic()
    cells = plan(study)
    with progress_bar(len(cells), "cell", study.name, enabled=progress) as bar:
        outcomes = _Scheduler(study, workers or study.run["workers"], bar).work_through(cells)
    summary = Summary(study, outcomes, time.monotonic() - began)
    if outcomes[-1].state in ("done", "computed"):
        publication.publish(study, [outcome.cell for outcome in outcomes if outcome.state in ("done", "computed")])
    if summary.count("done") < len(outcomes):
        _record(study, summary.text().splitlines()[-1])
    return summary


def status(study: Study) -> list[Outcome]:
    """Return the state of every cell as the files tell it: `done`, `failed` with its error, `running` or `waiting`."""
    return [_state(study, cell) for cell in plan(study)]


def plan_table(study: Study):
    """Return the plan as a pandas DataFrame: one row per cell with stage, place in the grid, state and key."""
    import pandas as pd

    rows = [{"stage": o.cell.stage, **o.cell.place, "state": o.state, "key": o.cell.key} for o in status(study)]
    return pd.DataFrame(rows, dtype=object).fillna("")


def published(study: Study, kind: str, suffix: str) -> list[Path]:
    """Return the published files of a kind (`tables`, `figures` or `notebooks`) that end in `suffix`, sorted."""
    return publication.files(study.folder, kind, suffix)


def removable(study: Study, everything: bool = False) -> list[Path]:
    """Return what `clean` would delete: the artifacts and notebooks of all stages, or the whole results folder."""
    if everything:
        return [study.folder] if study.folder.is_dir() else []
    # Published pictures share a folder with the artifacts of the figures stage, so that folder itself stays.
    entries = [path for name in stage.STAGES for path in sorted((study.folder / name).glob("*"))]
    return [path for path in entries if path.is_dir() or path.suffix == ".ipynb"]


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
    """Settles cells in plan order: finished ones at once, ready ones in worker processes, hopeless ones as skipped."""

    def __init__(self, study: Study, workers: int, bar):
        self.study, self.workers, self.bar = study, workers, bar
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict = {}
        self.pool: Executor | None = None

    def work_through(self, cells: list[Cell]) -> list[Outcome]:
        waiting = list(cells)
        try:
            while waiting or self.running:
                waiting = [cell for cell in waiting if not self._advance(cell)]
                if self.running:
                    self._collect()
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
        elif _finished(self.study, wanted):
            self._settle(cell, Outcome(wanted, "done"))
        elif len(self.running) < self.workers:
            self._start(cell, wanted)
        else:
            return False
        return True

    def _start(self, cell: Cell, wanted: Cell) -> None:
        # Spawned, not forked: the front-door notebook that calls this has threads.
        self.pool = self.pool or ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_parent
        )
        settings = self.study.run
        environment = _threads(settings["threads"]) | (_OFFLINE if settings["offline"] else {})
        arguments = (wanted.stage, self.study.name, wanted.parameters, environment, settings["timeout_minutes"] * 60)
        self.running[self.pool.submit(_work, *arguments)] = (cell, wanted)
        self._show()

    def _collect(self) -> None:
        finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in finished:
            cell, wanted = self.running.pop(future)
            try:
                seconds, error = future.result()
            except BrokenProcessPool:
                seconds, error, self.pool = 0.0, "its worker process was killed, most likely for lack of memory", None
            self._settle(cell, Outcome(wanted, "failed" if error else "computed", seconds, error))

    def _settle(self, cell: Cell, outcome: Outcome) -> None:
        self.outcomes[cell.reference] = outcome
        if outcome.state != "done":
            log.info(outcome.line())
            _record(self.study, outcome.line())
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


def _work(name: str, study: str, parameters: dict, environment: dict, timeout_seconds: float) -> tuple[float, str]:
    """Execute one cell in a worker process; return its seconds and, if it failed, its error in one sentence."""
    began = time.monotonic()
    error = ""
    try:
        stage.execute(name, study, parameters, environment, timeout_seconds)
    except Exception as failure:
        error = stage.sentence_of(failure)
    return time.monotonic() - began, error


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


def _finished(study: Study, cell: Cell) -> bool:
    artifact = Artifact(study.folder / cell.reference)
    return artifact.current and artifact.path("notebook.ipynb").is_file()


def _state(study: Study, cell: Cell) -> Outcome:
    artifact = Artifact(study.folder / cell.reference)
    failed = stage.failed_notebook(artifact)
    if _finished(study, cell):
        return Outcome(cell, "done", artifact.card["seconds"])
    if artifact.folder.with_name(f"{cell.key}.running.ipynb").is_file():
        return Outcome(cell, "running")
    if failed.is_file():
        return Outcome(cell, "failed", error=read_json(failed)["metadata"]["hfprune"]["error"])
    return Outcome(cell, "waiting")


def _record(study: Study, line: str) -> None:
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / "run.log").open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}  {line}\n")


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
