"""Stage 06: the evaluations as tables and figures."""

from hfprune_nb.errors import UserError
from hfprune_nb.runs.stages.base import Input, Stage, rates


class Figures(Stage):
    """One job, which waits for all evaluations."""

    name = "figures"
    notebook = "06_figures.ipynb"
    inputs = {"evaluations": Input("evaluation", many=True)}
    exported = True
    version = 4  # the hero figure shows the verdict's measures; before: captions, a verdict, accuracies as the first average

    def check(self, values):
        if wrong := [
            name for name, margin in values.get("margins", {}).items() if not (isinstance(margin, int | float) and margin > 0)
        ]:
            raise UserError(f"margins: that of {wrong[0]} must be a number above 0, the difference that is too small to matter")

    def sources(self, parameters):
        return rates()

    def work(self, parameters, known, ancestor):
        return len(parameters["evaluations"]) or 1, 0
