"""Stage 04: tuning after pruning, and the dense model by the same recipe."""

from hfprune_nb.runs.stages.base import Input, Stage, size
from hfprune_nb.runs.stages.pruning import checkpoint

# A training step is a forward pass and twice that backward.
TRAINING_PASSES = 3


class Recovery(Stage):
    """One job for each pruned model of the criteria that are tuned, and for each dense model, their control."""

    name = "recovery"
    notebook = "04_recovery.ipynb"
    inputs = {"pruned": Input("pruning", optional=True)}
    section = "recovery"
    choices = {"recipe": ("hfprune-lora", "sdmprune-lora", "full")}
    exported = True
    told_apart = False
    files = ("model", "data")
    version = 2  # dtype is float32 by default, was bfloat16

    def plan(self, grid):
        tuned = [job for job in grid.of("pruning") if job.point["criterion"] in grid.study.recovery_criteria]
        for values in grid.combinations(self.name):
            for model in grid.study.models:
                point = {"model": model, "criterion": "dense", "recovery": "tuned"}
                grid.add(self.name, point, {"model": model} | values)
            for job in tuned:
                own = {"model": job.point["model"], "pruned": job.reference}
                grid.add(self.name, job.point | {"recovery": "tuned"}, own | values)

    def from_hub(self, parameters):
        return [*super().from_hub(parameters), (parameters["data"], "dataset")]

    def work(self, parameters, known, ancestor):
        recipe, texts = known["recipes"][parameters["recipe"]], known["instructions"]
        records = parameters["n_records"] or texts["records"].get(parameters["data"], texts["records"]["default"])
        tokens = records * texts["tokens_per_record"] * (parameters["epochs"] or recipe["epochs"])
        if parameters["max_steps"]:
            rows = parameters["rows_per_step"] or recipe["rows_per_step"]
            tokens = parameters["max_steps"] * rows * (parameters["seq_len"] or recipe["seq_len"])
        return TRAINING_PASSES * tokens * size(parameters, known), tokens

    def disk(self, parameters, size, known):
        return checkpoint(parameters, size)
