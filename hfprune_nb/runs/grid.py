"""A study's grid: every job with its parameters, what it waits for, and its key, before anything runs."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.runs import pins
from hfprune_nb.runs.keys import address
from hfprune_nb.runs.parameters import complete
from hfprune_nb.runs.stages import STAGES

# Coordinates that say what they are by themselves, and are shown also where they have the default's value.
PLAIN = ("model", "criterion", "ratio", "neuron_ratio", "allocation", "compensation", "recovery")
ALWAYS = ("seed", "criterion", "ratio", "neuron_ratio")


@dataclass(frozen=True)
class Job:
    """One stage run of the grid: all its parameters, the references it depends on, and its point in the grid."""

    stage: str
    parameters: dict
    depends_on: tuple[str, ...]
    point: dict = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The key of its artifact."""
        return address(self.stage, self.parameters)

    @property
    def reference(self) -> str:
        """`stage/key`."""
        return f"{self.stage}/{self.key}"

    @property
    def label(self) -> str:
        """Its point in words, such as `smollm2-135m, seed 0, entropy, 0.2`."""
        return ", ".join(str(value) if name in PLAIN else f"{name} {value}" for name, value in self.point.items())


class Grid:
    """The jobs of a study while its stages plan them, one stage after the other."""

    def __init__(self, study):
        self.study = study
        self.commits = pins.known(paths.results() / study.name)
        self.jobs: dict[str, Job] = {}

    def of(self, stage: str) -> list[Job]:
        """Return the jobs of a stage that are planned by now."""
        return [job for job in self.jobs.values() if job.stage == stage]

    def combinations(self, stage: str) -> Iterator[dict]:
        """Yield the parameters of every combination of the study's axes at a stage; an empty one where it has none."""
        axes = self.study.axes.get(stage, {})
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def add(self, stage: str, point: dict, values: dict) -> Job:
        """Add the job of a stage with these parameters, and return it: the same as before where it is there already.

        point : where the jobs that it builds on stand in the grid; what the study's axes say of this stage is added.
        """
        parameters = pins.pinned(stage, complete(stage, self.study.sections[stage] | values), self.commits)
        defaults = complete(stage, self.study.sections[stage])
        axes = self.study.axes.get(stage, {})
        own = {name: shown(parameters[name]) for name in axes if name in ALWAYS or parameters[name] != defaults[name]}
        inputs = [parameters[name] for name in STAGES[stage].inputs]
        named = [name for given in inputs for name in (given if isinstance(given, list) else [given]) if name]
        job = Job(stage, parameters, tuple(named), point | own)
        return self.jobs.setdefault(job.reference, job)


def shown(value):
    """Return a value of an axis as it stands in a point: a ratio short, a variant by its name."""
    if isinstance(value, dict):
        return value.get("as") or next(iter(value))
    return f"{value:.4g}" if isinstance(value, float) else value


def plan(study) -> list[Job]:
    """Return the jobs of a study in the order in which ready ones are started; equal studies give equal plans.

    Of those that wait for nothing, what most others wait for comes first; the last jobs show all others.
    """
    grid = Grid(study)
    for name, stage in STAGES.items():
        if name in study.sections and (stage.section or study.variants):
            stage.plan(grid)
    jobs = list(grid.jobs.values())
    waited_for = Counter(name for job in jobs for name in job.depends_on)
    return sorted(jobs, key=lambda job: (bool(job.depends_on), 0 if job.depends_on else -waited_for[job.reference]))


def find_job(study, reference: str) -> Job:
    """Return the job of a study that is called `stage/key`; raises UserError when it has none."""
    for job in plan(study):
        if job.reference == reference:
            return job
    raise UserError(f"study {study.name} has no job {reference!r}: `hfprune study graph {study.name}` lists them")


def without(job: Job, lost: list[str]) -> Job | None:
    """Return `job` without the list entries that were lost, or None when it cannot run without them."""
    if not lost:
        return job
    inputs = STAGES[job.stage].inputs
    parameters = dict(job.parameters)
    for name, given in inputs.items():
        if given.many:
            parameters[name] = [reference for reference in parameters[name] if reference not in lost]
        elif parameters[name] in lost:
            return None
    # An empty list would mean every artifact in the folder, also those of other settings.
    if any(given.many and job.parameters[name] and not parameters[name] for name, given in inputs.items()):
        return None
    return replace(job, parameters=parameters, depends_on=tuple(set(job.depends_on) - set(lost)))
