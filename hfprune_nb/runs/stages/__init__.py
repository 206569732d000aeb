"""The stages of a study: one file each, found by their `name`; a new file here, with its notebook, is a new stage."""

import importlib
import inspect
import pkgutil

from hfprune_nb.runs.stages.base import EVERYTHING, Input, Stage

__all__ = ["EVERYTHING", "STAGES", "Input", "Stage"]


def _found() -> dict[str, Stage]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = {member for module in modules for member in vars(module).values() if inspect.isclass(member)}
    stages = [member() for member in classes if issubclass(member, Stage) and "name" in vars(member)]
    return {stage.name: stage for stage in sorted(stages, key=lambda stage: stage.notebook)}


# By name, in the order of their notebooks.
STAGES = _found()
