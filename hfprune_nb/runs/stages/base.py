"""What a stage says about itself: notebook, inputs, its part of a study's grid, what of it is shown, and how much work it is."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.families import Member

EVERYTHING = "*"
# What parameters may be that mean the same in every stage that has them.
CHOICES = {
    "bos": ("auto", True, False),
    "dtype": ("bfloat16", "float16", "float32", "float64"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "device": ("auto", "cpu", "cuda", "cuda:N", "balanced"),
}

# Numbers that are at least 1 in every stage that has them; all others are at least 0.
POSITIVE = {
    "checkpoint_every",
    "chunk_size",
    "fidelity_positions",
    "micro_batch",
    "multiple_of",
    "n_windows",
    "processes",
    "repetitions",
}


@dataclass(frozen=True)
class Input:
    """A parameter that names an artifact of another stage, as `stage/key` or as that artifact's folder.

    Left empty, the artifact is made with the other notebook's defaults and the parameters named in `passes`
    (`EVERYTHING`: all of them); an `optional` input stays empty; an input that `follows` others is needed exactly when one
    of those is given; `many` is a list, and empty means every finished artifact of the stage. An artifact that is
    named must have been made with the same values of the parameters in `agrees`. `within` (own parameter, theirs): theirs is a
    list that must hold the own one's value, so that an artifact with more in it serves too.
    """

    stage: str
    passes: tuple[str, ...] = ()
    optional: bool = False
    follows: tuple[str, ...] = ()
    many: bool = False
    agrees: tuple[str, ...] = ("model",)
    within: tuple[str, str] | None = None


class Stage:
    """One step of a study.

    name, notebook : inputs : its parameters that are artifacts of other stages.
    section : the section of a study file without which the stage is left out of that study; empty: never.
    axes : key of a study file -> the parameter that takes each value of that list in turn; any other parameter may be listed in
    the file's section `axes`, unless tables would mix results that differ in one: `told_apart` is False. grid : further
    parameters that the grid sets.
    choices : parameter -> its possible values, beside those in CHOICES.
    exported : whether its tables and figures are shown with the study's. files : parameters that may name files or folders, whose
    content then is part of the key. version : raise it when the same parameters give other results than before; it is part of
    the key, as are the parameters that differ from their defaults.
    """

    name: ClassVar[str]
    notebook: ClassVar[str]
    inputs: ClassVar[dict[str, Input]] = {}
    section: ClassVar[str] = ""
    axes: ClassVar[dict[str, str]] = {}
    grid: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple]] = {}
    told_apart: ClassVar[bool] = True
    exported: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ("model",)
    version: ClassVar[int] = 1

    def check(self, values: dict) -> None:
        """Raise UserError for what can be seen to be wrong in a complete set of parameters before anything is loaded."""

    def warning(self, values: dict) -> str | None:
        """Return a sentence that a user should read before hours are spent on a run with these parameters, or None."""
        return None

    def check_choices(self, values: dict) -> None:
        """Raise UserError for a value that is none of its parameter's choices."""
        for name, allowed in (CHOICES | self.choices).items():
            value = values.get(name, allowed[0])
            if name == "device":
                value = re.sub(r"^cuda:\d+$", "cuda:N", value)
            if value not in allowed:
                raise UserError(f"{name} {value!r} is unknown: choose one of {', '.join(map(str, allowed))}")

    def check_numbers(self, values: dict) -> None:
        """Raise UserError for a number that is too small to mean anything, or none at all."""
        for name, value in values.items():
            least = int(name in POSITIVE)
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise UserError(f"{name} {value} is too small or no number: it must be at least {least}")

    def common(self, study) -> dict:
        """Return the parameters that are the same in all of a study's jobs of this stage, as the study's axes give them."""
        return {}

    def plan(self, grid) -> None:
        """Add this stage's jobs to `grid`, which holds those of the stages before it.

        Here: one job over everything that it shows, if it has lists of inputs; else one for each job of its first input, or for
        each model if it has none.
        """
        shown = {name: [job.reference for job in grid.of(given.stage)] for name, given in self.inputs.items() if given.many}
        first = next(((name, given) for name, given in self.inputs.items() if not given.many), None)
        for values in grid.combinations(self.name):
            values |= self.common(grid.study)
            if shown:
                if any(shown.values()):
                    grid.add(self.name, {}, values | shown)
            elif first:
                name, given = first
                for job in grid.of(given.stage):
                    passed = {key: job.parameters[key] for key in given.passes if key in job.point}
                    grid.add(self.name, job.point, {name: job.reference} | passed | values)
            else:
                for model in grid.study.models:
                    grid.add(self.name, {"model": model}, {"model": model} | values)

    def sources(self, parameters: dict) -> dict[str, Path]:
        """Return what else than parameters and inputs decides the result: name -> file, whose content then is part of the key."""
        return {}

    def from_hub(self, parameters: dict) -> list[tuple[str, str]]:
        """Return the names that may lead to repositories of the hub, each with its kind: model or dataset."""
        return [(parameters.get("model", ""), "model")]

    def work(self, parameters: dict, known: dict, ancestor: Callable[[str], dict]) -> tuple[float, float]:
        """Return the work of a run, in a unit of the stage's own, and the tokens that pass a model.

        For stages that run a model the unit is the parameter-token. known : `forecast.rates`; ancestor : leads from a reference
        to that job's parameters.
        """
        return 1, 0

    def disk(self, parameters: dict, size: float, known: dict) -> float:
        """Return the GB that a run on a model of `size` parameters writes; here a notebook with its tables."""
        return 0.002

    def memory(self, parameters: dict, known: dict, ancestor: Callable[[str], dict]) -> float:
        """Return the GB of memory that a run takes beyond what its model does; arguments as `work`."""
        return 0.0


def size(parameters: dict, known: dict) -> float:
    """Return the number of parameters of a run's model, as far as the rates know it."""
    return known["models"].get(parameters.get("model"), known["models"]["default"])


def mlps(parameters: dict, known: dict) -> tuple[int, int, int]:
    """Return the layers, the neurons of each, and the hidden size of a run's model, as far as the rates know it."""
    return tuple(known["mlps"].get(parameters.get("model"), known["mlps"]["default"]))


def rates() -> dict[str, Path]:
    """Return the file of the forecast's rates as `Stage.sources` wants it, for stages that tell hours; {} where there is none."""
    file = paths.data() / "rates.yaml"
    return {"rates": file} if file.is_file() else {}


def source(member: type[Member]) -> Path:
    """Return the file in which a member of a family is written; raise UserError for one of a notebook's cell, which has none."""
    try:
        return Path(inspect.getfile(member))
    except (OSError, TypeError):
        raise UserError(f"{member.noun} '{member.name}' is in no file, which a result's key needs: write it into one.") from None
