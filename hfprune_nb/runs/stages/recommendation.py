"""Stage 12: which criterion, allocation and compensation a user should take."""

from hfprune_nb.runs.stages.base import Input, Stage


class Recommendation(Stage):
    """One job, which waits for every evaluation and scoring of the study."""

    name = "recommendation"
    notebook = "12_recommendation.ipynb"
    inputs = {
        "evaluations": Input("evaluation", many=True),
        "scorings": Input("scoring", many=True),
        "prunings": Input("pruning", many=True),
    }
    section = "recommendation"
    exported = True
    version = 2  # captions, looks that are those of the criteria

    def work(self, parameters, known, ancestor):
        return len(parameters["evaluations"]) or 1, 0
