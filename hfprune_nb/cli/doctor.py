"""`hfprune doctor`: whether this machine has what the kit needs, how fast it is, and which studies it can run."""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hfprune_nb import machine, paths
from hfprune_nb.cli.parsing import command, say
from hfprune_nb.errors import UserError

_EXAMPLES = """examples:
  hfprune doctor               versions, folders, memory, speed, the hub, and every study of the kit
  hfprune doctor --no-hub      the same without asking the hub

Each line is `ok`, `note` (works, with a limit that the line names) or `wrong` (with what to do).
Exit status: 0 nothing is wrong, 1 something is.
"""
_SLOWER = 2.0


class Finding(NamedTuple):
    """One line of the report: state is ok, note or wrong."""

    state: str
    what: str
    words: str


def add_doctor(groups) -> None:
    """Add the command `doctor` to the parser's commands."""
    doctor = command(groups, "doctor", "check this machine: versions, folders, memory, speed, hub, studies", _EXAMPLES, _doctor)
    doctor.add_argument("--no-hub", action="store_true", help="do not ask the Hugging Face hub")


def _doctor(options) -> int:
    wrong = 0
    for finding in _findings(not options.no_hub):
        say(f"{finding.state:<6} {finding.what:<20} {finding.words}")
        wrong += finding.state == "wrong"
    say(f"{wrong} things are wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _findings(ask_hub: bool) -> Iterator[Finding]:
    here = python(sys.version_info[:2])
    yield here
    required = importlib.metadata.requires("hfprune_nb") or []
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    lock = paths.project() / "requirements.lock"
    found = packages(required, installed, lock.read_text(encoding="utf-8") if lock.is_file() else "")
    yield found
    yield from folders({"results": paths.results(), "cache": paths.cache()})
    if "wrong" in (here.state, found.state):
        return  # what is asked next needs the packages
    import psutil
    import torch

    from hfprune_nb.cost import timing
    from hfprune_nb.inputs import assets, hub

    gigabytes = psutil.virtual_memory().available / 1e9
    yield Finding("ok", "memory", f"{gigabytes:.1f} GB are free")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    words = [machine.processor(), *(f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus)]
    yield Finding("ok", "devices", "; ".join(words) + ("" if gpus else "; no GPU"))
    yield speed(timing.matmul_peak("cuda" if gpus else "cpu"), "GPU" if gpus else "CPU")
    yield from folders({"hub cache": hub.cache()})
    cached = [asset.name for asset in assets.list_assets() if assets.is_cached(asset.name)]
    yield Finding("ok", "assets", f"cached: {', '.join(cached) or 'none; a study fetches what it names'}")
    room = max((gpu.total_memory / 1e9 for gpu in gpus), default=gigabytes)
    loaded = _studies()
    yield from (study(name, each, room) for name, each in loaded.items())
    if ask_hub:
        yield from access({name for each in loaded.values() for name in _models(each)})


def python(version: tuple[int, ...]) -> Finding:
    """Return whether the interpreter is new enough."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("wrong", "Python", f"{text}, and 3.11 or later is needed: set PYTHON=python3.11 and `make setup`")
    return Finding("ok", "Python", text)


def packages(required: Iterable[str], installed: dict[str, str], lock: str) -> Finding:
    """Return whether the packages are there, in versions that fit and that are the lock's.

    required : requirements as package metadata has them; installed : name -> version; lock : text of requirements.lock.
    """
    from packaging.requirements import Requirement

    have = {_plain(name): version for name, version in installed.items()}
    wanted = [each for each in map(Requirement, required) if each.marker is None or each.marker.evaluate({"extra": ""})]
    unfit = [
        f"{each.name} {have.get(_plain(each.name), 'is missing')}"
        for each in wanted
        if _plain(each.name) not in have or not each.specifier.contains(have[_plain(each.name)], prereleases=True)
    ]
    if unfit:
        return Finding("wrong", "packages", f"{', '.join(unfit)}: `make setup` installs what the lock names")
    pinned = {_plain(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)}
    other = [
        f"{each.name} {have[name]} (lock: {pinned[name]})"
        for each in wanted
        if (name := _plain(each.name)) in pinned and have[name].partition("+")[0] != pinned[name]
    ]
    if other:
        return Finding("note", "packages", f"{', '.join(other)}: results may differ from the committed ones in their last digits")
    return Finding("ok", "packages", f"all {len(wanted)} are there" + (", in the versions of the lock" if pinned else ""))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def folders(places: dict[str, Path]) -> Iterator[Finding]:
    """Yield for each folder, by what it holds, how much room it has and whether it can be written."""
    for what, folder in places.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(there, os.W_OK):
            variable = {"results": "HFPRUNE_RESULTS", "cache": "HFPRUNE_CACHE"}.get(what, "HF_HOME")
            yield Finding("wrong", what, f"{folder} cannot be written: set {variable} to a folder that can")
        else:
            yield Finding("ok", what, f"{folder}, {shutil.disk_usage(there).free / 1e9:.1f} GB free")


def speed(rates: dict[str, float], device: str) -> Finding:
    """Return how fast products of matrices are, by dtype (FLOP/s), and which dtype that speaks for."""
    words = f"products of matrices on the {device}: " + ", ".join(
        f"{kind} {rate / 1e9:,.3g} GFLOP/s" for kind, rate in rates.items()
    )
    if rates["bfloat16"] * _SLOWER < rates["float32"]:
        return Finding("note", "speed", f"{words}; bfloat16 is slow here: keep dtype float32")
    return Finding("ok", "speed", words)


def study(name: str, loaded, room: float) -> Finding:
    """Return whether a study's largest job fits in `room` GB of memory, and what the study takes by the forecast."""
    from hfprune_nb.runs import forecast

    wanted = forecast.needs(loaded)
    largest = max(wanted, key=lambda reference: wanted[reference].memory)
    memory = wanted[largest].memory
    if memory > room:
        words = f"does not fit: {largest.partition('/')[0]} takes {memory:.1f} GB, {room:.1f} GB are free"
        return Finding("note", name, f"{words}: use a larger machine, or a smaller model")
    workers = min(loaded.run["workers"], int(room // memory))
    hours = forecast.total(wanted, {job.reference: job.depends_on for job in loaded.jobs}, workers)
    words = f"fits: at most {memory:.1f} GB a job, {forecast.in_words(hours)} with {workers} at a time by the forecast"
    words += ", whose rates are another processor's" if forecast.elsewhere("cpu") else ""
    if workers < loaded.run["workers"]:
        return Finding("note", name, f"{words}; give --workers {workers}, more take too much memory at once")
    return Finding("ok", name, words)


def access(models: set[str]) -> Iterator[Finding]:
    """Yield whether there is a token, and whether the hub gives these models' files to it."""
    from hfprune_nb.inputs import hub

    token = "a token is set" if hub.has_token() else "no token: gated models need one, `hf auth login`"
    yield Finding("ok" if hub.has_token() else "note", "token", token)
    for name in sorted(models):
        try:
            hub.file(name, "config.json")
        except UserError as error:
            yield Finding("note", "hub", str(error))
            if "out of reach" in str(error):
                return  # the others would be waited for in vain
        else:
            yield Finding("ok", "hub", f"model '{name}' can be read")


def _studies() -> dict:
    from hfprune_nb.runs import study as studies

    return {path.stem: studies.load(str(path)) for path in sorted((paths.notebooks() / "studies").glob("*.yaml"))}


def _models(loaded) -> set[str]:
    from hfprune_nb.runs import pins

    used = [pins.repositories(job.stage, job.parameters) for job in loaded.jobs if "revisions" in job.parameters]
    return {name for found in used for name, kind in found.items() if kind == "model"}
