"""Scoring: from windows of text to the importance of every neuron."""

from hfprune_nb.method.scoring.engine import score
from hfprune_nb.method.scoring.scores import Scores, load_groups, load_importance, load_snapshots

__all__ = ["Scores", "load_groups", "load_importance", "load_snapshots", "score"]
