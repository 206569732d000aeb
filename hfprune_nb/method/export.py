"""A pruned model as a checkpoint that others can load.

Layers of equal width make a plain one. Layers of different widths are written as they are, with `per_layer_config` and the file
that `trust_remote_code` needs, or padded with zero neurons to the widest layer: a plain checkpoint of exactly the same function,
with the size and the speed of the padded model.
"""

import contextlib
import shutil
from pathlib import Path

import torch
import transformers
from torch import nn

from hfprune_nb.errors import UserError
from hfprune_nb.files import full_disk_in_one_sentence, read_json, write_json
from hfprune_nb.models import gated_mlps, modeling_per_layer
from hfprune_nb.models.modeling_per_layer import PREFIX, set_widths

PLAIN, PADDED, PER_LAYER = "plain", "plain, padded", "hfprune_nb.load"


def loads_with(widths: list[int], padded: bool = False) -> str:
    """Return what loads a checkpoint with these widths: plain transformers, also where it is padded, or `hfprune_nb.load`."""
    return PLAIN if min(widths) == max(widths) else PADDED if padded else PER_LAYER


def notes(facts: dict) -> list[str]:
    """Return the sentence that belongs under every table about a pruned model that is no plain one.

    facts : `allocation` and `loads_with`, as a pruning stage writes them.
    """
    start = f"Allocation {facts['allocation']}: layers have different widths; "
    ends = {
        PER_LAYER: "such a model loads with hfprune_nb.load or trust_remote_code, not with plain from_pretrained.",
        PADDED: "its checkpoint is padded with zero neurons for plain from_pretrained, and is larger and slower than what was "
        "measured.",
    }
    return [start + ends[facts["loads_with"]]] if facts["loads_with"] in ends else []


def save_checkpoint(model, tokenizer, folder: str | Path, padded: bool = False) -> None:
    """Write model and tokenizer as a transformers checkpoint.

    padded : where layers have different widths, write all of them as wide as the widest, the new neurons zero. Raises UserError
    when the disk is full, and for different widths in an architecture that transformers itself does not have.
    """
    folder, architecture = Path(folder), type(model).__name__.removeprefix(PREFIX)
    kind = loads_with([mlp.width for mlp in gated_mlps(model)], padded)
    if kind == PER_LAYER and not hasattr(transformers, architecture):
        raise UserError(
            f"padded: {architecture} is no class of transformers, so its layers must be equally wide: set padded to true."
        )
    as_written: contextlib.AbstractContextManager[dict] = _padded(model) if kind == PADDED else contextlib.nullcontext({})
    with full_disk_in_one_sentence(folder), as_written as changed:
        model.save_pretrained(folder, **changed)
        tokenizer.save_pretrained(folder)
        _describe(folder / "config.json", architecture, kind)


def _describe(configuration: Path, architecture: str, kind: str) -> None:
    """Name the class that loads the checkpoint, and put the file that defines it beside the configuration."""
    content = read_json(configuration) | {"architectures": [architecture]}
    if kind == PER_LAYER:
        shutil.copy(modeling_per_layer.__file__, configuration.parent)
        content["architectures"] = [PREFIX + architecture]
        content["auto_map"] = {"AutoModelForCausalLM": f"modeling_per_layer.{PREFIX}{architecture}"}
    write_json(configuration, content)


@contextlib.contextmanager
def _padded(model):
    """Make the configuration that of the padded model within the context; give `save_pretrained` what it writes then."""
    mlps, config = gated_mlps(model), model.config.get_text_config()
    widths = [mlp.width for mlp in mlps]
    names, state = {module: name for name, module in model.named_modules()}, model.state_dict()
    for mlp in mlps:
        missing = max(widths) - mlp.width
        for module in (*mlp.inputs, mlp.down):
            for name, parameter in module.named_parameters():
                key = f"{names[module]}.{name}"
                state[key] = _pad(parameter, missing, module is mlp.down, name, parts=1 + (module is mlp.fused))
    set_widths(config, [max(widths)] * len(widths))
    try:
        yield {"state_dict": state}
    finally:
        set_widths(config, widths)


def _pad(parameter, missing, is_down, name, parts):
    """Return a projection's weight or bias with `missing` zero neurons behind those of each of its `parts`."""
    if is_down:
        return nn.functional.pad(parameter, (0, missing)) if name == "weight" else parameter
    zeros = parameter.new_zeros(missing, *parameter.shape[1:])
    return torch.cat([tensor for part in parameter.chunk(parts) for tensor in (part, zeros)])
