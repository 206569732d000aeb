"""What tells models apart beside criterion, allocation and ratio: the parameters that a study lists under `axes`."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from hfprune_nb import paths
from hfprune_nb.files import read_json
from hfprune_nb.report.style import natural

# What artifacts say of themselves; each has its column, its line in a figure or a table of its own.
POINT = ("model", "criterion", "allocation", "ratio", "seed", "tuned", "compensation", "attention_split")
# Parameters that stand for the same.
KNOWN = {*POINT, "criteria", "neuron_ratio", "revisions"}


def told_apart(read: Iterable[tuple[dict, Path]]) -> list[tuple[dict, Path]]:
    """Return artifacts, each as its facts and its folder, with `apart` and `further` among the facts.

    apart : `stage.parameter` -> value, for those parameters of calibration, scoring and pruning in which artifacts differ that
    agree in all that their facts say. further : those of them in words, "multiple_of 64", that are not at their default, or at
    the smallest value where no artifact has the default.
    """
    read = [(facts, Path(folder)) for facts, folder in read]
    made = [_made_with(folder) for _, folder in read]
    points: dict[str, list[dict]] = {}
    for (facts, _), values in zip(read, made, strict=True):
        points.setdefault(json.dumps([*map(facts.get, POINT), values.get("pruning.neuron_ratio")]), []).append(values)
    differing = {
        name
        for same in points.values()
        for name in set().union(*same)
        if name.partition(".")[2] not in KNOWN and any(values.get(name) != same[0].get(name) for values in same)
    }
    plain = {name: _plain(name, [values[name] for values in made if name in values]) for name in sorted(differing)}
    told = []
    for (facts, folder), values in zip(read, made, strict=True):
        apart = {name: values[name] for name in plain if name in values}
        further = {name: value for name, value in apart.items() if value != plain[name]}
        told.append((facts | {"apart": apart, "further": in_words(further)}, folder))
    return told


def in_words(apart: dict) -> str:
    """Return parameters as "multiple_of 64, n_windows 8"."""
    return ", ".join(f"{name.partition('.')[2]} {_text(value)}" for name, value in apart.items())


def without_further(folders: Iterable[Path], file: str) -> tuple[list[Path], str]:
    """Return the artifacts without `further`, whose facts are in `file` of each folder, and a sentence on those left out."""
    read = told_apart((read_json(Path(folder) / file), folder) for folder in folders)
    plain = [(facts, folder) for facts, folder in read if not facts["further"]]
    left = sorted({facts["further"] for facts, _ in read} - {""}, key=natural)
    sentence = f"Shown with {in_words(plain[0][0]['apart'])}; not shown: {'; '.join(left)}." if left else ""
    return [folder for _, folder in plain], sentence


def _made_with(folder: Path) -> dict:
    """Return `stage.parameter` -> value of a scoring or a pruned model and of all that it was made from; {} without a record."""
    if not (folder / "params.json").is_file():
        return {}
    record, stage = read_json(folder / "params.json"), folder.parent.name
    inputs = record["inputs"]
    if stage == "evaluation":  # its own settings, a recovery's too, make no other pruned model
        values, inputs = {}, [name for name in inputs if name.startswith("pruning/")]
    else:
        values = _defaults().get(stage, {}) | record["parameters"]
    # A parameter that names an input says less than the input's own.
    found = {f"{stage}.{name}": value for name, value in values.items() if str(value) not in inputs}
    for name in inputs:
        found |= _made_with(folder.parent.parent / name)
    return found


@functools.cache
def _defaults() -> dict:
    file = paths.notebooks() / "defaults.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _plain(name: str, found: list):
    stage, _, parameter = name.partition(".")
    default = _defaults().get(stage, {}).get(parameter)
    return default if default in found else min(found, key=lambda value: natural(_text(value)))


def _text(value) -> str:
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
