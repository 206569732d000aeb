"""The paragraphs under every table: what was measured, how, on how much."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from hfprune_nb.report.results import Results, experiment, percent, versions
from hfprune_nb.report.style import DENSE

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
)
# What differs between two machines that find the same is told once, beside the tables.
MADE = "Machine, commit and time of every run: cards.json."


def protocol_note(results: Results) -> str:
    """Return the paragraph printed under each table: what was measured, how, on how much, and the artifacts' notes."""
    sentences = [_model_sentence(results, model) for model in results.model_names]
    values = {name: _values(results.protocols, key) for name, key in SETTINGS}
    settings = [f"{name} {value}" for name, value in values.items() if value]
    sentences.append("Settings: " + ", ".join(settings) + "." if settings else "")
    sentences.append(commits_sentence(protocol.get("commits", {}) for protocol in results.protocols))
    seeds = sorted(set(results.models["seed"]) - {-1})
    sentences += list(dict.fromkeys(_scoring_sentence(protocol) for protocol in results.protocols))
    sentences += results.legend.settings(results.models["criterion"])
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
    return "Protocol. " + " ".join(s for s in [*sentences, *results.notes, MADE] if s)


def commits_sentence(each: Iterable[dict[str, str]]) -> str:
    """Return the commits of the hub repositories that were read, models, texts and task records; empty where none was."""
    found = sorted({(name, commit[:12]) for commits in each for name, commit in commits.items()})
    return f"Commits read: {', '.join(f'{name} {commit}' for name, commit in found)}." if found else ""


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
    stopped = protocol.get("scoring", {}).get("windows")
    count = f"the first {stopped} of {text['n_windows']}" if stopped else text["n_windows"]
    words = f"Scored on {count} windows of {text['seq_len']} tokens of {text['corpus']}"
    if text.get("bos") not in (None, protocol.get("bos")):
        words += f" {'with' if text['bos'] else 'without'} BOS"
    return words + (f" in {protocol['scoring']['dtype']}." if "scoring" in protocol else ".")


def _values(protocols: list[dict], key: str) -> str:
    found = dict.fromkeys(json.dumps(p[key]) for p in protocols if p.get(key) is not None)
    # A limit of 0 means all items, which the sentence on tasks says better.
    words = {"true": "yes", "false": "no", "0": "none"}
    return " and ".join(words.get(value, value.strip('"')) for value in found)


def _model_sentence(results: Results, model: str) -> str:
    rows = results.models[results.models["model"] == model]
    dense = rows.loc[rows["criterion"] == DENSE, "parameters"]
    size = f", {dense.iloc[0] / 1e6:,.1f} M parameters dense" if len(dense) and pd.notna(dense.iloc[0]) else ""
    achieved = rows[rows["criterion"] != DENSE].groupby("ratio")[["achieved_ratio", "neuron_ratio"]].mean()
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


def experiment_notes(experiment_folders: Iterable[Path]) -> list[str]:
    """Return the protocol of the experiments as sentences, one per model, and their notes."""
    notes = []
    for folder in experiment_folders:
        facts = experiment(folder)
        text, truth = facts["calibration"], facts["truth"]
        made = {name: value for name, value in ({"device": facts["device"]} | versions(folder)).items() if value}
        width = " to ".join(str(width) for width in sorted({min(facts["widths"]), max(facts["widths"])}))
        notes.append(
            f"Protocol. Model {facts['model']} ({len(facts['widths'])} layers of {width} neurons). Scored on "
            f"{text['n_windows']} windows of {text['seq_len']} tokens of each text ({'; '.join(facts['corpora'])}) in "
            f"{text['dtype']}, seed {facts['seed']}, BOS {'yes' if text['bos'] else 'no'}; damage measured on "
            f"{truth['n_windows']} held-out windows of {truth['seq_len']} tokens of {truth['corpus']} in {truth['dtype']}; own "
            f"text: {facts['own_text'] or 'none'}. {', '.join(f'{name} {value}' for name, value in made.items())}. "
            f"{' '.join(filter(None, [commits_sentence([facts.get('commits', {})]), MADE]))}"
        )
        notes += facts["notes"]
    return list(dict.fromkeys(notes))
