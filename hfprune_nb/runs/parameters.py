"""Parameters of a notebook: read from its parameters cell, checked, completed."""

import ast
import contextlib
import difflib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.runs.stages import STAGES


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: name, default, and type as an annotation such as `list[str]`."""

    name: str
    default: object
    type: str


def suggest(name: str, valid) -> str:
    """Return the end of a sentence about an unknown name: the nearest valid one, or all of them when none is near."""
    near = difflib.get_close_matches(name, [str(choice) for choice in valid], n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(map(str, valid)))}"


def notebook_path(stage: str) -> Path:
    """Return the notebook of a stage; raises UserError for an unknown stage or a missing notebook."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: {suggest(stage, STAGES)}")
    path = paths.notebooks() / STAGES[stage].notebook
    if not path.is_file():
        raise UserError(f"notebook {path} is missing: set HFPRUNE_HOME to the folder of the kit")
    return path


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook by name, in the order of its parameters cell.

    Raises UserError when there is no such cell, or when it holds anything but literals: papermill injects its values
    after this cell, so whatever were computed here would keep the old default.
    """
    return _read_parameters(Path(notebook), Path(notebook).stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_parameters(notebook: Path, modified: int) -> dict[str, Parameter]:
    # Read without papermill, whose import alone would take longer than a finished study needs to say so.
    cells = [cell for cell in read_json(notebook)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    if not cells:
        raise UserError(f"{notebook.name} has no cell tagged 'parameters': tag its first code cell")
    parameters = {}
    body: list[Any] = ast.parse("".join(cells[0]["source"]), type_comments=True).body
    for line in body:
        target: Any = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        try:
            default = ast.literal_eval(line.value)
            name = target.id
        except (AttributeError, ValueError):
            raise UserError(
                f"the parameters cell of {notebook.name} may only hold `name = literal`, not `{ast.unparse(line)}`: "
                "compute it in the next cell"
            ) from None
        # Papermill reads no annotation with `|`, and takes the parameter for an unknown one: a type comment says it instead.
        told = [*(getattr(line, "type_comment", None) or "").split(), ""][0]
        annotation = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else told.replace("|", " | ")
        parameters[name] = Parameter(name, default, _type(annotation, default))
    return parameters


def check_parameters(notebook: Path, parameters: dict) -> dict:
    """Return `parameters` with whole numbers made floats where the notebook has floats.

    Raises UserError for a name that the notebook does not have, with the nearest valid one, and for a wrong type.
    """
    known = notebook_parameters(notebook)
    refuse_unknown(parameters, notebook)
    checked = {}
    for name, value in parameters.items():
        kind = known[name].type
        try:
            checked[name] = _convert(value, ast.parse(kind, mode="eval").body)
        except TypeError:
            given = f"{type(value).__name__} {value!r}"
            remedy = ": write [...], with papermill's -y" if kind.startswith("list") and isinstance(value, str) else ""
            raise UserError(f"parameter {name!r} of {Path(notebook).name} must be {kind}, not {given}{remedy}") from None
    return checked


def complete(stage: str, parameters: dict, exploring: bool = False) -> dict:
    """Return all parameters of a stage except `study`: the given ones checked, the others at their declared defaults.

    With `exploring` the others are as the notebook says now, edits included.
    """
    notebook = notebook_path(stage)
    values: dict[str, Any] = {name: parameter.default for name, parameter in notebook_parameters(notebook).items()}
    if not exploring:
        values |= declared(stage) or {}
    values |= check_parameters(notebook, parameters)
    values.pop("study", None)
    for name, given in STAGES[stage].inputs.items():
        if given.many:
            values[name] = sorted(values[name])
    STAGES[stage].check_choices(values)
    STAGES[stage].check(values)
    STAGES[stage].check_numbers(values)
    return values


def declared(stage: str) -> dict | None:
    """Return the defaults of a stage as `notebooks/defaults.yaml` declares them, or None where it does not name the stage.

    A study takes its defaults from there, so that a notebook can be explored without changing any study, and what is at its
    default is no part of a key. Raises UserError when notebook and declaration do not have the same parameters.
    """
    file = paths.notebooks() / "defaults.yaml"
    if not file.is_file() or stage not in (content := _read_defaults(file, file.stat().st_mtime_ns)):
        return None
    notebook = notebook_path(stage)
    if differ := sorted(content[stage].keys() ^ (notebook_parameters(notebook).keys() - {"study"})):
        raise UserError(f"parameter {differ[0]!r} stands in one of {notebook.name} and {file.name} only: both must have it")
    return content[stage]


def edited(stage: str) -> dict:
    """Return the parameters of a stage whose defaults were edited in the notebook: name -> (the notebook's, the declared one)."""
    notebook = notebook_parameters(notebook_path(stage))
    pairs = {name: (notebook[name].default, value) for name, value in (declared(stage) or {}).items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@functools.lru_cache(maxsize=4)
def _read_defaults(file: Path, modified: int) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def refuse_unknown(names, notebook: Path) -> None:
    """Raise UserError for a name that is no parameter of the notebook, with the nearest one."""
    known = notebook_parameters(notebook)
    for name in names:
        if name not in known:
            raise UserError(f"{Path(notebook).name} has no parameter {name!r}: {suggest(name, known)}")


def _type(annotation: str, default) -> str:
    if annotation not in ("", "list"):
        return annotation
    if isinstance(default, list):
        kinds = {type(item).__name__ for item in default}
        return f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return "any" if default is None else type(default).__name__


def _convert(value, kind: ast.expr):
    plain = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
    match kind:
        case ast.BinOp(left=left, right=right):
            with contextlib.suppress(TypeError):
                return _convert(value, left)
            return _convert(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=item) if isinstance(value, list):
            return [_convert(element, item) for element in value]
        case ast.Subscript(value=outer):
            return _convert(value, outer)
        case ast.Name(id="float") if type(value) is int:
            return float(value)
        case ast.Constant(value=None) if value is None:
            return value
        case ast.Name(id=name) if name not in plain or type(value) is plain[name]:
            return value
    raise TypeError
