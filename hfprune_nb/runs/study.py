"""Studies: a YAML file becomes a grid of stage runs, of which `scheduler.run` computes exactly those that are missing or stale.

Every job of the grid knows its key before anything runs, so a study can be stopped anywhere and resumed. A job is
computed again when a file of it was changed or lost, or when an input has other bytes than it had then; an input that
was recomputed to the same bytes stops there (early cut-off).
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from hfprune_nb import allocations, criteria, paths, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.runs import grid, parameters, recipes, stage
from hfprune_nb.runs.stages import STAGES

SETTINGS = {"workers": 2, "threads": 1, "timeout_minutes": 60.0, "offline": False, "warm": True}
# Key of a study file -> the stage and its parameter that takes each of the values in turn.
AXES = {key: (name, parameter) for name, each in STAGES.items() for key, parameter in each.axes.items()}
# Keys that set a parameter of this name in every stage that has one, unless its section does.
SHARED = ("attention",)
KEYS = (
    *SHARED,
    "name",
    "description",
    "extends",
    "models",
    "assets",
    "recipe",
    "recovery_criteria",
    "impossible",
    "axes",
    "run",
    *AXES,
    *STAGES,
)


@dataclass(frozen=True)
class Study:
    """A study file, checked, with what it extends; without criteria it has only the jobs that need none.

    `variants`: its criteria; `axes`: stage -> parameter -> the values that it takes in turn; `recovery_criteria`: names of the
    variants whose models are tuned; `sections`: stage -> parameters of its notebook, only of the stages that the study has;
    `run`: workers, threads, and so on; `content`: the whole file as data; `jobs`: the grid, as
    local files were when the study was loaded.
    """

    path: Path
    name: str
    description: str
    models: list[str]
    assets: list[str]
    variants: list
    axes: dict[str, dict[str, list]]
    recovery_criteria: list[str]
    sections: dict[str, dict]
    run: dict
    content: dict = field(repr=False)
    jobs: list = field(default_factory=list, repr=False)

    @property
    def folder(self) -> Path:
        """The study's results folder."""
        return stage.study_folder(self.name)

    @property
    def text(self) -> str:
        """The study as one file: as it stands, or with what it extends put in."""
        own = text_files.read_text(self.path, "study file")
        return yaml.safe_dump(self.content, sort_keys=False) if re.search(r"^extends\s*:", own, re.MULTILINE) else own

    @property
    def skips_impossible(self) -> bool:
        """Whether a combination that cannot be, such as a criterion's scores with an allocation or a split, is left out."""
        return self.content.get("impossible") == "skip"

    def variant(self, name: str):
        """Return the criterion variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def find(name: str | Path, beside: Path | None = None) -> Path:
    """Return the study file `name`: a path, in the folder `beside` first, or a name in notebooks/studies.

    Raises UserError when there is none.
    """
    folder = paths.notebooks() / "studies"
    for path in (*([beside / name] if beside else []), Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in folder.glob("*.yaml")]
    raise UserError(f"no study file {str(name)!r}: {parameters.suggest(str(name), known)}")


def load(name: str | Path) -> Study:
    """Read and check a study file (see `find`) with what it extends.

    Raises UserError for an unknown key (with the nearest valid one), a wrong type, an empty or repeated axis, an unknown
    criterion or setting, a section's parameter that the stage's notebook does not have or that the grid sets, a file that is not
    there, and whatever a stage refuses of its parameters.
    """
    path = find(name)
    content = _read(path.resolve())
    try:
        study = _checked(path, content)
        stage.study_folder(study.name)
        return replace(study, jobs=grid.plan(study))
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def _checked(path: Path, content: dict) -> Study:
    texts = {"name": path.stem, "description": ""} | {key: content[key] for key in ("name", "description") if key in content}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{key} must be text, not {text!r}: put it in quotes")
    if content.get("impossible", "refuse") not in ("refuse", "skip"):
        raise UserError(f"impossible must be refuse or skip, not {content['impossible']!r}")
    if "recipe" in content:
        content = recipes.find(content["recipe"]).axes | content
    # A file that only measures cost or runs experiments needs no criteria.
    alone = [name for name in content if name in STAGES and STAGES[name].section == name and not STAGES[name].inputs]
    required = {"models", "seeds", "criteria"} if not alone or content.keys() & AXES.keys() else {"models"}
    lists = {key: _list(key, content.get(key), key in required) for key in ("models", "assets", "recovery_criteria", *AXES)}
    variants = criteria.variants(lists["criteria"])
    allocations.variants(lists["allocations"])
    names = [variant.name for variant in variants]
    tuned = lists["recovery_criteria"] or [variant.name for variant in variants if not variant.criterion.baseline]
    for name in tuned:
        if name not in names:
            raise UserError(f"recovery_criteria: unknown {name!r}, {parameters.suggest(str(name), names)}")
    axes: dict[str, dict] = {name: {} for name in STAGES}
    for key, values in (lists | {"criteria": names}).items():
        if key in AXES and values:
            name, parameter = AXES[key]
            axes[name][parameter] = _values(key, name, parameter, values)
    for name, own in _mapping("axes", content.get("axes")).items():
        _refuse_unknown({name: own}, STAGES, "section axes: ")
        if own and not STAGES[name].told_apart:
            raise UserError(f"axes.{name}: no table tells these apart: write a study for each value, that extends this one")
        for parameter, values in _mapping(f"axes.{name}", own).items():
            key = f"axes.{name}.{parameter}"
            axes[name][parameter] = _values(key, name, parameter, _list(key, values, True))
    used = [name for name, each in STAGES.items() if not each.section or content.keys() & {name, each.section}]
    shared = {key: content[key] for key in SHARED if key in content}
    sections = {name: _section(name, _mapping(name, content.get(name)), axes[name], shared) for name in used}
    return Study(
        path=path,
        **texts,
        models=_values("models", "evaluation", "model", lists["models"]),
        assets=lists["assets"],
        variants=variants,
        axes=axes,
        recovery_criteria=tuned,
        sections=sections,
        run=_settings(_mapping("run", content.get("run"))),
        content=content,
    )


class _Loader(yaml.SafeLoader):
    """YAML with 2e-5 as a number, and without keys that are given twice, of which the first would be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise UserError(f"{key!r} is given twice, again in line {line}: join the two")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict:
    """Return the content of a study file over that of the file that it extends, with its relative paths found."""
    if path in extending:
        circle = " -> ".join(each.name for each in (*extending[extending.index(path) :], path))
        raise UserError(f"{path.name}: extends goes round in a circle ({circle}): one of these files must not extend")
    try:
        content = yaml.load(text_files.read_text(path, "study file"), _Loader)
        if not isinstance(content, dict):
            raise UserError("must be a mapping with models, seeds, criteria and ratios")
        _refuse_unknown(content, KEYS)
        _locate(content, path.parent)
        base = content.pop("extends", None)
        if base is None:
            return content
        if not isinstance(base, str):
            raise UserError(f"extends must be the name of one study file, not {base!r}")
        parent = find(base, path.parent).resolve()
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    return _merged(_read(parent, (*extending, path)), content)


def _merged(base: dict, own: dict) -> dict:
    merged = base | own
    for key in base.keys() & own.keys():
        if isinstance(base[key], dict) and isinstance(own[key], dict):
            merged[key] = _merged(base[key], own[key])
    return {key: value for key, value in merged.items() if value is not None or key not in base}


def _locate(content: dict, folder: Path) -> None:
    """Make paths absolute in place: a relative one is looked up beside the study file, then in the kit and where the user is."""
    for name, each in STAGES.items():
        if isinstance(section := content.get(name), dict):
            for parameter in each.files:
                if parameter in section:
                    section[parameter] = _located(section[parameter], folder, f"{name}.{parameter}")
    if "models" in content:
        content["models"] = _located(content["models"], folder, "models")


def _located(value, folder: Path, key: str):
    if isinstance(value, list):
        return [_located(each, folder, key) for each in value]
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    if any(mark in value for mark in "*?[") and text_files.matching(str(folder / path)):
        return str(folder / path)
    if (folder / path).exists():
        return str(folder / path)
    is_model = key.endswith("model") or key == "models"
    if (paths.project() / path).exists():
        return str(paths.project() / path) if is_model else value
    if path.exists():
        return str(path.resolve())
    if value.startswith(("/", "./", "../", "~")) or (not is_model and re.search(r"\.(txt|jsonl?|parquet)(\.\w+)?$", value)):
        places = f"{folder}, {paths.project()} and {Path.cwd()}"
        raise UserError(f"{key}: {value!r} does not exist: it was looked for in {places}")
    return value


def _refuse_unknown(given: dict, known, where: str = "") -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}unknown key {key!r}, {parameters.suggest(str(key), known)}")


def _mapping(key: str, value) -> dict:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{key} must be a section with `name: value` lines, not {value!r}")
    return value or {}


def _list(key: str, values, required: bool) -> list:
    values = [] if values is None and not required else values
    if not isinstance(values, list) or (required and not values):
        raise UserError(f"{key} must be a list with at least one entry")
    if twice := [value for position, value in enumerate(values) if value in values[:position]]:
        raise UserError(f"{key} names an entry twice: {twice[0]}")
    return values


def _values(key: str, name: str, parameter: str, values: list) -> list:
    """Return the values of an axis, each checked as the parameter that it sets."""
    if parameter in STAGES[name].inputs or parameter == "study":
        raise UserError(f"{key} is set by the grid of the study: list another parameter")
    try:
        notebook = parameters.notebook_path(name)
        return [parameters.check_parameters(notebook, {parameter: value})[parameter] for value in values]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _settings(given: dict) -> dict:
    _refuse_unknown(given, SETTINGS, "section run: ")
    for name, value in given.items():
        allowed = (int, float) if name == "timeout_minutes" else (type(SETTINGS[name]),)
        if type(value) not in allowed or (type(value) is not bool and value <= 0):
            wanted = "true or false" if allowed == (bool,) else f"a positive {allowed[-1].__name__}"
            raise UserError(f"run.{name} must be {wanted}, not {value!r}")
    return SETTINGS | given


def _section(name: str, given: dict, axes: dict, shared: dict) -> dict:
    own = {parameter for parameter in STAGES[name].axes.values() if parameter in grid.ALWAYS}
    taken = {*own, *axes, *STAGES[name].grid, *STAGES[name].inputs, "study"}
    if both := sorted(taken & given.keys()):
        raise UserError(f"{name}.{both[0]} is set by the grid of the study: remove it, or set it to null where it is inherited")
    notebook = parameters.notebook_path(name)
    known = parameters.notebook_parameters(notebook).keys()
    try:
        return parameters.check_parameters(notebook, {key: shared[key] for key in shared if key in known} | given)
    except UserError as error:
        raise UserError(f"section {name}: {error}") from None
