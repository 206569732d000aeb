"""Causal language models whose layers have gated MLPs of different widths, for transformers.

transformers' configurations hold such widths (`per_layer_config`), but most of its models build every layer in the global one. A
checkpoint with such widths carries this file, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
loads it; it needs torch and transformers only.
"""

import functools

import transformers
from torch import nn

PREFIX = "PerLayer"


@functools.cache
def with_widths(base: type) -> type:
    """Return the causal language model `base` as a class that builds each layer's gated MLP in its own width."""

    class PerLayer(base):
        def __init__(self, config, *args, **settings):
            text = config.get_text_config()
            widths = [layer.intermediate_size for layer in text.per_layer_config]
            # A configuration with different widths refuses to tell its global one, which is what `base` builds first.
            text.per_layer_config = None
            super().__init__(config, *args, **settings)
            set_widths(text, widths)
            for layer, width in zip(self.get_decoder().layers, widths, strict=True):
                _resize(layer.mlp, width)
            self.post_init()

    PerLayer.__name__ = PerLayer.__qualname__ = PREFIX + base.__name__
    return PerLayer


def set_widths(config, widths: list[int]) -> None:
    """Write the widths of all layers into a text configuration; it stays a plain one where they are equal."""
    config.per_layer_config = None
    config.intermediate_size = max(widths)
    if min(widths) < max(widths):
        config.per_layer_config = {layer: {"intermediate_size": width} for layer, width in enumerate(widths)}


def _resize(mlp, width):
    for name, rows in (("gate_proj", width), ("up_proj", width), ("gate_up_proj", 2 * width)):
        if isinstance(module := getattr(mlp, name, None), nn.Linear):
            setattr(mlp, name, nn.Linear(module.in_features, rows, bias=module.bias is not None))
    mlp.down_proj = nn.Linear(width, mlp.down_proj.out_features, bias=mlp.down_proj.bias is not None)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def __getattr__(name):
    """Give `PerLayerLlamaForCausalLM`, and the like of every causal language model of transformers."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(name)
    return with_widths(base)
