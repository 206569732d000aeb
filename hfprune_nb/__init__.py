"""Reproducibility kit for High-Fidelity Pruning for Large Language Models (HFPrune, arXiv 2603.08083)."""

__version__ = "0.1.0"
