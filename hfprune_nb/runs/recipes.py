"""Recipes: a criterion, an allocation and a compensation under one name, for study files and `hfprune prune`."""

from dataclasses import dataclass

import yaml

from hfprune_nb import allocations, criteria, paths, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.families import Variant
from hfprune_nb.runs.parameters import suggest
from hfprune_nb.runs.stages import STAGES


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: variants of the families, and the name of a compensation."""

    name: str
    criterion: Variant
    allocation: Variant
    compensation: str

    @property
    def axes(self) -> dict[str, list]:
        """The recipe as the axes of a study file."""
        return {
            "criteria": [self.criterion.spec],
            "allocations": [self.allocation.spec],
            "compensations": [self.compensation],
        }


def names() -> list[str]:
    """Return the names of all recipes, as their file lists them."""
    return list(_read())


def find(name: str, **changes: str) -> Recipe:
    """Return the recipe `name`, in part replaced by `changes`: specs of a criterion or an allocation, or a compensation.

    Raises UserError for an unknown recipe or member, and for an allocation that cannot use the criterion's scores.
    """
    recipes = _read()
    if not isinstance(name, str) or name not in recipes:
        raise UserError(f"recipe: unknown {name!r}, {suggest(str(name), list(recipes))}")
    given = recipes[name] | {key: value for key, value in changes.items() if value}
    (criterion,), (allocation,) = criteria.variants(given["criterion"]), allocations.variants(given["allocation"])
    allocations.check(allocation, criterion)
    STAGES["pruning"].check_choices({"compensation": given["compensation"]})
    return Recipe(name, criterion, allocation, given["compensation"])


def _read() -> dict:
    file = paths.notebooks() / "recipes.yaml"
    return yaml.safe_load(text_files.read_text(file, "recipes")) if file.is_file() else {}
