"""What a study will cost before it runs: seconds, tokens, memory and disk of every job, from measured rates.

The unit of work is the parameter-token: one token through one parameter, forward. Scoring does one forward pass and one
backward pass of activations per criterion, each worth one unit; training does three. Every stage has one rate for each kind
of device, fitted from the cards of studies that ran (`fit`, kept in data/rates.yaml with their protocol). Rates are of one
worker while the others work too.
"""

import functools
import heapq
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.runs.grid import Job, plan
from hfprune_nb.runs.status import status
from hfprune_nb.runs.study import Study

# Forward-equivalent passes of each criterion beyond the forward pass that they share.
PASSES = {"one_hot_ce": 1, "entropy": 1, "self_distillation": 3, "magnitude": 0, "random": 0}
TRAINING_PASSES = 3
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


def work(stage: str, parameters: dict, known: dict, ancestor: Callable[[str], dict]) -> tuple[float, float]:
    """Return a stage run's work and its tokens.

    The work is in parameter-tokens for stages that run a model, else in parameters (pruning), in evaluations shown (figures,
    questions) or one (calibration). `ancestor` leads from a reference to that job's parameters. Cost and experiments
    are counted in passes over their windows.
    """
    size = known["models"].get(parameters.get("model"), known["models"]["default"])
    match stage:
        case "scoring":
            windows = ancestor(parameters["calibration"])
            tokens = windows["n_windows"] * windows["seq_len"]
            passes = 1 + sum(PASSES.get(name, 1) for name in parameters["criteria"])
            return tokens * passes * size, tokens * passes
        case "evaluation":
            tokens = len(parameters["perplexity_corpora"]) * parameters["n_windows"] * parameters["seq_len"]
            for name in parameters["tasks"]:
                task = known["tasks"].get(name, known["tasks"]["default"])
                tokens += min(parameters["limit"] or task["items"], task["items"]) * task["tokens"]
            return tokens * size, tokens
        case "recovery":
            recipe, texts = known["recipes"][parameters["recipe"]], known["instructions"]
            records = parameters["n_records"] or texts["records"].get(parameters["data"], texts["records"]["default"])
            tokens = records * texts["tokens_per_record"] * (parameters["epochs"] or recipe["epochs"])
            if parameters["max_steps"]:
                rows = parameters["rows_per_step"] or recipe["rows_per_step"]
                tokens = parameters["max_steps"] * rows * (parameters["seq_len"] or recipe["seq_len"])
            return TRAINING_PASSES * tokens * size, tokens
        case "experiments":
            scored = (len(parameters["corpora"]) + 2) * (1 + len(parameters["criteria"]))
            scored += 3 * len(parameters["student_ratios"])
            groups = len(parameters["group_sizes"]) * (parameters["n_groups"] + len(parameters["criteria"]))
            ablations = parameters["n_layers"] * (parameters["n_single"] + groups)
            tokens = scored * parameters["n_windows"] * parameters["seq_len"]
            tokens += ablations * parameters["truth_windows"] * parameters["truth_seq_len"]
            return tokens * size, tokens
        case "cost":
            tokens = 20 * (parameters["repetitions"] + 1) * parameters["n_windows"] * parameters["seq_len"]
            return tokens * size, tokens
        case "pruning":
            return size, 0
        case "figures" | "questions":
            return len(parameters["evaluations"]) or 1, 0
    return 1, 0


def need(stage: str, parameters: dict, known: dict, ancestor: Callable[[str], dict]) -> Need:
    """Return what a stage run needs, by the rates `known` (see `rates`)."""
    kind = device(parameters)
    rate = known["devices"].get(kind) or known["devices"]["cpu"]
    amount, tokens = work(stage, parameters, known, ancestor)
    size = known["models"].get(parameters.get("model"), known["models"]["default"])
    seconds = rate["startup_seconds"] + amount * rate["seconds_per_unit"][stage]
    memory = rate["base_gb"] + rate["gb_per_billion_parameters"].get(stage, 0) * size / 1e9
    return Need(seconds, tokens, memory, _disk(stage, parameters, size, known))


def device(parameters: dict) -> str:
    """Return `gpu` or `cpu`: where a stage with these parameters runs its model, `auto` being decided by this machine."""
    named = parameters.get("device", "cpu")
    if named == "auto":
        return "gpu" if shutil.which("nvidia-smi") else "cpu"
    return "cpu" if named == "cpu" else "gpu"


def _disk(stage: str, parameters: dict, size: float, known: dict) -> float:
    """Return the GB that a stage run writes: scores and their snapshots, a checkpoint, else a notebook with its tables."""
    if stage == "scoring":
        return len(parameters["criteria"]) * known["neurons_per_parameter"] * size * 8 * 16 / 1e9
    if parameters.get("save_checkpoint") and stage in ("pruning", "recovery"):
        return 2 * size * (1 - parameters.get("ratio", 0)) / 1e9
    return 0.002


def makespan(seconds: dict[str, float], depends_on: dict[str, tuple[str, ...]], workers: int) -> float:
    """Return when the last of the jobs ends, if `workers` always take the first ready one in the given order."""
    waiting, ended, running, now = dict(seconds), {}, [], 0.0
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
    seconds, memory = {}, {}
    for cards, _ in studies:
        for card in cards.values():
            stage, parameters = card["stage"], card["parameters"]
            if device(parameters) != "cpu":
                continue
            amount, _ = work(stage, parameters, known, lambda reference, cards=cards: cards[reference]["parameters"])
            seconds.setdefault(stage, []).append(card["seconds"] / amount)
            size = known["models"].get(parameters.get("model"), known["models"]["default"])
            memory.setdefault(stage, []).append(max(0.0, card["peak_memory_bytes"] / 1e9 - 0.6) / (size / 1e9))
    before = known["devices"]["cpu"]
    return before | {
        "startup_seconds": round(statistics.median(startup for _, startup in studies), 2),
        "seconds_per_unit": before["seconds_per_unit"] | {name: _short(statistics.median(v)) for name, v in seconds.items()},
        "base_gb": 0.6,
        "gb_per_billion_parameters": before["gb_per_billion_parameters"]
        | {name: round(statistics.median(v), 2) for name, v in memory.items() if name not in ("figures", "questions")},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def total(needs: dict[str, Need], depends_on: dict[str, tuple[str, ...]], workers: int) -> float:
    """Return the hours that a study's jobs take on so many workers."""
    return makespan({name: each.seconds for name, each in needs.items()}, depends_on, workers) / 3600


def in_words(hours: float) -> str:
    """Return a duration that a person reads at a glance: minutes below two hours, hours below two days, else days."""
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
    fitted["protocol"] = (
        f"Measured: median seconds per unit of work over the cards of {names}, notebooks and threads at a time as "
        f"their study files say, on {', '.join(machines)}; stages that these studies lack keep rates that were not measured."
    )
    known = known | {"devices": known["devices"] | {"cpu": fitted}}
    (paths.data() / "rates.yaml").write_text(yaml.safe_dump(known, sort_keys=False, width=110), encoding="utf-8")
    return fitted


def startup_seconds(cards: dict, log: Path) -> float:
    """Return the seconds from starting a job to its notebook's first step: medians of run.log beyond those of the cards."""
    told = {}
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
        for job in plan(study)
    ]
    return {"study": study.name, "folder": str(study.folder), "assets": study.assets, **study.run, "jobs": jobs}


def gpus_wanted(parameters: dict) -> int:
    """Return how many GPUs a stage run with these parameters needs: one for each of its processes."""
    return parameters.get("processes", 1) if device(parameters) == "gpu" else 0


def needs(study: Study) -> dict[str, Need]:
    """Return reference -> what that job of the study will need, by measured rates."""
    jobs = {job.reference: job for job in plan(study)}
    known = rates()
    return {
        name: need(job.stage, job.parameters, known, lambda reference: jobs[reference].parameters) for name, job in jobs.items()
    }


def hours(study: Study, workers: int, only_missing: bool = False) -> float:
    """Return how many hours the study will take on so many workers or GPUs, whole or what is missing of it."""
    wanted = needs(study)
    if only_missing:
        wanted = {outcome.job.reference: wanted[outcome.job.reference] for outcome in status(study) if outcome.state != "done"}
    return total(wanted, {job.reference: job.depends_on for job in plan(study)}, workers)


def overdue(study: Study) -> list[Job]:
    """Return the jobs that by the forecast will be stopped by `run.timeout_minutes`."""
    wanted = needs(study)
    return [job for job in plan(study) if wanted[job.reference].seconds > 60 * study.run["timeout_minutes"]]


def forecast_table(study: Study):
    """Return the forecast as a pandas DataFrame: one row per stage with jobs, done, tokens, hours of one worker, GB."""
    import pandas as pd

    wanted, rows = needs(study), {}
    for outcome in status(study):
        each = wanted[outcome.job.reference]
        row = rows.setdefault(outcome.job.stage, {"jobs": 0, "done": 0, "tokens": 0.0, "hours": 0.0, "memory": 0.0, "disk": 0.0})
        row["jobs"] += 1
        row["done"] += outcome.state == "done"
        row["tokens"] += each.tokens
        row["hours"] += each.seconds / 3600
        row["memory"] = max(row["memory"], each.memory)
        row["disk"] += each.disk
    return pd.DataFrame.from_dict(rows, orient="index")
