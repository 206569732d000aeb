"""Artifacts of stages 02, 03 and 05 with invented numbers of realistic shape, for the tests of the report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

TASKS = {"arc_easy": "acc_norm", "boolq": "acc", "arc_challenge": "acc_norm", "winogrande": "acc"}
THREE = ("one_hot_ce", "self_distillation", "entropy")
DAMAGE = {"dense": 0.0, "entropy": 1.0, "one_hot_ce": 1.05, "self_distillation": 1.3, "magnitude": 3.0, "random": 2.6}
TASK_FACTS = {"shots": 0, "version": 1.0, "source": "local"}
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return a", "She paid $5 and $")
WORDS = [" Paris", " a", "\n", " $x$", "的", " London", " the", "Лион", " very-long-token", " not", " B", "_e"]


def evaluation(folder: Path, criterion="dense", ratio=0.0, seed=None, model="smollm2-135m", n_items=40, tasks=None, **changes):
    """Write one evaluation artifact and return its folder; `changes` replace or add keys of summary.json."""
    folder.mkdir(parents=True)
    tasks = TASKS if tasks is None else tasks
    damage = ratio * DAMAGE[criterion] + (0.01 * np.sin(5 * (seed or 0)) if ratio else 0)
    shared = np.random.default_rng(0)
    own = np.random.default_rng([seed or 0, int(1000 * ratio), sorted(DAMAGE).index(criterion)])
    summary = {
        "model": model,
        "criterion": criterion,
        "ratio": ratio,
        "achieved_ratio": ratio * 0.999,
        "neuron_ratio": ratio / 0.59,
        "seed": seed,
        "parameters": int(134_515_008 * (1 - ratio)),
        "notes": ["Weights were dequantised from Q4_1."],
        "protocol": {
            "dtype": "bfloat16",
            "device": "cpu",
            "lm_eval": "0.4.12",
            "limit": n_items,
            "batch_size": 4,
            "bos": True,
            "seq_len": 512,
            "n_windows": 30,
            "tasks": {
                task: {"metric": metric, "items": n_items, "available": 1000, **TASK_FACTS} for task, metric in tasks.items()
            },
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    rows = []
    for task, metric in tasks.items():
        difficulty = shared.random(n_items)
        right = difficulty * (0.9 - 0.6 * damage) + 0.1 > own.random(n_items) * 0.5 + 0.25
        rows += [(task, doc, f"hash{doc}", metric, float(value)) for doc, value in enumerate(right)]
    pd.DataFrame(rows, columns=["task", "doc_id", "doc_hash", "metric", "value"]).to_parquet(folder / "items.parquet")
    windows = pd.DataFrame({"corpus": ["c4"] * 30 + ["wikitext"] * 30, "window": [*range(30)] * 2})
    nll = 511 * (3 + 0.3 * shared.normal(size=60) + 6 * damage + 0.03 * own.normal(size=60))
    windows.assign(tokens=511, nll=nll).to_parquet(folder / "perplexity.parquet")
    if criterion == "dense":
        return folder
    js = np.clip(0.4 * (1 - np.exp(-6 * damage)) + 0.02 * shared.normal(size=60) + 0.004 * own.normal(size=60), 0, 1)
    fidelity = windows.assign(positions=511, js=js, kl=3 * js, jaccard15=1 - js, top1=1 - 1.2 * js)
    fidelity.to_parquet(folder / "fidelity.parquet")
    _next_tokens(own, damage).to_parquet(folder / "next_tokens.parquet")
    return folder


def _next_tokens(own, damage):
    rows = []
    for prompt_id, prompt in enumerate(PROMPTS):
        weights = 0.6 ** np.arange(len(WORDS))
        changed = weights * np.exp(4 * damage * own.normal(size=len(WORDS)))
        for source, values in (("dense", weights), ("this", changed)):
            top = np.argsort(-values)[:10]
            rows += [(prompt_id, prompt, source, rank, WORDS[i], values[i] / values.sum()) for rank, i in enumerate(top)]
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "source", "rank", "token", "probability"])


def study(folder: Path, criteria=tuple(DAMAGE)[1:], ratios=(0.1, 0.2, 0.3), seeds=(0, 1, 2), dense=True, **options):
    """Write a whole study's evaluations, magnitude for the first seed only, and return their folders."""
    folders = [evaluation(folder / "dense", **options)] if dense else []
    for criterion in criteria:
        for ratio in ratios:
            for seed in seeds[:1] if criterion == "magnitude" else seeds:
                folders.append(evaluation(folder / f"{criterion}-{ratio}-{seed}", criterion, ratio, seed, **options))
    return folders


def importance(seed, layers=12, width=96):
    """Return invented importance per criterion, shape (layers, width), related as the paper's criteria are."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    base = shared.normal(size=(layers, width)) + np.linspace(-1, 1.5, layers)[:, None]
    noise = {"one_hot_ce": 0.3, "entropy": 0.4, "self_distillation": 0.7}
    scores = {
        name: np.exp(base + spread * (shared.normal(size=base.shape) + 0.3 * own.normal(size=base.shape)))
        for name, spread in noise.items()
    }
    scores["self_distillation"][:, :2] = -np.inf
    return scores | {"magnitude": 1 + 0.1 * shared.random(base.shape), "random": own.random(base.shape)}


def scoring(folder: Path, seed=0, model="smollm2-135m", criteria=None):
    """Write one scoring artifact and return its folder."""
    folder.mkdir(parents=True)
    scores = {name: values for name, values in importance(seed).items() if criteria is None or name in criteria}
    save_file(scores, folder / "scores.safetensors")
    facts = {"model": model, "criteria": list(scores), "seed": seed, "layers": 12, "intermediate_size": 96}
    (folder / "scores.json").write_text(json.dumps(facts))
    return folder


def pruning(folder: Path, criterion, ratio, seed, model="smollm2-135m"):
    """Write one pruning artifact (kept neurons only) and return its folder."""
    folder.mkdir(parents=True)
    keep = int(96 * (1 - ratio / 0.59))
    order = np.argsort(importance(seed)[criterion], axis=1)[:, -keep:]
    kept = {f"layers.{layer}": np.sort(row).astype(np.int64) for layer, row in enumerate(order)}
    save_file(kept, folder / "kept.safetensors")
    facts = {
        "model": model,
        "criterion": criterion,
        "ratio": ratio,
        "achieved_ratio": ratio,
        "seed": seed,
        "width_before": 96,
        "width_after": [keep] * 12,
    }
    (folder / "pruning.json").write_text(json.dumps(facts))
    return folder


def prunings(folder: Path, criteria=THREE, ratios=(0.1, 0.2, 0.3), seeds=(0, 1, 2)):
    """Write the prunings of a study and return their folders."""
    return [pruning(folder / f"{c}-{r}-{s}", c, r, s) for c in criteria for r in ratios for s in seeds]
