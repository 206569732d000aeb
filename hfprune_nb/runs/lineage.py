"""What finished artifacts were made from, and what all of that takes."""

from collections.abc import Iterable

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
    found, known, spent = lineage(artifacts), forecast.rates(), {}
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
    parts = ", ".join(f"{each / total:.0%} {stage}" for stage, each in spent.items() if each > 0.05 * total)
    return f"By the kit's measured rates this takes {forecast.in_words(total)}, one job after another ({parts})."
