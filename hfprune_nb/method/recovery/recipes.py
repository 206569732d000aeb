"""Recipes of recovery: the published ones, and changes to them."""

import dataclasses
from typing import Any

from hfprune_nb.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is tuned: AdamW with a cosine schedule from `learning_rate` to 0, gradients clipped to norm 1.

    rank : of the LoRA adapters on all attention and MLP projections, 0 trains every weight; alpha, dropout : of the adapters;
    seq_len : tokens of a packed row; rows_per_step : packed rows in one optimizer step, over all processes.
    """

    name: str
    rank: int
    alpha: int
    dropout: float
    learning_rate: float
    weight_decay: float
    epochs: float
    seq_len: int
    rows_per_step: int


# From the published code of HFPrune (4 processes x 32 accumulated rows) and SDMPrune (4 x 16). Not known, and set as here: the
# dropout of SDMPrune, the weight decay of HFPrune's LoRA, the rows of full tuning.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("hfprune-lora", 32, 64, 0.05, 4e-4, 0.0, 2, 1024, 128),
        Recipe("sdmprune-lora", 8, 16, 0.05, 1e-4, 0.05, 2, 4096, 64),
        Recipe("full", 0, 0, 0.0, 1e-4, 0.05, 3, 1024, 128),
    )
}


def recipe(name: str, **changes: float) -> Recipe:
    """Return the recipe `name` with the fields in `changes` replaced; a change of 0 keeps the recipe's own value.

    Raises UserError for an unknown recipe, a negative value, and adapters asked of full tuning.
    """
    if name not in RECIPES:
        raise UserError(f"recipe '{name}' is unknown: choose one of {', '.join(RECIPES)}.")
    given: dict[str, Any] = {field: value for field, value in changes.items() if value}
    if negative := [field for field, value in given.items() if value < 0]:
        raise UserError(f"{negative[0]} {given[negative[0]]} is negative: give a positive number, or 0 for the recipe's own.")
    if not RECIPES[name].rank and given.keys() & {"rank", "alpha", "dropout"}:
        raise UserError(f"recipe '{name}' trains every weight and has no adapters: leave rank, alpha and dropout at 0.")
    return dataclasses.replace(RECIPES[name], **given)
