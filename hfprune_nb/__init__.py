"""Reproducibility kit for High-Fidelity Pruning for Large Language Models (HFPrune, arXiv 2603.08083).

`hfprune_nb.load(folder)` reads any checkpoint that the kit wrote. For scripts and exploring, a module answers to its short name
too: `from hfprune_nb import calibration, scoring`.
"""

import importlib
import importlib.util

__version__ = "0.1.0"

_WINGS = ("inputs", "method", "measure", "cost", "runs", "report")


def __getattr__(name):
    # On first use only: whoever reads results or asks for help does not wait for torch.
    if name == "load":
        from hfprune_nb.models import from_pretrained

        return from_pretrained
    for wing in _WINGS if not name.startswith("_") else ():
        if importlib.util.find_spec(full := f"{__name__}.{wing}.{name}"):
            return importlib.import_module(full)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
