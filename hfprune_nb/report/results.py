"""A study's artifacts as tidy frames: evaluations, scores, kept neurons, experiments."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hfprune_nb.errors import UserError
from hfprune_nb.files import by_layer
from hfprune_nb.report import choices, intervals
from hfprune_nb.report.apart import in_words, told_apart
from hfprune_nb.report.style import DENSE, UNIFORM, Legend, series, way

NO_ACCURACY = "pct_stereotype"
FIDELITY = ("js", "kl", "jaccard15", "top1")
MEASURES = {
    "task": "accuracy",
    "average": "average of tasks",
    "perplexity": "perplexity",
    "js": "JS distance",
    "kl": "KL",
    "jaccard15": "top-15 Jaccard",
    "top1": "top-1 agreement",
    **choices.MEASURES,
}
UNITS = {"task": "%", "average": "%", "perplexity": "", "js": "", "kl": "nat", "jaccard15": "", "top1": "%", **choices.UNITS}

# What no value can leave, so that no interval does.
LIMITS: dict[str, tuple[float, float]] = {
    "task": (0, 100),
    "average": (0, 100),
    "js": (0, 1),
    "kl": (0, np.inf),
    "jaccard15": (0, 1),
    "top1": (0, 100),
}
LIMITS |= choices.LIMITS
# Differences that are too small to matter: points, nats per token, JS distance, nats.
MARGINS = {"average": 0.5, "perplexity": 0.01, "js": 0.003, "kl": 0.01}
LOWER_IS_BETTER = ("perplexity", "js", "kl", "bits_per_byte")
FRAME_NAMES = {"items": "benchmark tasks", "perplexity": "perplexity", "fidelity": "fidelity to the dense model"}
KEYS = ["model", "criterion", "ratio", "seed"]
COLUMNS = {
    "items": ("task", "doc_id", "metric", "value"),
    "perplexity": ("corpus", "window", "tokens", "nll"),
    "fidelity": ("corpus", "window", "positions", "compared", *FIDELITY),
    "next_tokens": ("prompt_id", "prompt", "source", "rank", "token", "probability"),
}
# Columns that older evaluations lack.
LATER = {"items": choices.COLUMNS}


@dataclass(frozen=True)
class Results:
    """A study's evaluations as tidy frames; all but `tasks` have the columns model, criterion, ratio, seed (dense: -1).

    models: one row per evaluation (achieved_ratio, neuron_ratio, groups_removed, parameters). items, perplexity, fidelity,
    next_tokens: the evaluation artifact's rows, items in the metric that is shown, with `choices.COLUMNS`; fidelity holds all
    positions of a window, fidelity_positions also its low- and high-entropy ones apart (column positions). tasks: one row per
    model and task (metric, shots, version, evaluated and available items, source). legend: order, names and looks of the
    criteria.
    """

    models: pd.DataFrame
    items: pd.DataFrame
    perplexity: pd.DataFrame
    fidelity: pd.DataFrame
    fidelity_positions: pd.DataFrame
    next_tokens: pd.DataFrame
    tasks: pd.DataFrame
    protocols: list[dict]
    notes: list[str]
    legend: Legend

    @property
    def model_names(self) -> list[str]:
        """The models of the study."""
        return list(dict.fromkeys(self.models["model"]))

    def compared(self, model: str) -> list[str]:
        """Return the criteria that are held against each other on `model`, in order."""
        return self.legend.compared(self.models.loc[self.models["model"] == model, "criterion"])

    def middle_ratio(self, model: str) -> float:
        """Return the middle one of the ratios at which `model` was pruned, 0 where it was not."""
        ratios = sorted(self.models.loc[(self.models["model"] == model) & (self.models["ratio"] > 0), "ratio"].unique())
        return float(ratios[(len(ratios) - 1) // 2]) if ratios else 0.0


@dataclass(frozen=True)
class Column:
    """One column of a table: a task, an average of tasks, or a measure on a corpus."""

    name: str
    measure: str
    label: str
    tasks: tuple[str, ...] = ()
    corpus: str = ""


def percent(ratio: float) -> str:
    """Return a ratio as per cent without trailing zeros, "20 %"."""
    return f"{100 * ratio:.4g} %"


def percents(ratios: Iterable[float]) -> str:
    """Return ratios as "10 %, 20 %"."""
    return ", ".join(percent(ratio) for ratio in ratios)


def collect(evaluation_folders: Iterable[Path], tuned: bool = False, compensation: str = "none", split: str = "none") -> Results:
    """Read evaluation artifacts into tidy frames; `Results.notes` says what is missing.

    Models that were tuned or compensated after pruning are left to the recovery tables (`tuning`), which ask for them by
    `tuned` and `compensation`: they would mix the effect of a criterion with that of a recipe. So are those that lost attention
    groups as well, which `attention` asks for by their split. Models that differ in a further parameter of what made them have
    it in their names (`apart.told_apart`). Raises UserError when there is no folder, an artifact is corrupt or incomplete, or two
    evaluations describe the same model, criterion, ratio and seed.
    """
    folders = [Path(folder) for folder in evaluation_folders]
    if not folders:
        raise UserError("evaluations is empty: run the evaluation stage (05) of this study first")
    read = told_apart((read_summary(folder), folder) for folder in folders)
    of_split = [(summary, folder) for summary, folder in read if split_of(summary) in (DENSE, split)]
    plain = [(summary, folder) for summary, folder in of_split if treatment(summary) == (tuned, compensation)]
    if not plain:
        raise UserError("evaluations holds tuned or compensated models only: add the evaluations (05) of the pruned ones")
    plain, others = _under_one_protocol(plain)
    names = Legend(spec for summary, _ in read for spec in specs(summary))

    def reading_order(evaluation: tuple[dict, Path]) -> tuple:
        row = model_row(evaluation[0])
        return row["model"], row["ratio"], names.order(row["criterion"]), row["seed"]

    # Artifacts come in the order of their hashes, which means nothing to a reader.
    summaries, folders = zip(*sorted(plain, key=reading_order), strict=True)
    models = pd.DataFrame([model_row(summary) for summary in summaries])
    if repeated := _repeated(plain):
        first = model_row(repeated[0][0])
        raise UserError(
            f"evaluations holds {first['model']}, {first['criterion']} at ratio {first['ratio']:g} and seed {first['seed']} more "
            f"than once, {_told_apart(repeated)}: list the ones that are meant"
        )
    frames = {name: _stack(name, folders, models) for name in COLUMNS}
    metrics = {
        (row["model"], task): facts.get("metric")
        for row, summary in zip(models.to_dict("records"), summaries, strict=True)
        for task, facts in summary["protocol"].get("tasks", {}).items()
    }
    frames["fidelity_positions"] = frames["fidelity"]
    frames["fidelity"] = frames["fidelity"][frames["fidelity"]["positions"] == "all"]
    items = frames["items"]
    wanted = pd.Series([metrics.get(pair) for pair in zip(items["model"], items["task"], strict=True)], items.index)
    frames["items"] = items[wanted.isna() | (wanted == items["metric"])]
    notes = [f"Not shown, as they were made with other settings: {_told_apart(others, plain)}."] if others else []
    notes += [f"Models whose names say no more are those of {words}." for words in _unnamed(summaries)]
    notes += [f"No {FRAME_NAMES[name]} in these evaluations." for name in FRAME_NAMES if frames[name].empty]
    notes += [
        f"{name}: the dense model was not evaluated."
        for name in models["model"].unique()
        if DENSE not in set(models.loc[models["model"] == name, "criterion"])
    ]
    notes += list(dict.fromkeys(note for summary in summaries for note in summary.get("notes", [])))
    notes += list(dict.fromkeys(sentence for summary in summaries for sentence in summary.get("skipped", {}).values()))
    if not tuned and compensation == "none" and (left := len(of_split) - len(plain)):
        notes.append(f"{left} evaluations of tuned or compensated models are not shown here.")
    if split == "none" and (left := len(read) - len(of_split)):
        notes.append(f"{left} evaluations of models that lost attention groups are not shown here.")
    tasks = _task_facts(summaries, frames["items"])
    protocols = [versions(folder) | summary["protocol"] for folder, summary in zip(folders, summaries, strict=True)]
    return Results(models=models, tasks=tasks, protocols=protocols, notes=notes, legend=names, **frames)


def versions(folder: Path) -> dict:
    """Return the versions of torch and transformers that made an artifact, from its card; empty for a folder without one."""
    path = Path(folder) / "card.json"
    if not path.is_file():
        return {}
    card = json.loads(path.read_text(encoding="utf-8"))
    return {name: card["versions"].get(name) for name in ("torch", "transformers")}


def _unnamed(summaries: Iterable[dict]) -> list[str]:
    """Return in words the further parameters that models have whose names do not say them."""
    return list(dict.fromkeys(in_words(each["apart"]) for each in summaries if each["apart"] and not each["further"]))


def _repeated(read: list[tuple[dict, Path]]) -> list[tuple[dict, Path]]:
    """Return the evaluations of the first model, criterion, ratio and seed that occurs more than once."""
    found: dict[tuple, list] = {}
    for summary, folder in read:
        found.setdefault(tuple(model_row(summary)[key] for key in KEYS), []).append((summary, folder))
    return next((same for same in found.values() if len(same) > 1), [])


def _settings(summary: dict) -> dict:
    protocol = summary["protocol"]
    names = protocol.keys() - {"tasks", "calibration", "scoring", "commits", "model_revision", "device"}
    return {name: protocol[name] for name in sorted(names)} | {"tasks": sorted(protocol.get("tasks", {}))}


def _under_one_protocol(read: list[tuple[dict, Path]]) -> tuple[list[tuple[dict, Path]], list[tuple[dict, Path]]]:
    """Return the evaluations to show, and those left out: where one occurs twice, only the settings that most of them share.

    An evaluation of one's own beside a study's must not hide the study.
    """
    if not _repeated(read):
        return read, []
    groups: dict[str, list] = {}
    for summary, folder in read:
        groups.setdefault(json.dumps(_settings(summary), sort_keys=True), []).append((summary, folder))
    largest = max(groups.values(), key=len)
    if sum(len(group) == len(largest) for group in groups.values()) > 1:
        return read, []
    return largest, [pair for group in groups.values() if group is not largest for pair in group]


def _told_apart(listed: list[tuple[dict, Path]], beside: Sequence[tuple[dict, Path]] = ()) -> str:
    """Return the evaluations' references, each with the settings in which they differ from each other or from those `beside`."""
    settings = [_settings(summary) | summary["protocol"].get("calibration", {}) for summary, _ in [*listed, *beside]]
    differ = [name for name in settings[0] if len({json.dumps(each.get(name)) for each in settings}) > 1]
    told = [
        (f"{folder.parent.name}/{folder.name}", ", ".join(f"{name} {own.get(name)}" for name in differ))
        for (_, folder), own in zip(listed, settings, strict=False)
    ]
    return "; ".join(f"{reference} ({what})" if what else reference for reference, what in told)


def treatment(summary: dict) -> tuple[bool, str]:
    """Return whether the evaluated model was tuned, and how it was compensated for its loss."""
    return bool(summary.get("tuned")), summary.get("compensation", "none")


def split_of(facts: dict) -> str:
    """Return how a pruned model's loss was shared between MLPs and attention, as `selection.SPLITS` has it; `dense` of that."""
    return DENSE if facts["criterion"] == DENSE else facts.get("attention_split", "none")


def way_of(facts: dict) -> str:
    """Return the allocation of an artifact's facts, with the further parameters that tell it apart, as `style.way` does."""
    return way(facts.get("allocation", UNIFORM), facts.get("further", ""))


def specs(facts: dict) -> list:
    """Return the specs of the criteria, each with its allocation's and what tells it apart, that an artifact's facts name.

    There is none for the dense model.
    """
    if facts.get("criterion") == DENSE:
        return []
    allocation = facts.get("allocation_spec", facts.get("allocation", UNIFORM))
    further = facts.get("further", "")
    return [(spec, allocation, further) for spec in facts.get("criteria") or [facts.get("criterion_spec", facts["criterion"])]]


def legend(folders: Iterable[Path]) -> Legend:
    """Return order, names and looks of the criteria that artifacts of any stage name."""
    kinds = ("scores", "pruning", "summary", "experiments")
    files = [path for folder in folders for kind in kinds if (path := Path(folder) / f"{kind}.json").is_file()]
    by_kind = [told_apart((_facts(path), path.parent) for path in files if path.stem == kind) for kind in kinds]
    return Legend(spec for read in by_kind for facts, _ in read for spec in specs(facts))


def read_summary(folder: Path) -> dict:
    """Return an evaluation's summary.json; raises UserError where it is missing, corrupt or incomplete."""
    summary = _facts(folder / "summary.json", "name an evaluation of stage 05")
    if missing := [name for name in ("model", "criterion", "ratio", "seed", "protocol") if name not in summary]:
        raise UserError(f"{folder / 'summary.json'} lacks {missing[0]!r}: delete the folder and rerun the evaluation")
    return summary


def model_row(summary: dict) -> dict:
    """Return an evaluation's row of `Results.models`."""
    ratio = summary["ratio"] if summary["ratio"] is not None else summary.get("achieved_ratio")
    return {
        "model": summary["model"],
        "criterion": series(summary["criterion"], way_of(summary)),
        "ratio": round(float(ratio or 0), 4),
        # Frames cannot be pivoted on a missing seed, and a dense model has none.
        "seed": -1 if summary["seed"] is None else int(summary["seed"]),
        "achieved_ratio": summary.get("achieved_ratio"),
        "neuron_ratio": summary.get("neuron_ratio"),
        "groups_removed": summary.get("groups_removed", 0),
        "parameters": summary.get("parameters"),
    }


def _stack(name: str, folders: tuple[Path, ...], models: pd.DataFrame) -> pd.DataFrame:
    parts = [pd.DataFrame(columns=[*KEYS, *COLUMNS[name], *LATER.get(name, ())])]
    for folder, row in zip(folders, models[KEYS].to_dict("records"), strict=True):
        path = folder / f"{name}.parquet"
        if not path.exists():
            continue
        try:
            part = pd.read_parquet(path)
        except (OSError, ValueError):
            raise UserError(f"{path} is corrupt: delete the folder and rerun") from None
        if part.empty:
            continue
        if missing := [column for column in COLUMNS[name] if column not in part]:
            raise UserError(f"{path} lacks the column {missing[0]!r}: delete the folder and rerun the evaluation")
        parts.append(part.reindex(columns=[*COLUMNS[name], *LATER.get(name, ())]).assign(**row))
    return pd.concat(parts[1:], ignore_index=True) if len(parts) > 1 else parts[0]


def _task_facts(summaries: tuple[dict, ...], items: pd.DataFrame) -> pd.DataFrame:
    counts = items.groupby(["model", "task", *KEYS[1:]]).size().groupby(["model", "task"]).max()
    rows = {}
    for summary in summaries:
        for task, facts in summary["protocol"].get("tasks", {}).items():
            evaluated = counts.get((summary["model"], task), 0)
            rows[summary["model"], task] = {"model": summary["model"], "task": task, **facts, "evaluated": evaluated}
    for model, task in counts.index:
        rows.setdefault((model, task), {"model": model, "task": task, "evaluated": counts[model, task]})
    return pd.DataFrame(
        rows.values(), columns=["model", "task", "metric", "shots", "version", "items", "available", "evaluated", "source"]
    )


def columns(results: Results, model: str) -> list[Column]:
    """Return the criterion table's columns for one model: tasks, averages, perplexity and fidelity by corpus.

    The first of each measure is the one that stands for it where there is room for one: of averages that of the accuracies.
    """
    items, found = results.items[results.items["model"] == model], []
    facts = results.tasks[results.tasks["model"] == model].set_index("task")
    tasks = [task for task in facts.index if task in set(items["task"])]
    for task in tasks:
        metric = facts.loc[task, "metric"] if isinstance(facts.loc[task, "metric"], str) else ""
        found.append(Column(task, "task", f"{task} {metric}, %".replace(" ,", ","), (task,)))
    common = _common(items, tasks)
    accuracies = [task for task in common if facts.loc[task, "metric"] != NO_ACCURACY]
    if 0 < len(accuracies) < len(common):
        text = f"average of {len(accuracies)} without CrowS-Pairs, %"
        found.append(Column("average_without_crows", "average", text, tuple(accuracies)))
    if common:
        found.append(Column("average", "average", f"average of {len(common)} tasks, %", tuple(common)))
    for measure, frame in (("perplexity", results.perplexity), *((name, results.fidelity) for name in FIDELITY)):
        for corpus in frame.loc[frame["model"] == model, "corpus"].unique():
            unit = ", %" if UNITS[measure] == "%" else ""
            found.append(Column(f"{measure}:{corpus}", measure, f"{MEASURES[measure]} {corpus}{unit}", corpus=corpus))
    return found


def choice_columns(results: Results, model: str) -> list[Column]:
    """Return the measures of `choices`, each over the tasks of which every evaluation of the model kept the choices."""
    items = results.items[results.items["model"] == model]
    tasks = _common(items.assign(task=items["task"].where(items["right"] >= 0)), items["task"].unique())
    return [Column(measure, measure, text, tuple(tasks)) for measure, text in choices.MEASURES.items() if tasks]


def _common(items: pd.DataFrame, tasks: Iterable[str]) -> list[str]:
    # An average over different tasks would compare nothing, so only tasks that every model of the table answered enter.
    per_model = items.groupby([*KEYS])["task"].agg(set)
    return [task for task in tasks if all(task in answered for answered in per_model)]


def sample(results: Results, column: Column, model: str, criterion: str, ratio: float, positions: str = "all") -> pd.DataFrame:
    """Return one cell's data as the frame that `measure.statistics` takes (seed, item, value, weight or group).

    Tasks, probabilities and top-1 agreement are in per cent; perplexity is the log-perplexity, in nats per token. `positions`
    (all, low_entropy, high_entropy) selects those of a fidelity measure.
    """
    source = {"perplexity": results.perplexity} | dict.fromkeys(("task", "average", *choices.MEASURES), results.items)
    fidelity = results.fidelity_positions[results.fidelity_positions["positions"] == positions]
    frame = source.get(column.measure, fidelity)
    frame = frame[(frame["model"] == model) & (frame["criterion"] == criterion) & (frame["ratio"] == ratio)]
    scale = 100 if UNITS[column.measure] == "%" else 1
    if column.tasks:
        frame, value = frame[frame["task"].isin(column.tasks)], "value"
        if column.measure in choices.MEASURES:
            frame, value = choices.measures(frame), column.measure
        frame = frame.rename(columns={"doc_id": "item", "task": "group"})
        return frame.assign(value=scale * frame[value].astype(float))[["seed", "item", "group", "value"]]
    frame = frame[frame["corpus"] == column.corpus].rename(columns={"window": "item", "compared": "weight"})
    if column.measure == "perplexity":
        return intervals.log_perplexity_frame(frame[["seed", "item", "nll", "tokens"]]) if len(frame) else frame
    return frame.assign(value=scale * frame[column.measure].astype(float))[["seed", "item", "weight", "value"]]


def scores(scoring_folder: Path) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Return a scoring artifact's facts and the importance (neurons,) of each layer by criterion, in reading order.

    Higher means keep. Raises UserError when the artifact is corrupt.
    """
    facts = _facts(Path(scoring_folder) / "scores.json")
    tensors = by_layer(_tensors(Path(scoring_folder) / "scores.safetensors"))
    return facts, {name: tensors[name] for name in Legend(specs(facts)).in_order(tensors)}


def first_seeds(scoring_folders: Iterable[Path]) -> dict[str, Path]:
    """Return for each model the scoring artifact of its smallest seed."""
    found: dict = {}
    for folder in map(Path, scoring_folders):
        facts = _facts(folder / "scores.json")
        found.setdefault(facts["model"], []).append((facts["seed"] or 0, folder))
    return {model: min(folders)[1] for model, folders in sorted(found.items())}


def snapshots(scoring_folder: Path) -> dict[str, dict[int, list[np.ndarray]]]:
    """Return criterion -> number of windows -> importance by layer of a scoring; empty where no criterion read text."""
    path = Path(scoring_folder) / "snapshots.safetensors"
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for name, rows in by_layer(_tensors(path) if path.exists() else {}).items():
        criterion, _, n = name.rpartition("/")
        found.setdefault(criterion, {})[int(n)] = rows
    names = Legend(specs(_facts(Path(scoring_folder) / "scores.json")))
    return {criterion: found[criterion] for criterion in names.in_order(found)}


def prunings(folders: Iterable[Path]) -> list[tuple[dict, Path]]:
    """Return pruning artifacts' facts (03), told apart, and folders. Raises UserError when facts are missing or corrupt."""
    return told_apart((_facts(Path(folder) / "pruning.json"), folder) for folder in folders)


def kept(pruning_folder: Path) -> list[np.ndarray]:
    """Return each layer's kept neuron indices of a pruning artifact. Raises UserError when it is corrupt."""
    tensors = _tensors(Path(pruning_folder) / "kept.safetensors")
    return [tensors[f"layers.{layer}"] for layer in range(len(tensors))]


def experiment(folder: Path) -> dict:
    """Return the facts of an experiments artifact (08). Raises UserError when it is missing or corrupt."""
    return _facts(Path(folder) / "experiments.json", "run stage 08 of this study")


def importance_by_corpus(folder: Path) -> dict[str, dict[str, list[np.ndarray]]]:
    """Return corpus -> criterion -> importance by layer of an experiments artifact (08)."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, rows in by_layer(_tensors(Path(folder) / "corpora.safetensors")).items():
        corpus, _, criterion = name.rpartition("/")
        found.setdefault(corpus, {})[criterion] = rows
    return found


def _facts(path: Path, remedy: str = "name finished artifacts of the study") -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} is corrupt: delete its folder and rerun") from None


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name finished artifacts of the study") from None
    except SafetensorError:
        raise UserError(f"{path} is corrupt: delete its folder and rerun") from None
