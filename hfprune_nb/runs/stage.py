"""Stages: one notebook each, checked before it starts, addressed by its parameters, executed by papermill.

A notebook calls `start` right after its parameters cell. Notebooks, command line and study file are checked against the names and
types in that cell, because papermill only warns about a misspelt name.
"""

import ast
import contextlib
import os
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.progress import PROGRESS_FILE, followed
from hfprune_nb.runs import kernel, pins
from hfprune_nb.runs.artifacts import Artifact, Writer, finished, open_artifact
from hfprune_nb.runs.grid import shown
from hfprune_nb.runs.keys import address, contents
from hfprune_nb.runs.locks import Lock
from hfprune_nb.runs.parameters import complete, notebook_parameters, notebook_path, refuse_unknown
from hfprune_nb.runs.provenance import peak_memory, surroundings
from hfprune_nb.runs.stages import EVERYTHING, STAGES, Input


class _Line(str):
    """Text that a notebook shows without quotes."""

    def __repr__(self):
        return str(self)


class StageError(RuntimeError):
    """A stage's notebook failed; the message is its last line of traceback in one sentence."""


def study_folder(study: str) -> Path:
    """Return the results folder of a study; raises UserError for a name that is not a plain folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", study):
        raise UserError(f"study {study!r} is not a plain name: use letters, digits, '-', '_' and '.'")
    return paths.results() / study


def start(stage: str, /, **parameters) -> "Run":
    """Begin or find the run of a stage with the parameters of the notebook that calls this, or with `parameters`: all of them.

    Missing inputs are made first, by executing their notebooks. Raises UserError for a misspelt, missing or mistyped
    parameter and for an input that is unfinished, corrupt, of another stage or outside the study's folder; StageError
    when the notebook of an input fails.
    """
    notebook = notebook_path(stage)
    if PROGRESS_FILE in os.environ and Path("matplotlibrc").exists():
        import matplotlib

        matplotlib.rcdefaults()  # it reads the working directory's before the one that the kernel was given
    refuse_unknown(_injected_names(), notebook)
    known = notebook_parameters(notebook)
    parameters = parameters or {name: value for name, value in sys._getframe(1).f_globals.items() if name in known}
    if missing := sorted(known.keys() - parameters.keys()):
        raise UserError(f"stage.start({stage!r}) lacks parameters of {notebook.name}: {', '.join(missing)}")
    study = parameters["study"]
    folder = study_folder(study)
    # A run that a study or another notebook started has its commits already, if it reads any.
    values = pins.pinned(stage, complete(stage, parameters), pins.known(folder), ask=PROGRESS_FILE not in os.environ)
    hub.pin(values.get("revisions", {}))
    if sentence := STAGES[stage].warning(values):
        sys.stdout.write(sentence + "\n")
    values = _resolve(stage, study, values)
    inputs = {}
    for name, given in STAGES[stage].inputs.items():
        opened = [open_artifact(folder / reference) for reference in _references(values[name])]
        if not given.many:
            _refuse_other_run(name, given, opened, values)
        inputs[name] = opened if given.many else (opened or [None])[0]
    return Run(stage, study, values, inputs)


class Run:
    """One run of a stage, as its notebook sees it.

    `done`: nothing needs computing and `path` leads to the finished files; otherwise write to `path(NAME)` and call
    `finish(...)` last, for until then nothing counts. `inputs`: name -> Artifact, list of them, or None where empty.
    """

    def __init__(self, stage: str, study: str, parameters: dict, inputs: dict):
        self.stage, self.study, self.parameters, self.inputs = stage, study, parameters, inputs
        self.artifact = Artifact(study_folder(study) / stage / address(stage, parameters))
        self.done = self.artifact.current
        self._lock = lock(self.artifact)
        self._writer: Writer = None
        self._left: int | None = None
        if shell := _shell():
            self._watch(shell)
        if not self.done:
            self._begin()
        self._started = datetime.now(UTC)

    @property
    def folder(self) -> Path:
        """The artifact's folder, or while it is being made the partial one."""
        return self.artifact.folder if self.done else self._writer.partial

    def path(self, name: str) -> Path:
        """Return where the file `name` lies, or where to write it while the run is not done."""
        return self.artifact.path(name) if self.done else self._writer.path(name)

    def _begin(self) -> None:
        """Wait for the lock, clear away what killed runs left, and look again: another process may have finished meanwhile."""
        self._lock.wait()
        self._writer = Writer(self.artifact.folder)
        self.done = self.artifact.current
        if self.done:
            self._lock.release()

    def _watch(self, shell) -> None:
        """Hold the lock only while cells of this notebook run and succeed; a run that it began before is left."""
        if before := getattr(shell, "hfprune_run", None):
            before._lock.release(everything=True)
            for event, hook in before._hooks.items():
                shell.events.unregister(event, hook)
        self._hooks = {
            "pre_run_cell": lambda _: self.done or not self._writer or self._lock.held or self._lock.take(),
            "post_run_cell": self._after_cell,
        }
        for event, hook in self._hooks.items():
            shell.events.register(event, hook)
        shell.hfprune_run = self

    def _after_cell(self, result) -> None:
        if self._writer and not self.done and not result.success:
            self._leave()

    def _leave(self) -> None:
        """Let others compute this while the kernel idles after an error or an interrupt; the next cell takes the lock again."""
        self._left = self._writer.partial.stat().st_ino if self._writer.partial.is_dir() else None
        self._lock.release(everything=True)

    def _is_ours(self) -> bool:
        """Whether the lock is held and nobody has cleared away the files that were written before it was left."""
        return self._lock.held and self._left in (None, self._writer.partial.stat().st_ino)

    def scratch(self) -> Path:
        """Return a folder for what a killed run can go on from; it outlives failures and goes when the run is finished."""
        folder = scratch_folder(self.artifact)
        if not self.done:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, **facts) -> Artifact:
        """Seal the artifact with `facts` (device, dtype, tokens, ...) in its card; does nothing when the run was done.

        Raises UserError when no file was written, the disk is full, or another process took this run over.
        """
        if not self.done:
            used = [used for given in self.inputs.values() for used in (given if isinstance(given, list) else [given])]
            inputs = {artifact.reference: artifact.digest for artifact in used if artifact}
            self._writer.finish(self.parameters, inputs, self._card(facts), allowed=self._is_ours)
            self.done = True
            shutil.rmtree(scratch_folder(self.artifact), ignore_errors=True)
            self._lock.release(everything=True)
        return self.artifact

    def describe(self) -> str:
        """Return one line: reference, state, and the parameters that are short."""
        shown = [f"{name} {value}" for name, value in self.parameters.items() if value and not isinstance(value, list)]
        return _Line(f"{self.artifact.reference} ({'done' if self.done else 'to be computed'}): {', '.join(shown)}")

    def _card(self, facts: dict) -> dict:
        ended = datetime.now(UTC)
        return {
            "stage": self.stage,
            "key": self.artifact.key,
            "parameters": self.parameters,
            "contents": contents(self.stage, self.parameters),
            "facts": facts,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": ended.isoformat(timespec="seconds"),
            "seconds": round((ended - self._started).total_seconds(), 3),
            "peak_memory_bytes": peak_memory(),
            **surroundings(),
        }


def execute(
    stage: str,
    study: str,
    parameters: dict,
    environment: dict[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> Artifact:
    """Run a stage's notebook in a kernel of its own and return the artifact it made, the executed notebook inside.

    While it runs the notebook is `<stage>/<key>.running.ipynb`; after a failure `<stage>/<key>.failed.ipynb`, with its
    traceback. `environment` is added to the kernel's; a kernel is killed after `timeout_seconds`. Waits while another
    process runs this stage, and does nothing when that has finished it. Raises UserError for bad parameters, StageError for
    a failure.
    """
    values = _resolve(stage, study, complete(stage, parameters))
    artifact = Artifact(study_folder(study) / stage / address(stage, values))
    with lock(artifact) as own:
        if not is_complete(artifact):
            progress_to = {PROGRESS_FILE: str(progress_file(artifact))}
            _execute(artifact, study, values, (environment or {}) | own.environment | progress_to, timeout_seconds)
    return artifact


def _execute(artifact: Artifact, study: str, values: dict, environment: dict[str, str], timeout_seconds: float | None) -> None:
    stage = artifact.folder.parent.name
    running = artifact.folder.with_name(f"{artifact.key}.running.ipynb")
    failed = failed_notebook(artifact)
    try:
        kernel.run(notebook_path(stage), running, {"study": study, **values}, environment, timeout_seconds)
        if not artifact.current:
            raise StageError("the notebook ended without run.finish(): call it in the last step")
    except Exception as error:
        sentence = sentence_of(error)
        if "No space left" in sentence:
            Writer(artifact.folder)  # clears what the run had written
        with contextlib.suppress(OSError, ValueError):  # a full disk has no room for the failed notebook either
            _keep_failure(running, failed, sentence)
        running.unlink(missing_ok=True)
        raise StageError(sentence) from error
    except BaseException:
        running.unlink(missing_ok=True)
        raise
    finally:
        progress_file(artifact).unlink(missing_ok=True)
    os.replace(running, artifact.path("notebook.ipynb"))
    failed.unlink(missing_ok=True)


def ancestor(artifact: Artifact, stage: str) -> Artifact | None:
    """Return the artifact of `stage` from which `artifact` was made, however many steps ago, or None."""
    for reference in artifact.inputs:
        given = Artifact(artifact.folder.parent.parent / reference)
        if found := given if reference.startswith(f"{stage}/") else ancestor(given, stage):
            return found
    return None


def failed_notebook(artifact: Artifact) -> Path:
    """Return where the notebook of a failed run of this artifact is kept."""
    return artifact.folder.with_name(f"{artifact.key}.failed.ipynb")


def is_complete(artifact: Artifact) -> bool:
    """Return whether nothing is left to do: the artifact is finished, intact and current, its notebook beside it."""
    return artifact.current and artifact.path("notebook.ipynb").is_file()


def lock(artifact: Artifact) -> Lock:
    """Return the lock under which this artifact is made."""
    return Lock(artifact.folder.with_name(f".{artifact.key}.lock"))


def progress_file(artifact: Artifact) -> Path:
    """Return where a run of this artifact says how far it is; see `hfprune_nb.progress`."""
    return artifact.folder.with_name(f".{artifact.key}.progress.json")


def scratch_folder(artifact: Artifact) -> Path:
    """Return where a run of this artifact keeps its checkpoints until it is finished."""
    return artifact.folder.with_name(f".{artifact.key}.scratch")


def sentence_of(error: Exception) -> str:
    """Return an error in one sentence: as it stands if it was written for the user, else with its type in front."""
    name, message = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error)).strip()
    if name == "DeadKernelError":
        return "the kernel died, most likely for lack of memory"
    first = message.splitlines()[0] if message else ""
    return first if name in ("UserError", "StageError", "TimeoutError") else f"{name}: {first}"


def _references(value) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _resolve(stage: str, study: str, values: dict) -> dict:
    """Return `values` with every input as `stage/key`; artifacts that are left empty are found or made."""
    folder = study_folder(study)
    resolved = dict(values)
    for name, given in STAGES[stage].inputs.items():
        if values[name]:
            if not _wanted(given, resolved):
                leaders = " or ".join(map(repr, given.follows))
                raise UserError(f"parameter {name!r} of {stage} goes with {leaders} only: leave it empty")
            references = sorted(_reference(name, given.stage, value, folder) for value in _references(values[name]))
            resolved[name] = references if given.many else references[0]
        elif given.many:
            resolved[name] = [artifact.reference for artifact in finished(folder, given.stage)]
        elif not given.optional and _wanted(given, resolved):
            resolved[name] = _make_input(given, study, values, STAGES[stage].inputs)
    lists = {name: given.stage for name, given in STAGES[stage].inputs.items() if given.many}
    if lists and not any(resolved[name] for name in lists):
        source = next(iter(lists.values()))
        known = sorted({path.parts[-4] for path in paths.results().glob(f"*/{source}/*/DONE")})
        choice = f"set study to {' or '.join(known)}, or run" if known else "run"
        raise UserError(f"study {study!r} has no finished {source} to show: {choice} {STAGES[source].notebook} first")
    return resolved


def _wanted(given: Input, values: dict) -> bool:
    return not given.follows or any(values.get(leader) for leader in given.follows)


def _reference(name: str, stage: str, value: str, folder: Path) -> str:
    # Only artifacts of this study can be inputs: a reference then means the same on every machine that holds the study.
    path = Path(value).expanduser().resolve()
    reference = f"{path.parent.name}/{path.name}" if path.parent.parent == folder else value
    if not re.fullmatch(r"\w+/[0-9a-f]{16}", reference):
        raise UserError(f"{name}={value!r} is neither 'stage/key' nor a folder in {folder}: set study to its study")
    if not reference.startswith(f"{stage}/"):
        raise UserError(f"{name}={value!r} must be an artifact of the stage {stage!r}")
    return reference


def _refuse_other_run(name: str, given: Input, opened: list[Artifact], values: dict) -> None:
    for artifact in opened:
        ours = values.get("revisions", {})
        for repository, theirs in artifact.parameters.get("revisions", {}).items():
            if ours.get(repository, theirs) != theirs:
                raise UserError(
                    f"{name}={artifact.reference!r} was made with {repository} at {theirs}, not {ours[repository]}: give both "
                    f"the same revisions, or leave {name!r} empty"
                )
        for parameter in given.agrees:
            theirs, ours = artifact.parameters.get(parameter), values.get(parameter)
            if theirs != ours:
                raise UserError(
                    f"{name}={artifact.reference!r} was made with {parameter} {theirs!r}, not {ours!r}: leave {name!r} empty to "
                    "have it made, or name one that fits"
                )


def _make_input(given: Input, study: str, values: dict, own_inputs: dict) -> str:
    passed = [name for name in values if name not in own_inputs] if EVERYTHING in given.passes else given.passes
    handed = {name: values[name] for name in passed if name in values}
    if given.within:
        if serving := _with_more(given, study, values, handed):
            return serving
        handed[given.within[1]] = [values[given.within[0]]]
    upstream = complete(given.stage, handed, exploring=True)
    commits = pins.known(study_folder(study)) | {f"{name}@main": commit for name, commit in values.get("revisions", {}).items()}
    upstream = _resolve(given.stage, study, pins.pinned(given.stage, upstream, commits, ask=True))
    artifact = Artifact(study_folder(study) / given.stage / address(given.stage, upstream))
    if not artifact.current:
        sys.stdout.write(f"{artifact.reference} is missing: {STAGES[given.stage].notebook} makes it first\n")
        with followed(progress_file(artifact)):
            execute(given.stage, study, upstream)
    return artifact.reference


def _with_more(given: Input, study: str, values: dict, handed: dict) -> str | None:
    """Return a finished artifact that holds what `given` asks for besides other things, and agrees in all else."""
    own, theirs = given.within
    for artifact in finished(study_folder(study), given.stage):
        made = artifact.parameters
        names = [shown(entry) for entry in made[theirs]]
        inputs = {name: made[name] for name in STAGES[given.stage].inputs}
        wanted = complete(given.stage, handed | inputs | {theirs: made[theirs]}, exploring=True)
        if values[own] in names and address(given.stage, wanted) == address(given.stage, made) and artifact.current:
            return artifact.reference
    return None


def _shell():
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _injected_names() -> set[str]:
    """Return the names that papermill assigned in this kernel: its own command line lets misspelt ones pass."""
    shell = _shell()
    sources = shell.user_ns.get("In", []) if shell else []
    injected = [line for source in sources if source.startswith("# Parameters\n") for line in ast.parse(source).body]
    return {ast.unparse(line.targets[0]) for line in injected if isinstance(line, ast.Assign)}


def _keep_failure(running: Path, failed: Path, sentence: str) -> None:
    import nbformat

    notebook = nbformat.read(running, 4) if running.is_file() else nbformat.v4.new_notebook()
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"**Failed:** {sentence}"))
    notebook.metadata["hfprune"] = {"error": sentence}
    complete = failed.with_suffix(".new")
    nbformat.write(notebook, complete)
    os.replace(complete, failed)
