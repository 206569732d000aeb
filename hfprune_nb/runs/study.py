"""Studies: a YAML file becomes a grid of stage runs, of which `run` computes exactly those that are missing or stale.

Every job of the grid knows its key before anything runs, so a study can be stopped anywhere and resumed. A job is
computed again when a file of it was changed or lost, or when an input has other bytes than it had then; an input that
was recomputed to the same bytes stops there (early cut-off).
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from hfprune_nb import paths, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.runs import parameters, stage, stages

# A criterion that reads weights alone: one seed says all.
WEIGHTS_ONLY = ("magnitude",)

# Criteria that read no calibration text: controls, which are not tuned afterwards unless recovery_criteria names them.
TEXTLESS = (*WEIGHTS_ONLY, "random")

# Stages that run only where the study file has a section, and which one that is.
OPTIONAL = {"recovery": "recovery", "cost": "cost", "experiments": "experiments", "questions": "experiments"}

# What the grid sets, and a section of the study file therefore must not.
GRID = {
    "calibration": {"model", "seed"},
    "scoring": {"model", "seed", "criteria"},
    "pruning": {"model", "seed", "criterion", "ratio", "neuron_ratio"},
    "recovery": {"model"},
    "evaluation": {"model"},
    "cost": {"model"},
    "experiments": {"model"},
}
SETTINGS = {"workers": 2, "threads": 1, "timeout_minutes": 60.0, "offline": False}


@dataclass(frozen=True)
class Study:
    """A study file, checked; without `criteria` it has none of the jobs that follow calibration.

    `sections`: stage -> parameters of its notebook, optional stages only where the file has them; `compensations`: the
    light repairs of every pruned model, `none` among them; `recovery_criteria`: of which models are tuned; `run`: workers,
    threads, and so on.
    """

    path: Path
    name: str
    description: str
    models: list[str]
    seeds: list[int]
    criteria: list[str]
    ratios: list[float]
    neuron_ratios: list[float]
    compensations: list[str]
    recovery_criteria: list[str]
    assets: list[str]
    sections: dict[str, dict]
    run: dict

    @property
    def folder(self) -> Path:
        """The study's results folder."""
        return stage.study_folder(self.name)


def find(name: str | Path) -> Path:
    """Return the study file `name`: a path, or a name in notebooks/studies; raises UserError when there is none."""
    folder = paths.notebooks() / "studies"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in folder.glob("*.yaml")]
    raise UserError(f"no study file {str(name)!r}: {parameters.suggest(str(name), known)}")


def load(name: str | Path) -> Study:
    """Read and check a study file (see `find`).

    Raises UserError for an unknown key (with the nearest valid one), a wrong type, an empty or repeated grid axis, a
    ratio outside (0, 1), or a section's parameter that the stage's notebook does not have or that the grid sets.
    """
    path = find(name)
    try:
        content = yaml.safe_load(text_files.read_text(path, "study file"))
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} must be a mapping with models, seeds, criteria and ratios")
    fields = {"name": path.stem, "description": ""}
    _refuse_unknown(content, [*Study.__dataclass_fields__.keys() - {"path", "sections"}, *stages.STAGES], path.name)
    fields |= {key: value for key, value in content.items() if key not in stages.STAGES}
    fields["run"] = _settings(path.name, fields.get("run") or {})
    for text in ("name", "description"):
        if not isinstance(fields[text], str):
            raise UserError(f"{path.name}: {text} must be text, not {fields[text]!r}")
    # A file that only measures cost or runs experiments needs no grid.
    grid = not content.keys() & {"cost", "experiments"} or bool(content.keys() & {"criteria", "ratios", "neuron_ratios"})
    required = {"models", *(("seeds", "criteria") if grid else ())}
    axes = {"models": str, "seeds": int, "criteria": str, "compensations": str, "recovery_criteria": str, "assets": str}
    for axis, kind in axes.items():
        fields[axis] = _axis(path.name, axis, fields.get(axis, []), kind, may_be_empty=axis not in required)
    for axis in ("ratios", "neuron_ratios"):
        values = _axis(path.name, axis, fields.get(axis, []), (int, float), may_be_empty=True)
        fields[axis] = [float(ratio) for ratio in values]
        if outside := [ratio for ratio in fields[axis] if not 0 < ratio < 1]:
            raise UserError(f"{path.name}: {axis} must lie between 0 and 1, not {outside[0]:g}")
    if grid and bool(fields["ratios"]) == bool(fields["neuron_ratios"]):
        raise UserError(f"{path.name}: give either ratios (of all parameters) or neuron_ratios (of the MLP neurons)")
    for name in fields["recovery_criteria"]:
        if name not in fields["criteria"]:
            raise UserError(f"{path.name}: recovery_criteria: unknown {name!r}, {parameters.suggest(name, fields['criteria'])}")
    fields["recovery_criteria"] = fields["recovery_criteria"] or [name for name in fields["criteria"] if name not in TEXTLESS]
    used = [name for name in stages.STAGES if name not in OPTIONAL or content.keys() & {name, OPTIONAL[name]}]
    sections = {name: _section(path.name, name, content.get(name) or {}) for name in used}
    study = Study(path=path, sections=sections, **fields)
    stage.study_folder(study.name)
    return study


def _refuse_unknown(given: dict, known, where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, {parameters.suggest(str(key), known)}")


def _axis(where: str, name: str, values, kind, may_be_empty: bool) -> list:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(values, list) or not (values or may_be_empty):
        raise UserError(f"{where}: {name} must be a list with at least one entry")
    for value in values:
        if type(value) not in kinds:
            raise UserError(f"{where}: {name} must hold {kinds[-1].__name__} values, not {value!r}")
    if len(set(values)) < len(values):
        raise UserError(f"{where}: {name} names an entry twice")
    return values


def _settings(where: str, given: dict) -> dict:
    _refuse_unknown(given, SETTINGS, f"{where}, section run")
    for name, value in given.items():
        allowed = (int, float) if name == "timeout_minutes" else (type(SETTINGS[name]),)
        if type(value) not in allowed or (type(value) is not bool and value <= 0):
            wanted = "true or false" if allowed == (bool,) else f"a positive {allowed[-1].__name__}"
            raise UserError(f"{where}: run.{name} must be {wanted}, not {value!r}")
    return SETTINGS | given


def _section(where: str, name: str, given: dict) -> dict:
    taken = GRID.get(name, set()) | stages.STAGES[name].inputs.keys() | {"study"}
    if both := sorted(taken & given.keys()):
        raise UserError(f"{where}: {name}.{both[0]} is set by the grid of the study: remove it from the section")
    try:
        return parameters.check_parameters(parameters.notebook_path(name), given)
    except UserError as error:
        raise UserError(f"{where}, section {name}: {error}") from None
