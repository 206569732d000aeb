"""A study's grid: every job with its parameters, what it waits for, and its key, before anything runs."""

from dataclasses import dataclass, field, replace

from hfprune_nb.errors import UserError
from hfprune_nb.runs import stages
from hfprune_nb.runs.artifacts import address
from hfprune_nb.runs.parameters import complete
from hfprune_nb.runs.study import WEIGHTS_ONLY, Study


@dataclass(frozen=True)
class Job:
    """One stage run of the grid: all its parameters, the references it depends on, and its point in the grid."""

    stage: str
    parameters: dict
    depends_on: tuple[str, ...]
    point: dict = field(default_factory=dict)

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
        """Its point in words, such as `smollm2-135m, seed 0, entropy, 0.2`."""
        words = [f"seed {value}" if name == "seed" else str(value) for name, value in self.point.items() if value != ""]
        return ", ".join(words)


def plan(study: Study) -> list[Job]:
    """Return the jobs of a study in the order in which ready ones are started; equal studies give equal plans.

    Dense evaluations come first, because every other evaluation waits for one; the figures and the questions wait for
    everything that they show. The dense model is tuned once, as the control of every tuned model.
    """
    jobs = {}

    def add(name, point, depends_on=(), **values):
        parameters = complete(name, study.sections[name] | values)
        job = Job(name, parameters, tuple(depends_on), point)
        return jobs.setdefault(job.reference, job).reference

    for name in ("cost", "experiments"):
        for model in study.models if name in study.sections else ():
            add(name, {"model": model}, model=model)
    if study.criteria:
        _add_grid(study, add)
    for name in ("figures", "questions"):
        if name in study.sections and (study.criteria or name == "questions"):
            lists = {
                parameter: [reference for reference, job in jobs.items() if job.stage == given.stage]
                for parameter, given in stages.STAGES[name].inputs.items()
            }
            add(name, {}, [reference for references in lists.values() for reference in references], **lists)
    return list(jobs.values())


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
    points = [
        {"model": model, "seed": seed, "criterion": criterion, axis: ratio, **repair}
        for model in study.models
        for ratio in study.ratios or study.neuron_ratios
        for criterion in study.criteria
        for repair in repairs
        for seed in (study.seeds[:1] if criterion in WEIGHTS_ONLY else study.seeds)
    ]
    pruned = []
    for point in points:
        used = scores[point["model"], point["seed"]]
        values = {"ratio": 0.0, "neuron_ratio": 0.0} | point
        point[axis] = f"{point[axis]:.4g}"
        if point.get("compensation") == "none":
            del point["compensation"]
        pruned.append((point, add("pruning", point, [used], scores=used, **values)))
    for point, used in pruned:
        model = point["model"]
        add("evaluation", point, [used, dense[model]], model=model, pruned=used, reference=dense[model])
    if "recovery" in study.sections:
        untuned = [({"model": model, "criterion": "dense"}, "") for model in study.models]
        untuned += [(point, used) for point, used in pruned if point["criterion"] in study.recovery_criteria]
        for point, used in untuned:
            point, model = point | {"recovery": "tuned"}, point["model"]
            tuned = add("recovery", point, [used] if used else [], model=model, pruned=used)
            given = {"pruned": used, "recovered": tuned, "reference": dense[model]}
            add("evaluation", point, filter(None, given.values()), model=model, **given)


def find_job(study: Study, reference: str) -> Job:
    """Return the job of a study that is called `stage/key`; raises UserError when it has none."""
    for job in plan(study):
        if job.reference == reference:
            return job
    raise UserError(f"study {study.name} has no job {reference!r}: `hfprune study graph {study.name}` lists them")


def without(job: Job, lost: list[str]) -> Job | None:
    """Return `job` without the list entries that were lost, or None when it cannot run without them."""
    if not lost:
        return job
    inputs = stages.STAGES[job.stage].inputs
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
