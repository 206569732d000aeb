"""Files that several wings read and write: tensors, JSON, hashes, and a full disk in one sentence."""

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError

from hfprune_nb.errors import UserError


def save_tensors(tensors: dict, file: Path) -> None:
    """Write torch tensors by name as safetensors; raise UserError when the disk is full."""
    from safetensors.torch import save_file

    with full_disk_in_one_sentence(file):
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)


def load_tensors(file: Path) -> dict:
    """Read a safetensors file as torch tensors by name; raise UserError that names it when it is missing or truncated."""
    from safetensors.torch import load_file

    return _load(load_file, file)


def _load(load_file, file):
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: run the stage that writes it first.") from error
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or corrupt: delete its folder and run the stage again ({error}).") from error


def by_layer(tensors: dict) -> dict[str, list]:
    """Return name -> what each layer has, first to last, of tensors called `NAME/LAYER` (or `NAME.LAYER`)."""
    found: dict[str, dict] = {}
    for key, tensor in tensors.items():
        name, layer = re.fullmatch(r"(.*)[/.](\d+)", key).groups()
        found.setdefault(name, {})[int(layer)] = tensor
    return {name: [rows[layer] for layer in sorted(rows)] for name, rows in found.items()}


def load_layers(file: Path) -> dict[str, list]:
    """Read a safetensors file of tensors called `NAME/LAYER` as numpy arrays, without torch; errors as `load_tensors`.

    Importance is called `VARIANT/LAYER`, a snapshot of it `VARIANT/WINDOWS/LAYER`, kept neurons `layers.LAYER`.
    """
    from safetensors.numpy import load_file

    return by_layer(_load(load_file, file))


@contextlib.contextmanager
def full_disk_in_one_sentence(target: Path):
    """Turn "no space left" into a UserError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"{target}: the disk is full; free space or choose another results folder.") from error
        raise


def read_json(path: Path):
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value) -> None:
    """Write `value` as sorted, indented JSON; numpy scalars become numbers and anything else unknown its text."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")


def claim(scratch: Path, settings: dict) -> None:
    """Write down whose unfinished work the folder `scratch` keeps; raise UserError where it keeps that of other settings."""
    file = scratch / "settings.json"
    found = read_json(file) if file.is_file() else settings
    if other := [name for name, value in settings.items() if found.get(name) != value]:
        raise UserError(f"scratch {scratch} keeps work of another run ({', '.join(other)} differ): delete it or name another.")
    scratch.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk itself."""
    if os.name != "posix":
        return  # only POSIX systems can sync a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value):
    return value.item() if hasattr(value, "item") else str(value)
