"""What a study will cost before it runs: seconds, tokens, memory and disk of every job, from measured rates.

The unit of work is the parameter-token: one token through one parameter, forward. Scoring does one forward pass and one
backward pass of activations per criterion, each worth one unit; training does three. Every stage has one rate for each kind
of device, fitted from the cards of studies that ran (`fit`, kept in data/rates.yaml with their protocol). Rates are of one
worker while the others work too.
"""

import functools
import heapq
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.inputs import hub
from hfprune_nb.machine import processor
from hfprune_nb.runs import keys
from hfprune_nb.runs.grid import Job
from hfprune_nb.runs.stages import STAGES
from hfprune_nb.runs.stages.base import size as model_size
from hfprune_nb.runs.status import status
from hfprune_nb.runs.study import Study

WORKERS = (1, 8, 64)


@dataclass(frozen=True)
class Need:
    """What one job needs: wall-clock seconds, tokens that pass a model, GB of memory and GB of disk.

    Memory is the host's on a CPU and the device's on a GPU.
    """

    seconds: float
    tokens: float
    memory: float
    disk: float


def rates() -> dict:
    """Return data/rates.yaml: `devices` (cpu, gpu), `models` (parameters), `tasks` (items, tokens of each) and so on.

    Raises UserError when the file is missing.
    """
    path = paths.data() / "rates.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: set HFPRUNE_HOME to the folder of the kit")
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def need(stage: str, parameters: dict, known: dict, ancestor: Callable[[str], dict]) -> Need:
    """Return what a stage run needs, by the rates `known` (see `rates`)."""
    kind = device(parameters)
    rate = known["devices"].get(kind) or known["devices"]["cpu"]
    amount, tokens = STAGES[stage].work(parameters, known, ancestor)
    size = model_size(parameters, known)
    seconds = rate["startup_seconds"] + amount * rate["seconds_per_unit"].get(stage, 0)
    memory = rate["base_gb"] + rate["gb_per_billion_parameters"].get(stage, 0) * size / 1e9
    memory += STAGES[stage].memory(parameters, known, ancestor)
    return Need(seconds, tokens, memory, STAGES[stage].disk(parameters, size, known))


def download(jobs: list[Job]) -> float:
    """Return the GB that jobs read from the hub: every model and data set once, of large data sets so many files as they need."""
    known, models, files, whole = rates(), {}, {}, {}
    for job in jobs:
        for name, kind in STAGES[job.stage].from_hub(job.parameters) if "revisions" in job.parameters else ():
            repository = hub.repository(name)
            facts = known["data_sets"].get(repository, {})
            if repository and kind == "model":
                models[repository] = 2 * known["models"].get(repository, known["models"]["default"]) / 1e9
            elif job.stage == "calibration" and facts.get("documents_per_file"):
                long = facts["documents_per_file"] * facts["share_of_long_documents"]
                needed = math.ceil(1 + job.parameters["n_windows"] / long)
                files[repository, job.parameters["seed"]] = needed * facts["file_gb"]
            elif repository:
                whole[repository] = facts.get("gb", 0.02)
    return sum([*models.values(), *files.values(), *whole.values()])


def device(parameters: dict) -> str:
    """Return `gpu` or `cpu`: where a stage with these parameters runs its model, `auto` being decided by this machine."""
    return "cpu" if keys.device(parameters.get("device", "cpu")) == "cpu" else "gpu"


def makespan(seconds: dict[str, float], depends_on: dict[str, tuple[str, ...]], workers: int) -> float:
    """Return when the last of the jobs ends, if `workers` always take the first ready one in the given order.

    >>> makespan({"score": 2.0, "prune": 1.0, "dense": 3.0}, {"score": (), "prune": ("score",), "dense": ()}, workers=2)
    3.0
    """
    waiting, now = dict(seconds), 0.0
    ended: dict[str, float] = {}
    running: list[tuple[float, str]] = []
    while waiting or running:
        ready = [name for name in waiting if all(other in ended or other not in seconds for other in depends_on[name])]
        for name in ready[: workers - len(running)]:
            heapq.heappush(running, (now + waiting.pop(name), name))
        now, name = heapq.heappop(running)
        ended[name] = now
    return now


def fit(studies: list[tuple[dict, float]], known: dict) -> dict:
    """Return the rates of the CPU, fitted to `studies`: (cards by reference, seconds before a notebook's clock starts).

    A stage's rate is the median over its runs of seconds per unit of work, which one slow first run does not move.
    Stages that no study has run keep the rate that stands in `known`.
    """
    seconds: dict[str, list] = {}
    memory: dict[str, list] = {}
    for cards, _ in studies:
        for card in cards.values():
            stage, parameters = card["stage"], card["parameters"]
            if device(parameters) != "cpu":
                continue
            ancestor = functools.partial(_parameters, cards)
            amount, _ = STAGES[stage].work(parameters, known, ancestor)
            seconds.setdefault(stage, []).append(card["seconds"] / amount)
            size = model_size(parameters, known)
            of_model = card["peak_memory_bytes"] / 1e9 - 0.6 - STAGES[stage].memory(parameters, known, ancestor)
            memory.setdefault(stage, []).append(max(0.0, of_model) / (size / 1e9))
    before = known["devices"]["cpu"]
    return before | {
        "startup_seconds": round(statistics.median(startup for _, startup in studies), 2),
        "seconds_per_unit": before["seconds_per_unit"] | {name: _short(statistics.median(v)) for name, v in seconds.items()},
        "base_gb": 0.6,
        "gb_per_billion_parameters": before["gb_per_billion_parameters"]
        | {name: round(statistics.median(v), 2) for name, v in memory.items() if name not in ("figures", "questions")},
    }


def _parameters(cards: dict, reference: str) -> dict:
    return cards[reference]["parameters"]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def total(needs: dict[str, Need], depends_on: dict[str, tuple[str, ...]], workers: int) -> float:
    """Return the hours that a study's jobs take on so many workers."""
    return makespan({name: each.seconds for name, each in needs.items()}, depends_on, workers) / 3600


def in_words(hours: float) -> str:
    """Return a duration that a person reads at a glance: minutes below two hours, hours below two days, else days.

    >>> [in_words(hours) for hours in (0.5, 3.2, 72)]
    ['30 min', '3 h', '3.0 days']
    """
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.{int(hours < 240)}f} days"


def refit(cards_files: list[Path]) -> dict:
    """Fit the rates of the CPU to the exported cards of studies, write them to data/rates.yaml and return them.

    Each `cards.json` must have its study's run.log beside it, which tells how long a notebook takes to start.
    """
    known = rates()
    studies = [(read_json(path), startup_seconds(read_json(path), path.with_name("run.log"))) for path in cards_files]
    fitted = fit(studies, known)
    names = ", ".join(path.parent.name for path in cards_files)
    machines = sorted({f"{card['cpu_count']} cores" for cards, _ in studies for card in cards.values()})
    processors = sorted({card.get("processor", "unknown") for cards, _ in studies for card in cards.values()})
    fitted["processor"] = " and ".join(processors)
    fitted["protocol"] = (
        f"Measured: median seconds per unit of work over the cards of {names}, notebooks and threads at a time as "
        f"their study files say, on {', '.join(machines)}; stages that these studies lack keep rates that were not measured."
    )
    known = known | {"devices": known["devices"] | {"cpu": fitted}}
    text = yaml.dump(known, Dumper=_Dumper, sort_keys=False, width=110)
    (paths.data() / "rates.yaml").write_text(text, encoding="utf-8")
    return fitted


class _Dumper(yaml.SafeDumper):
    """YAML with each list on one line."""


_Dumper.add_representer(list, lambda dumper, found: dumper.represent_sequence("tag:yaml.org,2002:seq", found, flow_style=True))


def startup_seconds(cards: dict, log: Path) -> float:
    """Return the seconds from starting a job to its notebook's first step: medians of run.log beyond those of the cards."""
    told: dict = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[1] == "computed" and words[-1] == "s":
            told.setdefault(words[2], []).append(float(words[-2]))
    carded = {stage: [card["seconds"] for card in cards.values() if card["stage"] == stage] for stage in told}
    return statistics.median(statistics.median(told[stage]) - statistics.median(carded[stage]) for stage in told if carded[stage])


def graph(study: Study) -> dict:
    """Return the study for a workflow engine: its run settings and jobs, each with what it needs and the file it ends with."""
    wanted = needs(study)
    jobs = [
        {
            "reference": job.reference,
            "stage": job.stage,
            "needs": list(job.depends_on),
            "point": job.label,
            "output": str(study.folder / job.reference / "notebook.ipynb"),
            # A request, not a forecast: engines stop what takes more.
            "minutes": 10 + math.ceil(3 * wanted[job.reference].seconds / 60),
            "memory_mb": 1000 + math.ceil(1500 * wanted[job.reference].memory),
            "gpus": gpus_wanted(job.parameters),
        }
        for job in study.jobs
    ]
    return {"study": study.name, "folder": str(study.folder), "assets": study.assets, **study.run, "jobs": jobs}


def elsewhere(kind: str) -> str:
    """Return, in one sentence, that the rates of a kind of device are another machine's; empty where they are this one's."""
    measured = rates()["devices"][kind].get("processor", "unknown")
    if kind == "cpu" and measured != (here := processor()):
        return (
            f"these rates are another machine's (processor: {measured}; here: {here}), so times may be several times longer or "
            "shorter: a run corrects them by what it has finished, `hfprune study rates` for good."
        )
    return ""


def gpus_wanted(parameters: dict) -> int:
    """Return how many GPUs a stage run with these parameters needs: one for each of its processes."""
    return parameters.get("processes", 1) if device(parameters) == "gpu" else 0


def needs(study: Study, jobs: list[Job] | None = None) -> dict[str, Need]:
    """Return reference -> what that job of the study will need, by measured rates; of `jobs`, or of all."""
    wanted = {job.reference: job for job in jobs or study.jobs}
    known = rates()
    return {
        name: need(job.stage, job.parameters, known, lambda reference: wanted[reference].parameters)
        for name, job in wanted.items()
    }


def hours(study: Study, workers: int, only_missing: bool = False) -> float:
    """Return how many hours the study will take on so many workers or GPUs, whole or what is missing of it."""
    wanted = needs(study)
    if only_missing:
        wanted = {outcome.job.reference: wanted[outcome.job.reference] for outcome in status(study) if outcome.state != "done"}
    return total(wanted, {job.reference: job.depends_on for job in study.jobs}, workers)


def overdue(study: Study) -> list[Job]:
    """Return the jobs that by the forecast will be stopped by `run.timeout_minutes`."""
    wanted = needs(study)
    return [job for job in study.jobs if wanted[job.reference].seconds > 60 * study.run["timeout_minutes"]]


def by_stage(study: Study) -> dict[str, dict]:
    """Return the forecast of a study: stage -> jobs, done, tokens, hours of one worker, GB of memory and of disk."""
    wanted = needs(study)
    rows: dict[str, dict] = {}
    for outcome in status(study):
        each = wanted[outcome.job.reference]
        row = rows.setdefault(outcome.job.stage, {"jobs": 0, "done": 0, "tokens": 0.0, "hours": 0.0, "memory": 0.0, "disk": 0.0})
        row["jobs"] += 1
        row["done"] += outcome.state == "done"
        row["tokens"] += each.tokens
        row["hours"] += each.seconds / 3600
        row["memory"] = max(row["memory"], each.memory)
        row["disk"] += each.disk
    return rows


def forecast_table(study: Study):
    """Return `by_stage` as a pandas DataFrame."""
    import pandas as pd

    return pd.DataFrame.from_dict(by_stage(study), orient="index")
