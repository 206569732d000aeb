"""Reproducibility kit for High-Fidelity Pruning (HFPrune, arXiv 2603.08083): notebooks use its modules by short names."""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "assets": "inputs", "benchmarks": "inputs", "calibration": "inputs", "instructions": "inputs", "models": "inputs",
    "allocation": "method", "criteria": "method", "pruning": "method", "recovery": "method", "scoring": "method",
    "shards": "method",
    "damage": "measure", "data_parallel": "measure", "evaluation": "measure", "fidelity": "measure",
    "statistics": "measure", "tasks": "measure",
    "artifacts": "runs", "stage": "runs", "study": "runs",
    "controls": "report", "figures": "report", "measurements": "report", "neurons": "report", "published": "report",
    "question_figures": "report", "questions": "report", "tables": "report",
}  # fmt: skip


def __getattr__(name):
    # Loaded on first use, so that reading results or printing help never waits for torch.
    if name in _MODULES:
        return importlib.import_module(f"hfprune_nb.{_MODULES[name]}.{name}")
    raise AttributeError(f"module 'hfprune_nb' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
