"""What became of a study's jobs, as a run or the files tell it."""

from dataclasses import dataclass

from hfprune_nb.files import read_json
from hfprune_nb.progress import told
from hfprune_nb.runs import stage
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.grid import Job
from hfprune_nb.runs.study import Study


@dataclass(frozen=True)
class Outcome:
    """A job is `done` (found finished), `computed`, `failed` or `skipped`; in a status also `running` or `waiting`.

    `error`: the first line of what went wrong; `note`: of a running job how far it is and who runs it.
    """

    job: Job
    state: str
    seconds: float = 0.0
    error: str = ""
    note: str = ""

    def line(self) -> str:
        """Return one line: state, stage, point, and the error, the progress or the seconds if there are any."""
        note = self.error or self.note or (f"{self.seconds:.1f} s" if self.seconds else "")
        return f"{self.state:<8}  {self.job.stage:<11}  {self.job.label:<52}  {note}".rstrip()


@dataclass(frozen=True)
class Summary:
    """The outcomes of a whole study, in plan order."""

    study: Study
    outcomes: list[Outcome]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every job is finished."""
        return all(outcome.state in ("done", "computed") for outcome in self.outcomes)

    def count(self, state: str) -> int:
        """Return how many jobs are in a state."""
        return sum(outcome.state == state for outcome in self.outcomes)

    def text(self) -> str:
        """Return the closing words: one line for every failed job with its notebook, and the totals."""
        total = len(self.outcomes)
        if self.count("done") == total:
            return f"study {self.study.name} is finished: {total} jobs, nothing to do ({self.seconds:.1f} s)"
        states = ", ".join(f"{self.count(state)} {state}" for state in ("computed", "done", "failed", "skipped"))
        failed = [outcome for outcome in self.outcomes if outcome.state == "failed"]
        lines = [f"{outcome.line()} (see {outcome.job.reference}.failed.ipynb)" for outcome in failed]
        return "\n".join([*lines, f"study {self.study.name}: {total} jobs in {self.seconds:.0f} s: {states}"])


def status(study: Study) -> list[Outcome]:
    """Return the state of every job as the files tell it: `done`, `failed` with its error, `running` or `waiting`."""
    return [_state(study, job) for job in study.jobs]


def plan_table(study: Study):
    """Return the plan as a pandas DataFrame: one row per job with stage, point in the grid, state and key."""
    import pandas as pd

    rows = [{"stage": o.job.stage, **o.job.point, "state": o.state, "key": o.job.key} for o in status(study)]
    return pd.DataFrame(rows, dtype=object).fillna("")


def is_finished(study: Study, job: Job) -> bool:
    """Return whether nothing is left to do for a job."""
    return stage.is_complete(Artifact(study.folder / job.reference))


def _state(study: Study, job: Job) -> Outcome:
    artifact = Artifact(study.folder / job.reference)
    failed = stage.failed_notebook(artifact)
    if is_finished(study, job):
        return Outcome(job, "done", artifact.card["seconds"])
    lock = stage.lock(artifact)
    if lock.taken():
        return Outcome(job, "running", note=f"{told(stage.progress_file(artifact))} ({lock.owner()})".strip())
    if failed.is_file():
        return Outcome(job, "failed", error=read_json(failed)["metadata"]["hfprune"]["error"])
    waits_for = [name for name in job.depends_on if not Artifact(study.folder / name).done]
    return Outcome(job, "waiting", note=f"for {waits_for[0]}" if waits_for else "")
