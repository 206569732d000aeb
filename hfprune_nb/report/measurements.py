"""A study's evaluation artifacts as tidy frames, their columns in the tables, and the protocol behind them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hfprune_nb.errors import UserError
from hfprune_nb.report import intervals

CRITERIA = ("one_hot_ce", "self_distillation", "entropy")
ORDER = ("dense", *CRITERIA, "magnitude", "random")
LABELS = {
    "dense": "Dense",
    "one_hot_ce": "One-hot CE",
    "self_distillation": "Self-distillation",
    "entropy": "Entropy (HFPrune)",
    "magnitude": "Magnitude",
    "random": "Random",
}
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
}
UNITS = {"task": "%", "average": "%", "perplexity": "", "js": "", "kl": "nat", "jaccard15": "", "top1": "%"}
# What no value can leave, so that no interval does.
LIMITS = {"task": (0, 100), "average": (0, 100), "js": (0, 1), "kl": (0, np.inf), "jaccard15": (0, 1), "top1": (0, 100)}
LOWER_IS_BETTER = ("perplexity", "js", "kl")
FRAME_NAMES = {"items": "benchmark tasks", "perplexity": "perplexity", "fidelity": "fidelity to the dense model"}
SETTINGS = (
    ("dtype", "dtype"),
    ("device", "device"),
    ("lm-eval", "lm_eval"),
    ("limit", "limit"),
    ("batch size", "batch_size"),
    ("BOS", "bos"),
    ("window length", "seq_len"),
    ("model revision", "model_revision"),
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("hardware", "hardware"),
    ("commit", "commit"),
)
KEYS = ["model", "criterion", "ratio", "seed"]
COLUMNS = {
    "items": ("task", "doc_id", "metric", "value"),
    "perplexity": ("corpus", "window", "tokens", "nll"),
    "fidelity": ("corpus", "window", "positions", "compared", *FIDELITY),
    "next_tokens": ("prompt_id", "prompt", "source", "rank", "token", "probability"),
}


@dataclass(frozen=True)
class Results:
    """A study's evaluations as tidy frames; all but `tasks` have the columns model, criterion, ratio, seed (dense: -1).

    models: one row per evaluation (achieved_ratio, neuron_ratio, parameters). items, perplexity, fidelity, next_tokens:
    the evaluation artifact's rows; fidelity holds all positions of a window, fidelity_positions also its low- and
    high-entropy ones apart (column positions). tasks: one row per model and task (metric, shots, version, evaluated and
    available items, source).
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

    @property
    def model_names(self) -> list[str]:
        """The models of the study."""
        return list(dict.fromkeys(self.models["model"]))

    def middle_ratio(self, model: str) -> float:
        """Return the middle one of the ratios at which `model` was pruned, 0 where it was not."""
        ratios = sorted(self.models.loc[(self.models["model"] == model) & (self.models["ratio"] > 0), "ratio"].unique())
        return float(ratios[(len(ratios) - 1) // 2]) if ratios else 0.0


@dataclass(frozen=True)
class Column:
    """One column of the criterion table: a task, an average of tasks, or a measure on a corpus."""

    name: str
    measure: str
    label: str
    tasks: tuple[str, ...] = ()
    corpus: str = ""


def label(criterion: str) -> str:
    """Return a criterion's name for readers; a criterion that the kit does not know keeps its own."""
    return LABELS.get(criterion, criterion)


def in_order(criteria: Iterable[str]) -> list[str]:
    """Return criteria in the order of every table and legend: dense, the paper's three, the controls, any others."""
    return sorted(set(criteria), key=rank)


def rank(criterion: str) -> tuple[int, str]:
    """Return the sort key behind `in_order`."""
    return ORDER.index(criterion) if criterion in ORDER else len(ORDER), criterion


def percent(ratio: float) -> str:
    """Return a ratio as per cent without trailing zeros, "20 %"."""
    return f"{100 * ratio:.4g} %"


def collect(evaluation_folders: Iterable[Path], tuned: bool = False, compensation: str = "none") -> Results:
    """Read evaluation artifacts into tidy frames; `Results.notes` says what is missing.

    Models that were tuned or repaired after pruning are left to the recovery tables (`controls`), which ask for them by
    `tuned` and `compensation`: they would mix the effect of a criterion with that of a recipe. Raises UserError when there
    is no folder, an artifact is damaged or incomplete, or two evaluations describe the same model, criterion, ratio and seed.
    """
    folders = [Path(folder) for folder in evaluation_folders]
    if not folders:
        raise UserError("evaluations is empty: run the evaluation stage (05) of this study first")
    read = [(read_summary(folder), folder) for folder in folders]
    plain = [(summary, folder) for summary, folder in read if variant(summary) == (tuned, compensation)]
    if not plain:
        raise UserError("evaluations holds tuned or repaired models only: add the evaluations (05) of the pruned ones")
    # Artifacts come in the order of their hashes, which means nothing to a reader.
    summaries, folders = zip(*sorted(plain, key=_reading_order), strict=True)
    models = pd.DataFrame([_model_row(summary) for summary in summaries])
    repeated = models[models.duplicated(KEYS, keep=False)]
    if len(repeated):
        first = repeated.iloc[0]
        raise UserError(
            f"evaluations holds {first['model']}, {first['criterion']} at ratio {first['ratio']:g} and seed "
            f"{first['seed']} more than once, perhaps under two protocols: list the ones that are meant"
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
    notes = [f"No {FRAME_NAMES[name]} in these evaluations." for name in FRAME_NAMES if frames[name].empty]
    notes += [
        f"{name}: the dense model was not evaluated."
        for name in models["model"].unique()
        if "dense" not in set(models.loc[models["model"] == name, "criterion"])
    ]
    notes += list(dict.fromkeys(note for summary in summaries for note in summary.get("notes", [])))
    notes += list(dict.fromkeys(sentence for summary in summaries for sentence in summary.get("skipped", {}).values()))
    if not tuned and compensation == "none" and (left := len(read) - len(plain)):
        notes.append(f"{left} evaluations of tuned or repaired models are not shown here.")
    tasks = _task_facts(summaries, frames["items"])
    protocols = [made_with(folder) | summary["protocol"] for folder, summary in zip(folders, summaries, strict=True)]
    return Results(models=models, tasks=tasks, protocols=protocols, notes=notes, **frames)


def made_with(folder: Path) -> dict:
    """Return versions, hardware and commit of an artifact from its card; empty for a folder without one."""
    path = Path(folder) / "card.json"
    if not path.is_file():
        return {}
    card = json.loads(path.read_text(encoding="utf-8"))
    found = {name: card["versions"].get(name) for name in ("torch", "transformers")}
    place = card["facts"].get("hardware") or f"{card['cpu_count']} processors ({card['platform'].partition('-')[0]})"
    found["hardware"] = f"{place}, of which {card['threads']} used"
    commit = card["git"]["commit"]
    return found | {"commit": commit and commit[:12] + (" with changes" if card["git"]["dirty"] else "")}


def variant(summary: dict) -> tuple[bool, str]:
    """Return whether the evaluated model was tuned, and how it was repaired after pruning."""
    return bool(summary.get("tuned")), summary.get("compensation", "none")


def _reading_order(evaluation: tuple[dict, Path]) -> tuple:
    row = _model_row(evaluation[0])
    return row["model"], row["ratio"], rank(row["criterion"]), row["seed"]


def read_summary(folder: Path) -> dict:
    """Return an evaluation's summary.json; raises UserError where it is missing, damaged or incomplete."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no evaluation artifact, it has no summary.json: name one of stage 05") from None
    except json.JSONDecodeError:
        raise UserError(f"{folder / 'summary.json'} is damaged: delete the folder and rerun") from None
    if missing := [name for name in ("model", "criterion", "ratio", "seed", "protocol") if name not in summary]:
        raise UserError(f"{folder / 'summary.json'} lacks {missing[0]!r}: delete the folder and rerun the evaluation")
    return summary


def _model_row(summary: dict) -> dict:
    ratio = summary["ratio"] if summary["ratio"] is not None else summary.get("achieved_ratio")
    return {
        "model": summary["model"],
        "criterion": summary["criterion"],
        "ratio": round(float(ratio or 0), 4),
        # Frames cannot be pivoted on a missing seed, and a dense model has none.
        "seed": -1 if summary["seed"] is None else int(summary["seed"]),
        "achieved_ratio": summary.get("achieved_ratio"),
        "neuron_ratio": summary.get("neuron_ratio"),
        "parameters": summary.get("parameters"),
    }


def _stack(name: str, folders: tuple[Path, ...], models: pd.DataFrame) -> pd.DataFrame:
    parts = [pd.DataFrame(columns=[*KEYS, *COLUMNS[name]])]
    for folder, row in zip(folders, models[KEYS].to_dict("records"), strict=True):
        path = folder / f"{name}.parquet"
        if not path.exists():
            continue
        try:
            part = pd.read_parquet(path)
        except (OSError, ValueError):
            raise UserError(f"{path} is damaged: delete the folder and rerun") from None
        if part.empty:
            continue
        if missing := [column for column in COLUMNS[name] if column not in part]:
            raise UserError(f"{path} lacks the column {missing[0]!r}: delete the folder and rerun the evaluation")
        parts.append(part[list(COLUMNS[name])].assign(**row))
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
    """Return the criterion table's columns for one model: tasks, averages, perplexity and fidelity by corpus."""
    items, found = results.items[results.items["model"] == model], []
    facts = results.tasks[results.tasks["model"] == model].set_index("task")
    tasks = [task for task in facts.index if task in set(items["task"])]
    for task in tasks:
        metric = facts.loc[task, "metric"] if isinstance(facts.loc[task, "metric"], str) else ""
        found.append(Column(task, "task", f"{task} {metric}, %".replace(" ,", ","), (task,)))
    # An average over different tasks would compare nothing, so only tasks that every model of the table answered enter.
    per_model = items.groupby([*KEYS])["task"].agg(set)
    common = [task for task in tasks if all(task in answered for answered in per_model)]
    accuracies = [task for task in common if facts.loc[task, "metric"] != NO_ACCURACY]
    if common:
        found.append(Column("average", "average", f"average of {len(common)} tasks, %", tuple(common)))
    if 0 < len(accuracies) < len(common):
        text = f"average of {len(accuracies)} without CrowS-Pairs, %"
        found.append(Column("average_without_crows", "average", text, tuple(accuracies)))
    for measure, frame in (("perplexity", results.perplexity), *((name, results.fidelity) for name in FIDELITY)):
        for corpus in frame.loc[frame["model"] == model, "corpus"].unique():
            unit = ", %" if UNITS[measure] == "%" else ""
            found.append(Column(f"{measure}:{corpus}", measure, f"{MEASURES[measure]} {corpus}{unit}", corpus=corpus))
    return found


def sample(results: Results, column: Column, model: str, criterion: str, ratio: float, positions: str = "all") -> pd.DataFrame:
    """Return one cell's data as the frame that `measure.statistics` takes (seed, item, value, weight or group).

    Tasks and top-1 agreement are in per cent; perplexity is the log-perplexity, in nats per token. `positions` (all,
    low_entropy, high_entropy) selects those of a fidelity measure.
    """
    source = {"task": results.items, "average": results.items, "perplexity": results.perplexity}
    fidelity = results.fidelity_positions[results.fidelity_positions["positions"] == positions]
    frame = source.get(column.measure, fidelity)
    frame = frame[(frame["model"] == model) & (frame["criterion"] == criterion) & (frame["ratio"] == ratio)]
    if column.tasks:
        frame = frame[frame["task"].isin(column.tasks)]
        frame = frame.rename(columns={"doc_id": "item", "task": "group"})[["seed", "item", "group", "value"]]
        return frame.assign(value=100 * frame["value"].astype(float))
    frame = frame[frame["corpus"] == column.corpus].rename(columns={"window": "item", "compared": "weight"})
    if column.measure == "perplexity":
        return intervals.log_perplexity_frame(frame[["seed", "item", "nll", "tokens"]]) if len(frame) else frame
    scale = 100 if UNITS[column.measure] == "%" else 1
    return frame.assign(value=scale * frame[column.measure].astype(float))[["seed", "item", "weight", "value"]]


def protocol_note(results: Results) -> str:
    """Return the paragraph printed under each table: what was measured, how, on how much, and the artifacts' notes."""
    sentences = [_model_sentence(results, model) for model in results.model_names]
    values = {name: _values(results.protocols, key) for name, key in SETTINGS}
    settings = [f"{name} {value}" for name, value in values.items() if value]
    sentences.append("Settings: " + ", ".join(settings) + "." if settings else "")
    seeds = sorted(set(results.models["seed"]) - {-1})
    sentences += list(dict.fromkeys(_scoring_sentence(protocol) for protocol in results.protocols))
    sentences.append(f"Calibration seeds: {', '.join(map(str, seeds))}." if seeds else "No calibration seed.")
    for model in results.model_names:
        facts = results.tasks[results.tasks["model"] == model]
        if len(facts):
            prefix = f"Tasks of {model}: " if len(results.model_names) > 1 else "Tasks: "
            told = [_task_sentence(row, results.protocols) for row in facts.to_dict("records")]
            sentences.append(prefix + "; ".join(told) + ".")
    held_out = (("Perplexity", results.perplexity, "tokens", "tokens"), ("Fidelity", results.fidelity, "compared", "positions"))
    for name, frame, size, unit in held_out:
        told = [
            f"{part['window'].nunique()} windows of {corpus} ({part[size].max()} {unit} each)"
            for corpus, part in frame.groupby("corpus", sort=False)
        ]
        if told:
            sentences.append(f"{name} on {', '.join(told)}.")
    return "Protocol. " + " ".join(s for s in [*sentences, *results.notes] if s)


def protocol(results: Results) -> dict:
    """Return what `protocol_note` tells for machines: every setting with its distinct values, tasks, text, seeds, notes."""
    settings: dict[str, list] = {}
    for found in results.protocols:
        for name, value in found.items():
            if name != "tasks" and value is not None and value not in settings.setdefault(name, []):
                settings[name].append(value)
    held_out = {
        name: frame.groupby("corpus", sort=False)["window"].nunique().to_dict()
        for name, frame in (("perplexity", results.perplexity), ("fidelity", results.fidelity))
    }
    return {
        "models": json.loads(results.models.to_json(orient="records")),
        "settings": settings,
        "tasks": json.loads(results.tasks.to_json(orient="records")),
        "held_out_windows": held_out,
        "calibration_seeds": sorted({int(seed) for seed in results.models["seed"]} - {-1}),
        "notes": results.notes,
    }


def write_protocol(results: Results, folder: Path) -> Path:
    """Write `protocol` as `protocol.json` beside the tables; return its path."""
    path = Path(folder) / "protocol.json"
    path.write_text(json.dumps(protocol(results), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _scoring_sentence(protocol: dict) -> str:
    if not (text := protocol.get("calibration")):
        return ""  # the dense model is not scored
    words = f"Scored on {text['n_windows']} windows of {text['seq_len']} tokens of {text['corpus']}"
    if text.get("bos") not in (None, protocol.get("bos")):
        words += f" {'with' if text['bos'] else 'without'} BOS"
    if setting := protocol.get("scoring"):
        words += f" in {setting['dtype']}, aggregated by {setting['aggregation']}; self-distillation with alpha"
        words += f" {setting['alpha']:g}, temperature {setting['temperature']:g}, after a first stage of"
        words += f" {percent(setting['first_stage_ratio'])} of the neurons"
    return words + "."


def _values(protocols: list[dict], key: str) -> str:
    found = dict.fromkeys(json.dumps(p[key]) for p in protocols if p.get(key) is not None)
    # A limit of 0 means all items, which the sentence on tasks says better.
    words = {"true": "yes", "false": "no", "0": "none"}
    return " and ".join(words.get(value, value.strip('"')) for value in found)


def _model_sentence(results: Results, model: str) -> str:
    rows = results.models[results.models["model"] == model]
    dense = rows.loc[rows["criterion"] == "dense", "parameters"]
    size = f", {dense.iloc[0] / 1e6:,.1f} M parameters dense" if len(dense) and pd.notna(dense.iloc[0]) else ""
    achieved = rows[rows["criterion"] != "dense"].groupby("ratio")[["achieved_ratio", "neuron_ratio"]].mean()
    ratios = [
        f"{percent(ratio)} (achieved {percent(row.achieved_ratio)}, {percent(row.neuron_ratio)} of the MLP neurons)"
        for ratio, row in achieved.astype(float).iterrows()
    ]
    return f"Model {model}{size}" + (f"; ratios of all parameters {', '.join(ratios)}." if ratios else ".")


def _task_sentence(row: dict, protocols: list[dict]) -> str:
    known = {name: row[name] for name in ("metric", "shots", "version", "source") if pd.notna(row[name])}
    words = {"metric": "{}", "shots": "{:g}-shot", "version": "version {}", "source": "{} data"}
    limits = [p["limit"] for p in protocols if p.get("limit")]
    total = row["available"] if pd.notna(row["available"]) else row["items"]
    if pd.notna(total) and row["evaluated"] < total:
        count = f"limited run: {row['evaluated']} of {total:g} items"
    elif limits and row["evaluated"] >= min(limits):
        count = f"limited run: the first {row['evaluated']} items"
    else:
        count = f"{row['evaluated']} items"
    return f"{row['task']} ({', '.join([words[name].format(value) for name, value in known.items()] + [count])})"
