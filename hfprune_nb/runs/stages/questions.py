"""Stage 09: why the criteria agree or differ."""

from hfprune_nb.runs.stages.base import Input, Stage, rates


class Questions(Stage):
    """One job, which waits for everything that it shows."""

    name = "questions"
    notebook = "09_questions.ipynb"
    inputs = {
        "evaluations": Input("evaluation", many=True),
        "scorings": Input("scoring", many=True),
        "prunings": Input("pruning", many=True),
        "experiments": Input("experiments", many=True),
    }
    section = "experiments"
    exported = True
    version = 4  # no criterion is called best whose interval does not say so; before: captions, variance components, power plan

    def sources(self, parameters):
        return rates()

    def work(self, parameters, known, ancestor):
        return len(parameters["evaluations"]) or 1, 0
