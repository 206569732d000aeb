"""How much of a model its MLP neurons are, told without loading it: where they are few, a ratio takes too many of them."""

import contextlib
import math
import re
from pathlib import Path

from safetensors import safe_open

from hfprune_nb import paths

_MANY = 2 / 3
_NEURONS = re.compile(r"layers\.\d+\.mlp\.(gate|up|down|gate_up)_proj\.")


def share_of_neurons(model: str) -> float | None:
    """Return the fraction of all parameters that the gated MLPs of a model hold, from the headers of its weights.

    model : alias, hub id or local folder. None where its weights are not here yet, or are no safetensors.
    """
    sizes: dict = {}
    for file in _weights(model):
        with safe_open(file, framework="numpy") as tensors:
            sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    neurons = sum(size for name, size in sizes.items() if _NEURONS.search(name))
    return neurons / sum(sizes.values()) if neurons else None


def warning(model: str, ratio: float) -> str | None:
    """Return a sentence where `ratio` of all parameters is more than two thirds of a model's MLP neurons, else None."""
    share = share_of_neurons(model)
    if not share or ratio <= share * _MANY:
        return None
    taken = f"is {ratio / share:.0%} of its MLP neurons" if ratio < share else "is more than its MLP neurons are"
    return (
        f"{model}: a ratio of {ratio:.3g} {taken}, which are {share:.0%} of its parameters; half of them go at {share / 2:.2g}."
    )


def _weights(model: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folders = [Path(model).expanduser(), paths.cache() / "models" / model]
    with contextlib.suppress(HFValidationError):  # a path is no hub id
        if isinstance(configuration := try_to_load_from_cache(model, "config.json"), str):
            folders.append(Path(configuration).parent)
    return next((found for folder in folders if (found := sorted(folder.glob("*.safetensors")))), [])
