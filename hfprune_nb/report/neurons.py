"""Which neurons the criteria choose: importance, rank agreement and kept-set overlap from stages 02 and 03."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy import stats

from hfprune_nb.errors import UserError
from hfprune_nb.files import by_layer
from hfprune_nb.report.measurements import in_order, label, rank

AGREEMENT = ["model", "seed", "layer", "a", "b", "spearman"]
OVERLAP = ["model", "ratio", "layer", "comparison", "jaccard", "n_pairs"]
PAIRS = ["model", "ratio", "layer", "comparison", "seeds", "jaccard"]
CHANCE = "chance"


def scores(scoring_folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return a scoring artifact's facts and its importance per criterion, shape (layers, intermediate_size).

    Higher means keep. Raises UserError when the artifact is damaged.
    """
    facts, tensors = _read(Path(scoring_folder), "scores")
    return facts, {name: tensors[name] for name in in_order(tensors)}


def first_seeds(scoring_folders: Iterable[Path]) -> dict[str, Path]:
    """Return for each model the scoring artifact of its smallest seed."""
    found = {}
    for folder in map(Path, scoring_folders):
        facts = scores(folder)[0]
        found.setdefault(facts["model"], []).append((facts["seed"] or 0, folder))
    return {model: min(folders)[1] for model, folders in sorted(found.items())}


def kept(pruning_folder: Path) -> tuple[dict, list[np.ndarray]]:
    """Return a pruning artifact's facts and each layer's kept neuron indices. Raises UserError when it is damaged."""
    facts, tensors = _read(Path(pruning_folder), "pruning", "kept")
    return facts, [tensors[f"layers.{layer}"] for layer in range(len(tensors))]


def _read(folder: Path, facts_name: str, tensors_name: str | None = None) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        facts = json.loads((folder / f"{facts_name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{tensors_name or facts_name}.safetensors")
        return facts, {name: np.array(rows) for name, rows in by_layer(tensors).items()} if tensors_name is None else tensors
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder} is missing: name finished artifacts of the study") from None
    except (SafetensorError, json.JSONDecodeError):
        raise UserError(f"{folder} is damaged: delete the folder and rerun") from None


def importance_bins(importance: np.ndarray, n_bins: int = 100) -> np.ndarray:
    """Return each layer's importance sorted from high to low and averaged in bins, relative to the model's mean.

    `importance` has the shape (layers, intermediate_size), the result (layers, n_bins). Neurons without a score
    (not finite, or negative because the first stage of self-distillation removed them) are left out of the means.
    """
    finite = np.where(np.isfinite(importance) & (importance >= 0), importance, np.nan)
    descending = -np.sort(-finite, axis=1)
    parts = np.array_split(descending, min(n_bins, importance.shape[1]), axis=1)
    filled = [np.isfinite(part).sum(axis=1) for part in parts]
    sums = [np.nansum(part, axis=1) for part in parts]
    means = [np.divide(s, n, out=np.full(len(s), np.nan), where=n > 0) for s, n in zip(sums, filled, strict=True)]
    return np.stack(means, axis=1) / np.nanmean(finite)


def rank_agreement(scoring_folders: Iterable[Path]) -> pd.DataFrame:
    """Return the Spearman rank correlation of each pair of criteria by model, seed and layer."""
    rows = []
    for facts, importance in sorted(map(scores, scoring_folders), key=lambda pair: (pair[0]["model"], pair[0]["seed"])):
        for a, b in itertools.combinations(importance, 2):
            for layer, (left, right) in enumerate(zip(importance[a], importance[b], strict=True)):
                rho = stats.spearmanr(left, right).statistic
                rows.append([facts["model"], facts["seed"], layer, a, b, rho])
    return pd.DataFrame(rows, columns=AGREEMENT)


def kept_overlap(pruning_folders: Iterable[Path], criteria: Iterable[str]) -> pd.DataFrame:
    """Return the Jaccard overlap of kept sets by model, ratio and layer, averaged over all pairs of one `comparison`."""
    grouped = kept_pairs(pruning_folders, criteria).groupby(OVERLAP[:-2], sort=False)["jaccard"]
    return grouped.agg(jaccard="mean", n_pairs="size").reset_index()


def kept_pairs(pruning_folders: Iterable[Path], criteria: Iterable[str]) -> pd.DataFrame:
    """Return the Jaccard overlap of each pair of kept sets by model, ratio and layer; `seeds` is the pair of their seeds.

    Comparisons: two `criteria` with the same seed ("One-hot CE / Entropy (HFPrune)"), one criterion with two seeds
    ("Entropy (HFPrune), two seeds"), and "chance", the exact expectation for two random sets of these sizes.
    """
    criteria = list(criteria)
    prunings = [kept(folder) for folder in pruning_folders]
    prunings = sorted((p for p in prunings if p[0]["criterion"] in criteria), key=_reading_order)
    rows = []
    for (model, ratio), group in itertools.groupby(prunings, key=_place):
        for (a, kept_a), (b, kept_b) in itertools.combinations(group, 2):
            comparison, seeds = _comparison(a, b), (a["seed"], b["seed"])
            for layer, (left, right) in enumerate(zip(kept_a, kept_b, strict=True) if comparison else ()):
                rows.append([model, ratio, layer, comparison, seeds, jaccard(left, right)])
                width = _width(a, layer)
                rows.append([model, ratio, layer, CHANCE, seeds, chance_jaccard(len(left), len(right), width)])
    return pd.DataFrame(rows, columns=PAIRS)


def _reading_order(pruning: tuple[dict, list]) -> tuple:
    seed = pruning[0]["seed"]
    return *_place(pruning), rank(pruning[0]["criterion"]), -1 if seed is None else seed


def _place(pruning: tuple[dict, list]) -> tuple[str, float]:
    # Model and ratio must agree; otherwise a pair would compare sets of different sizes.
    facts = pruning[0]
    return facts["model"], round(float(facts["ratio"] if facts["ratio"] is not None else facts["achieved_ratio"]), 4)


def _width(facts: dict, layer: int) -> int:
    before = facts["width_before"]
    return before[layer] if isinstance(before, list) else before


def _comparison(a: dict, b: dict) -> str:
    """Return the name of a pair's comparison, "" for pairs that differ in criterion and seed."""
    if a["criterion"] == b["criterion"]:
        return f"{label(a['criterion'])}, two seeds" if a["seed"] != b["seed"] else ""
    if a["seed"] != b["seed"]:
        return ""
    first, second = in_order([a["criterion"], b["criterion"]])
    return f"{label(first)} / {label(second)}"


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return the size of the intersection of two index sets over the size of their union."""
    shared = len(np.intersect1d(left, right))
    union = len(left) + len(right) - shared
    return shared / union if union else 1.0


def chance_jaccard(n_left: int, n_right: int, width: int) -> float:
    """Return the expected Jaccard overlap of two independent random sets of these sizes out of `width` neurons."""
    shared = np.arange(max(0, n_left + n_right - width), min(n_left, n_right) + 1)
    probability = stats.hypergeom.pmf(shared, width, n_left, n_right)
    union = n_left + n_right - shared
    return float(np.sum(probability * np.divide(shared, union, out=np.ones(len(shared)), where=union > 0)))
