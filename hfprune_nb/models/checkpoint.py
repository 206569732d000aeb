"""What a model's folder holds: whole weights, all of them loaded, and nothing that only passes for weights."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hfprune_nb.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"  # how the text begins that stands for a file of Git LFS
_SHOWN = 3  # names in a sentence


def check_configuration(name: str | Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Raise UserError for a folder without config.json, and for a model that the kit cannot read, or must not.

    That is quantised weights, whose codes are no weights, and an architecture that comes as Python code, unless it is trusted.
    """
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    _refuse_pointers(name, folder)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model '{name}' has no config.json in {folder}: give the whole folder of a model.") from error
    except ValueError as error:
        raise UserError(f"model '{name}': {file} is no JSON ({error}): restore the file.") from error
    if not isinstance(found, dict):
        raise UserError(f"model '{name}': {file} holds {type(found).__name__} in place of an object: restore the file.")
    for part in (found, *(value for value in found.values() if isinstance(value, dict))):
        if quantised := part.get("quantization_config") or part.get("compression_config"):
            method = quantised.get("quant_method") or quantised.get("quant_algo") or "an unnamed method"
            raise UserError(
                f"model '{name}' holds quantised weights ({method}), which cannot be scored or pruned: give the original in "
                "bfloat16, float16 or float32."
            )
    architecture = found.get("model_type")
    if "auto_map" in found and architecture not in CONFIG_MAPPING and not trust_remote_code:
        raise UserError(
            f"model '{name}': its architecture '{architecture}' comes as Python code in its folder, which the kit does not run: "
            "choose a model whose architecture is part of transformers."
        )


def check_weights(name: str, folder: Path) -> None:
    """Raise UserError that names the file when a part of the weights is missing, cut off or only a pointer of Git LFS."""
    index = folder / "model.safetensors.index.json"
    parts = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [part for part in named if not (folder / part).is_file()]:
            raise UserError(f"model '{name}': {_list(missing)} of {len(named)} parts of its weights did not arrive: copy again.")
        parts = [folder / part for part in named]
    elif parts and not (folder / "model.safetensors").is_file():
        raise UserError(
            f"model '{name}': {index.name}, which says what {_list(part.name for part in parts)} hold, is missing: copy it too."
        )
    for part in parts:
        try:
            with safe_open(part, framework="pt") as tensors:
                coded = next((key for key in tensors.keys() if _is_coded(key, tensors)), None)  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"model '{name}': {part.name} is corrupt ({error}): copy it again.") from error
        if coded:
            raise UserError(
                f"model '{name}' holds quantised weights ({coded} in {part.name}), which cannot be scored or pruned: give the "
                "original in bfloat16, float16 or float32."
            )


def check_loaded(name: str, model, report: dict) -> None:
    """Raise UserError unless every tensor of the model came from its files, and every tensor of the files went into the model.

    report : what transformers says of the loading. Where a tensor is missing it makes a random one, and says so in a log only.
    """
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model '{name}': the weights do not fit config.json: {key} is {_shape(found)} in the file and {_shape(wanted)} "
            "by the configuration (intermediate_size, vocab_size and the like): correct config.json."
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        faults = [f"{_list(missing)} missing"] if missing else []
        faults += [f"{_list(unexpected)} without a place in it"] if unexpected else []
        raise UserError(
            f"model '{name}': its files are not the weights of {type(model).__name__}, with {' and '.join(faults)}: save the "
            "model again under the names that transformers gives them, or correct config.json."
        )
    untied = sorted(model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys())
    if untied:
        raise UserError(
            f"model '{name}': its files hold {_list(untied)} with values of its own, while config.json ties it to the embedding: "
            "set tie_word_embeddings to false there if the model was trained so."
        )


def _is_coded(key: str, tensors) -> bool:
    """Whether a weight is stored as integers or 8-bit floats, which mean nothing without their scales."""
    return key.endswith("weight") and not tensors.get_slice(key).get_dtype().startswith(("BF16", "F16", "F32", "F64"))


def _refuse_pointers(name: str | Path, folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise UserError(
                f"model '{name}': {file.name} is a pointer of Git LFS and not the file itself: run `git lfs pull` in {folder}."
            )


def _list(names) -> str:
    """Name the first few of many."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _shape(sizes) -> str:
    return " x ".join(map(str, sizes))
