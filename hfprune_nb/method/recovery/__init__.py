"""Recovery: tuning a pruned model, and the dense one by the same recipe."""

from hfprune_nb.method.recovery.loss import ChunkedLoss
from hfprune_nb.method.recovery.recipes import RECIPES, Recipe, recipe
from hfprune_nb.method.recovery.training import PROJECTIONS, SAVE_EVERY, Recovered, apply, flops, recover

__all__ = ["PROJECTIONS", "RECIPES", "SAVE_EVERY", "ChunkedLoss", "Recipe", "Recovered", "apply", "flops", "recipe", "recover"]
