"""Reproducibility kit for High-Fidelity Pruning for Large Language Models (HFPrune, arXiv 2603.08083)."""

__version__ = "0.1.0"


def __getattr__(name):
    if name == "load":  # torch is loaded by who asks for a model
        from hfprune_nb.models import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'hfprune_nb' has no attribute '{name}'")
