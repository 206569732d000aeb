"""Keys: the address of a stage run, made of everything that decides its result.

That is: the stage and its version; the parameters that differ from their declared defaults, so that one more parameter moves no
result; the device, `auto` being decided first; local files and folders by their content; and the code of what the parameters
choose, such as a criterion's, without its comments and words.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

from hfprune_nb import paths, text_files
from hfprune_nb.files import sha256
from hfprune_nb.inputs import hub
from hfprune_nb.runs.artifacts import canonical
from hfprune_nb.runs.parameters import declared
from hfprune_nb.runs.stages import STAGES

# What of a model's folder decides what the model is; trainers leave other and larger files beside it.
MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".py", ".jinja"}
# Members of a class that decide no result: words for readers, and what forecasts ask.
WORDS = {"label", "source", "unit", "rank", "numbers_per_neuron"}


def address(stage: str, parameters: dict) -> str:
    """Return the key of a stage run with complete parameters: 16 hex digits.

    The parameter `study` never enters; references to other artifacts enter as they are.
    """
    own, defaults = STAGES[stage], declared(stage) or {}
    chosen = {name: value for name, value in parameters.items() if name != "study" and value != defaults.get(name, ...)}
    if "device" in parameters:
        chosen["device"] = device(parameters["device"])
    chosen |= contents(stage, parameters)
    code = {name: content(path) for name, path in own.sources(parameters).items()}
    version = [own.version] if own.version > 1 else []
    return hashlib.sha256(canonical([stage, *version, chosen, *filter(None, [code])]).encode()).hexdigest()[:16]


def contents(stage: str, parameters: dict) -> dict:
    """Return the parameters that name local files or folders: name -> [file name, hash of the content], or a list of such."""
    found = {name: _contents(parameters[name]) for name in STAGES[stage].files if name in parameters}
    return {name: value for name, value in found.items() if value != parameters[name]}


def device(named: str) -> str:
    """Return the device that `auto` means on this machine, without loading torch; other names as they are."""
    if named != "auto":
        return named
    return "cuda" if shutil.which("nvidia-smi") and "+cpu" not in importlib.metadata.version("torch") else "cpu"


def local_path(name: str) -> Path | None:
    """Return the file or folder that a parameter names, looked up in the working directory and in the project, or None."""
    places = [Path(name).expanduser(), paths.project() / name] if name else []
    return next((place for place in places if place.exists()), None)


def _contents(value):
    if isinstance(value, list):
        return [_contents(each) for each in value]
    if any(mark in value for mark in "*?[") and (found := text_files.matching(value)):
        return [value, hashlib.sha256(canonical([[file.name, sha256(file)] for file in found]).encode()).hexdigest()[:16]]
    path = local_path(value)
    return [path.name, content(path)] if path else value


def content(path: Path) -> str:
    """Return the hash of a file's content, or of the files that make a model's folder, with the model that adapters name."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in MODEL_SUFFIXES and file.is_file()]
        found = {file.name: content(file) for file in files}
        if base := local_path(hub.adapter_base(path)):
            found["base model"] = content(base)
        return hashlib.sha256(canonical(found).encode()).hexdigest()[:16]
    state = path.stat()
    return _hashed(str(path.resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hashed(path: str, size: int, modified: int) -> str:
    if path.endswith(".py"):
        return code_hash(Path(path).read_text(encoding="utf-8"))
    if size < 2**20:
        return sha256(Path(path))[:16]
    # Hashing a large model takes a while: once for each state of its files, as size and time tell it.
    memory = paths.cache() / "hashes" / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        if (known := json.loads(memory.read_text(encoding="utf-8")))["state"] == [size, modified]:
            return known["hash"]
    found = sha256(Path(path))[:16]
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the answer
        memory.parent.mkdir(parents=True, exist_ok=True)
        complete = memory.with_suffix(f".{os.getpid()}")
        complete.write_text(json.dumps({"path": path, "state": [size, modified], "hash": found}), encoding="utf-8")
        complete.replace(memory)
    return found


def code_hash(text: str) -> str:
    """Return the hash of a Python source that stays the same when comments, docstrings, layout or a class's words change."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_words(line)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_words(line: ast.stmt) -> bool:
    if isinstance(line, ast.Expr):
        return isinstance(line.value, ast.Constant)
    name = getattr(line.targets[0], "id", "") if isinstance(line, ast.Assign) else getattr(line, "name", "")
    return name in WORDS
