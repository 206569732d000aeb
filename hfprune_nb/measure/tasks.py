"""lm-eval tasks by name: the harness's own prompts and metrics, on local records where the kit has them."""

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path

import datasets
import lm_eval.tasks
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hfprune_nb import paths, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.inputs.benchmarks import BENCHMARKS, benchmark_path

SOURCES = ("auto", "local", "hub")
# Known tasks whose records only the hub has: the harness's own file, and why they are skipped where the hub is not asked.
HUB_ONLY = {
    "race": ("race/race.yaml", "no package index has the official test split of RACE"),
    "crows_pairs_english": (
        "crows_pairs/crows_pairs_english.yaml",
        "package indexes have the pairs as first published only, the task crows_pairs_1508",
    ),
    "truthfulqa_mc2": (
        "truthfulqa/truthfulqa_mc2.yaml",
        "package indexes have a later edition of its answers only, the task truthfulqa_mc2_pypi",
    ),
    "sciq": ("sciq/sciq.yaml", "package indexes have its validation split only and the harness scores the test split"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "the kit has no local records of it"),
    "ifeval": ("ifeval/ifeval.yaml", "the kit has no local records of it"),
}
# Not in the paper: tasks in which the model writes its answer, hours on a CPU and minutes on a GPU.
GROUPS = {"generation": ("gsm8k", "ifeval")}
# The metric that tables show, by the parameter `metric`: the first of these that a task has. CrowS-Pairs has no accuracy.
METRICS = {"paper": ("acc_norm", "pct_stereotype", "acc"), "acc": ("acc", "pct_stereotype", "acc_norm")}


class LocalTask(ConfigurableTask):
    """A task whose `dataset_kwargs.data_files` (split -> .parquet or .jsonl) are read without the hub."""

    def download(self, dataset_kwargs: dict | None = None, **_) -> None:
        """Read every split's file into memory."""
        self.dataset = {split: _read(Path(file)) for split, file in dataset_kwargs["data_files"].items()}

    @functools.cached_property
    def eval_docs(self) -> datasets.Dataset:
        """The records that are scored; kept, as the harness prepares them anew at every look."""
        return super().eval_docs


def expand(names: str | Iterable[str]) -> list[str]:
    """Return task names in their order, each once, with the kit's own groups replaced by their tasks."""
    return list(
        dict.fromkeys(task for name in ([names] if isinstance(names, str) else names) for task in GROUPS.get(name, (name,)))
    )


def skipped(names: Iterable[str], source: str) -> dict[str, str]:
    """Return, for the tasks that cannot be evaluated under `source`, one sentence that says why and what else to do."""
    if source != "local":
        return {}
    return {
        name: f"{name} was skipped, because {HUB_ONLY[name][1]}; with task_source hub it is evaluated."
        for name in expand(names)
        if name in HUB_ONLY
    }


def load_tasks(names: Iterable[str], source: str = "auto") -> dict[str, Task]:
    """Return the named lm-eval tasks, in that order; a group or tag gives each of its tasks, `skipped` ones are left out.

    source  `local`: the tasks of `inputs.benchmarks` and of `data/tasks/`, with no network; `hub`: the harness's own
            task and data; `auto`: local where there is such a task, else the hub.
    Raises UserError for an unknown task (with the nearest names), one that the hub does not have under `hub`, and data
    that the hub does not give.
    """
    if source not in SOURCES:
        raise UserError(f"source={source!r} is unknown: choose one of {', '.join(SOURCES)}")
    found, left_out = {}, skipped(names, source)
    for name in expand(names):
        if name in left_out:
            continue
        if source != "hub" and name in local_names():
            found[name] = _local_task(name)
        elif source == "local":
            raise UserError(f"task {name!r} has no local records: choose of {', '.join(local_names())}, or source='hub'")
        else:
            found.update(_hub_tasks(name))
    return found


def local_names() -> list[str]:
    """Return the tasks that need no hub: the benchmarks, then the files of `data/tasks/`."""
    return [*BENCHMARKS, *sorted(file.stem for file in _own_folder().glob("*.yaml"))]


def describe(task: Task) -> dict:
    """Return what a result row says of its task: metrics, shots, version, items, and the source of its records."""
    local = isinstance(task, LocalTask)
    return {
        "metrics": list(task.aggregation()),
        "shots": task.config.num_fewshot or 0,
        "version": task.VERSION,
        "items": len(task.eval_docs),
        "source": "local" if local else f"hub: {task.DATASET_PATH}{_commit(task)}",
    }


def _commit(task: Task) -> str:
    commit = (task.config.dataset_kwargs or {}).get("revision", "")
    return f" at {commit[:12]}" if commit else ""


def shown_metric(metrics: list[str], choice: str) -> str:
    """Return which of a task's metrics its tables show; `choice` is a key of METRICS.

    `paper`: acc_norm where the harness gives it, pct_stereotype for CrowS-Pairs, else acc; `acc`: acc where there is one.
    """
    return next((metric for metric in METRICS[choice] if metric in metrics), metrics[0])


def _own_folder() -> Path:
    return paths.data() / "tasks"


def _harness_file(name: str) -> Path | None:
    """Return the harness's own file of a task; None for groups, tags, and what it does not have."""
    if name in BENCHMARKS or name in HUB_ONLY:
        return Path(lm_eval.tasks.__file__).parent / (BENCHMARKS[name].harness_file if name in BENCHMARKS else HUB_ONLY[name][0])
    entry = _task_manager().task_index.get(name)
    return entry.yaml_path if entry and entry.kind.name == "TASK" else None


def _local_task(name: str) -> LocalTask:
    if name in BENCHMARKS:
        split = BENCHMARKS[name].split
        # The harness takes shots from whatever other split is named and fails where it is absent, even for no shots.
        absent = {f"{other}_split": None for other in ("training", "validation", "test") if other != split}
        files = {split: str(benchmark_path(name))}
        stock = load_yaml(_harness_file(name))
        config = {**stock, **absent, "task": name, "dataset_path": "parquet", "dataset_name": None}
    else:
        own = _own_folder() / f"{name}.yaml"
        config = load_yaml(own)
        try:
            # Paths in a task file of ours are relative to that file.
            files = {split: str(_own_folder() / file) for split, file in config["dataset_kwargs"]["data_files"].items()}
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"task file {own} lacks dataset_kwargs.data_files: give a file of records for each split") from error
    return LocalTask(config={**config, "dataset_kwargs": {"data_files": files}})


def _read(file: Path) -> datasets.Dataset:
    if file.suffix == ".parquet":
        return datasets.Dataset(pyarrow.parquet.read_table(file))
    records = [record for _, record in text_files.read_records(file, "task records")]
    try:
        return datasets.Dataset.from_list(records)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"task records {file} have a field that is not of one kind ({error}): give every record the same"
        ) from error


@functools.cache
def _task_manager() -> TaskManager:
    # Reads some 14,000 files, which takes several seconds.
    return TaskManager()


def _hub_tasks(name: str) -> dict[str, Task]:
    if name in BENCHMARKS and BENCHMARKS[name].edition_of:
        raise UserError(f"task {name!r} is local only: name {BENCHMARKS[name].edition_of} with source='hub'")
    file = _harness_file(name)
    if not file and name not in (listed := _task_manager().all_tasks):
        nearest = difflib.get_close_matches(name, {*local_names(), *GROUPS, *listed}, n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "`lm_eval ls tasks` lists the names"
        raise UserError(f"task {name!r} is unknown to lm-eval: {hint}")
    try:
        config = load_yaml(file) if file else {}
        repository = config.get("dataset_path", "")
        if "/" not in repository or "class" in config:
            with hub.errors("dataset", f"of the task {name}"):
                return hub.patiently(_task_manager().load, [name])["tasks"]
        commit = hub.commit(repository, "dataset")
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": commit}
        with hub.errors("dataset", repository, commit):
            return {name: hub.patiently(ConfigurableTask, config=config)}
    except ImportError as error:
        raise UserError(f"task {name!r} needs a package that is not installed ({error}): install lm_eval[{name}]") from error
    except UserError as error:
        raise UserError(f"task {name!r}: {error} These need no hub: {', '.join(local_names())}.") from error
