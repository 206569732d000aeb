"""Stage 06: the evaluations as tables and figures."""

from hfprune_nb.runs.stages.base import Input, Stage


class Figures(Stage):
    """One job, which waits for all evaluations."""

    name = "figures"
    notebook = "06_figures.ipynb"
    inputs = {"evaluations": Input("evaluation", many=True)}
    exported = True

    def work(self, parameters, known, ancestor):
        return len(parameters["evaluations"]) or 1, 0
