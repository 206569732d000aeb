"""What finished artifacts were made from, and what all of that takes."""

import functools
import itertools
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from hfprune_nb import criteria
from hfprune_nb.runs import forecast
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.parameters import complete


def lineage(artifacts: Iterable[Artifact]) -> dict[str, Artifact]:
    """Return these artifacts and all that they were made from, as far as they are there, by reference."""
    found, waiting = {}, list(artifacts)
    while waiting:
        artifact = waiting.pop()
        if artifact.done and artifact.reference not in found:
            found[artifact.reference] = artifact
            waiting += [Artifact(artifact.folder.parent.parent / reference) for reference in artifact.inputs]
    return found


def hours(artifacts: Iterable[Artifact]) -> dict[str, float]:
    """Return stage -> hours of one job after another that these artifacts and what they were made from take, the most first.

    The rates are those of the forecast: what one run took depends on what else the machine did, and would make a rerun differ.
    """
    found, known = lineage(artifacts), forecast.rates()
    spent: dict = {}
    parameters = {reference: complete(reference.partition("/")[0], one.parameters) for reference, one in found.items()}
    for reference, artifact in found.items():
        if artifact.inputs.keys() <= found.keys():
            stage = reference.partition("/")[0]
            seconds = forecast.need(stage, parameters[reference], known, parameters.__getitem__).seconds
            spent[stage] = spent.get(stage, 0.0) + seconds / 3600
    return dict(sorted(spent.items(), key=lambda each: -each[1]))


def cost_sentence(artifacts: Iterable[Artifact]) -> str:
    """Return what `hours` says in a sentence for the verdict."""
    artifacts = list(artifacts)
    spent = hours(artifacts)
    total = sum(spent.values())
    parts = ", ".join(f"{100 * each / total:.0f} % {stage}" for stage, each in spent.items() if each > 0.05 * total)
    return f"By the kit's measured rates this takes {forecast.in_words(total)}, one job after another ({parts})."


def shared_text(artifacts: Iterable[Artifact]) -> str:
    """Return a sentence on how much calibration text two seeds share of which these artifacts were made; empty for one seed.

    Means over all pairs of seeds with otherwise equal parameters: the share of the documents of one that the other has as well,
    and of its tokens. Seeds that share text differ by less than seeds on fresh text do.
    """
    groups: dict[str, list] = {}
    for reference, artifact in sorted(lineage(artifacts).items()):
        if reference.startswith("calibration/"):
            own = json.dumps({name: value for name, value in artifact.parameters.items() if name != "seed"}, sort_keys=True)
            table = pd.read_parquet(artifact.path("windows.parquet"))
            groups.setdefault(own, []).append((artifact.parameters["seq_len"], table))
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    if not pairs:
        return ""
    documents, tokens = [], []
    for (seq_len, one), (_, other) in pairs:
        documents.append(one["document_hash"].drop_duplicates().isin(other["document_hash"]).mean())
        met = one.merge(other, on="document_hash", suffixes=("", "_other"))
        tokens.append((seq_len - (met["start"] - met["start_other"]).abs()).clip(lower=0).sum() / (seq_len * len(one)))
    return (
        f"Two calibration seeds share {100 * np.mean(documents):.0f} % of their documents and {100 * np.mean(tokens):.1f} % of "
        f"their tokens (mean of {len(pairs)} pairs): what differs between them would differ more on fresh text."
    )


def unit_hours(
    artifacts: Iterable[Artifact], model: str, names: Iterable[str], device: str = "", own: bool = False
) -> dict | None:
    """Return what one more seed, window and item cost a study that compares the criteria `names` on `model`, by measured rates.

    The settings are those of these evaluations and of what their models were made from; None where that is not all there. Hours
    of one job after another, as `report.power.Costs` takes them: fixed, seed, window, item (by task), models. device : `cpu` or
    `cuda` in place of the study's own. own : by what these runs took on a CPU, whatever else the machine did.
    """
    found, known, names = lineage(artifacts), forecast.rates(), list(names)
    on = {"device": device} if device else {}
    every = {reference: complete(reference.partition("/")[0], one.parameters) | on for reference, one in found.items()}
    if own:
        cards = {reference: artifact.card for reference, artifact in found.items()}
        cpu = forecast.fit([(cards, known["devices"]["cpu"]["startup_seconds"])], known)
        known = known | {"devices": known["devices"] | {"cpu": cpu}}
    wanted = {name.partition("@")[0] for name in names}
    for values in (each for reference, each in every.items() if reference.startswith("evaluation/")):
        pruning = every.get(values["pruned"])
        scoring = every.get(pruning["scores"]) if pruning else None
        if values["model"] == model and not values["recovered"] and scoring and scoring["calibration"] in every:
            break
    else:
        return None
    specs = [variant.spec for variant in criteria.variants(scoring["criteria"]) if variant.name in wanted]
    need = functools.partial(forecast.need, known=known, ancestor=every.__getitem__)
    start = need("evaluation", values | {"tasks": [], "n_windows": 0}).seconds
    one = values | {"tasks": [], "n_windows": 1, "perplexity_corpora": values["perplexity_corpora"][:1], "limit": 1}
    per_item = {task: one | {"tasks": [task], "n_windows": 0} for task in values["tasks"]}
    made = len(names) * (need("pruning", pruning).seconds + start)
    scored = need("calibration", every[scoring["calibration"]]).seconds + need("scoring", scoring | {"criteria": specs}).seconds
    return {
        "fixed": start / 3600,
        "seed": (scored + made) / 3600,
        "window": (need("evaluation", one).seconds - start) / 3600,
        "item": {task: (need("evaluation", each).seconds - start) / 3600 for task, each in per_item.items()},
        "models": len(names),
    }
