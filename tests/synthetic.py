"""Artifacts of stages 02, 03, 05 and 08 with invented numbers of realistic shape, for the tests of the report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

TASKS = {"arc_easy": "acc_norm", "boolq": "acc", "arc_challenge": "acc_norm", "winogrande": "acc"}
THREE = ("one_hot_ce", "self_distillation", "entropy")
FIVE = ("entropy", "one_hot_ce", "self_distillation", "magnitude", "random")
VARIANT = {"self_distillation": {"alpha": 0.4}, "as": "variant"}
DAMAGE = dict(zip(("dense", *FIVE, "variant"), (0.0, 1.0, 1.05, 1.3, 3.0, 2.6, 1.15), strict=True))
TASK_FACTS = {"shots": 0, "version": 1.0, "source": "local"}
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return a", "She paid $5 and $")
WORDS = [" Paris", " a", "\n", " $x$", "的", " London", " the", "Лион", " very-long-token", " not", " B", "_e"]


def spec(criterion):
    """Return what a study writes for a criterion of these artifacts."""
    return VARIANT if criterion == "variant" else criterion


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
        "criterion_spec": spec(criterion),
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
        told = _choices(own.spawn(1)[0], 2 if metric == "acc" else 4, right, damage)
        rows += [(task, doc, f"hash{doc}", metric, float(value), *told[doc]) for doc, value in enumerate(right)]
    columns = ["task", "doc_id", "doc_hash", "metric", "value", "loglikelihoods", "characters", "bytes", "right"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "items.parquet")
    windows = pd.DataFrame({"corpus": ["c4"] * 30 + ["wikitext"] * 30, "window": [*range(30)] * 2})
    nll = 511 * (3 + 0.3 * shared.normal(size=60) + 6 * damage + 0.03 * own.normal(size=60))
    windows.assign(tokens=511, nll=nll).to_parquet(folder / "perplexity.parquet")
    if criterion == "dense":
        return folder
    js = np.clip(0.4 * (1 - np.exp(-6 * damage)) + 0.02 * shared.normal(size=60) + 0.004 * own.normal(size=60), 0, 1)
    parts = {"all": (511, 1.0), "low_entropy": (255, 0.8), "high_entropy": (256, 1.2)}
    fidelity = pd.concat(
        windows.assign(positions=name, compared=n, js=js, kl=3 * scale * js, jaccard15=1 - js, top1=1 - 1.2 * js)
        for name, (n, scale) in parts.items()
    )
    fidelity.to_parquet(folder / "fidelity.parquet")
    _next_tokens(own, damage).to_parquet(folder / "next_tokens.parquet")
    return folder


def _choices(own, count, right, damage):
    """Return log-likelihoods, characters, bytes and the right place for each item, of which the best one is as `right` says."""
    by_character = np.sort(own.normal(-1 - damage, 0.2, (len(right), count)))
    place = np.arange(len(right)) % count
    best = np.where(right, place, (place + 1) % count)
    by_character = np.stack([np.roll(row, 1 + top) for row, top in zip(by_character, best, strict=True)])
    return [(10 * row, [10] * count, [11] * count, where) for row, where in zip(by_character, place, strict=True)]


def _next_tokens(own, damage):
    rows = []
    for prompt_id, prompt in enumerate(PROMPTS):
        weights = 0.6 ** np.arange(len(WORDS))
        changed = weights * np.exp(4 * damage * own.normal(size=len(WORDS)))
        for source, values in (("dense", weights), ("this", changed)):
            top = np.argsort(-values)[:10]
            rows += [(prompt_id, prompt, source, rank, WORDS[i], values[i] / values.sum()) for rank, i in enumerate(top)]
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "source", "rank", "token", "probability"])


def study(folder: Path, criteria=FIVE, ratios=(0.1, 0.2, 0.3), seeds=(0, 1, 2), dense=True, **options):
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
    scores["variant"] = (scores["self_distillation"].clip(0) * scores["entropy"]) ** 0.5
    return scores | {"magnitude": 1 + 0.1 * shared.random(base.shape), "random": own.random(base.shape)}


def by_key(layers):
    """Return the rows of each importance under the keys NAME/LAYER."""
    return {f"{name}/{layer}": row for name, rows in layers.items() for layer, row in enumerate(rows)}


def scoring(folder: Path, seed=0, model="smollm2-135m", criteria=FIVE):
    """Write one scoring artifact and return its folder."""
    folder.mkdir(parents=True)
    scores = {name: values for name, values in importance(seed).items() if name in criteria}
    save_file(by_key(scores), folder / "scores.safetensors")
    facts = {"model": model, "criteria": [spec(name) for name in scores], "seed": seed, "widths": [96] * 12}
    (folder / "scores.json").write_text(json.dumps(facts))
    noise = np.random.default_rng([seed, 1]).normal(size=(12, 96))
    snapshots = {
        f"{name}/{n}": scores[name] * np.exp(noise * (n < 8) / n)
        for name in scores
        if name not in ("magnitude", "random")
        for n in (1, 2, 4, 8)
    }
    save_file(by_key(snapshots), folder / "snapshots.safetensors")
    return folder


def experiments(folder: Path, model="smollm2-135m", true_criterion="entropy", noise=0.1, text_changes=True, gradient=0.0):
    """Write one experiments artifact, whose real damage follows the importance of `true_criterion`; return its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    scores = {name: importance(0)[name] for name in ("one_hot_ce", "entropy")}
    truth = rng.random((12, 96)) if true_criterion is None else importance(0)[true_criterion]
    rows = []
    for layer in (0, 4, 8, 11):
        groups = [[neuron] for neuron in rng.permutation(96)[:24]] + [list(rng.permutation(96)[:16]) for _ in range(4)]
        for neurons in groups:
            damage = truth[layer, neurons].sum() * np.exp(noise * rng.normal())
            sign = rng.choice([-1, 1])
            row = {"layer": layer, "kind": "single" if len(neurons) == 1 else "random group", "size": len(neurons)}
            row |= {"neurons": neurons, "kl": 1e-4 * damage**2, "ce": sign * 1e-3 * damage, "entropy": -sign * 1e-3 * damage}
            predicted = {"predicted_ce": row["ce"], "predicted_entropy": row["entropy"]}
            absolute = {"predicted_abs_ce": 2e-3 * damage, "predicted_abs_entropy": 2e-3 * damage}
            rows.append(row | predicted | absolute)
    pd.DataFrame(rows).to_parquet(folder / "ablations.parquet")
    corpora = ["c4", "c4, next seed", "code"]
    texts = {
        f"{corpus}/{name}": values * np.exp(spread * rng.normal(size=values.shape))
        for corpus, spread in zip(corpora, (0, 0.3, 2.0 if text_changes else 0.0), strict=True)
        for name, values in scores.items()
    }
    save_file(by_key(texts), folder / "corpora.safetensors")
    sizes = {"one_hot_ce": 0.8, "entropy": 0.6}
    gradients = [
        {"student_ratio": ratio, "criterion": name, "gradient": size, "value": 1.0}
        for ratio in (0.0, 0.025)
        for name, size in (sizes | {"self_distillation": 0.08 if ratio else gradient}).items()
    ]
    pd.DataFrame(gradients).to_parquet(folder / "gradients.parquet")
    facts = {
        "model": model,
        "criteria": list(scores),
        "corpora": corpora,
        "seed": 0,
        "own_text": "",
        "device": "cpu",
        "calibration": {"n_windows": 8, "seq_len": 128, "bos": False, "dtype": "bfloat16"},
        "truth": {"corpus": "c4", "n_windows": 4, "seq_len": 64, "dtype": "float32"},
        "widths": [96] * 12,
        "notes": ["Weights were dequantised from Q4_1."],
    }
    (folder / "experiments.json").write_text(json.dumps(facts))
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
        "criterion_spec": spec(criterion),
        "ratio": ratio,
        "achieved_ratio": ratio,
        "seed": seed,
        "neuron_ratio": 1 - keep / 96,
        "width_before": [96] * 12,
        "widths": [keep] * 12,
        "allocation": "uniform",
        "allocation_spec": "uniform",
        "loads_with": "plain",
    }
    (folder / "pruning.json").write_text(json.dumps(facts))
    return folder


def prunings(folder: Path, criteria=THREE, ratios=(0.1, 0.2, 0.3), seeds=(0, 1, 2)):
    """Write the prunings of a study and return their folders."""
    return [pruning(folder / f"{c}-{r}-{s}", c, r, s) for c in criteria for r in ratios for s in seeds]
