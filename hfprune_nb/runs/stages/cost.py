"""Stage 07: what scoring and generation cost."""

from hfprune_nb.runs.stages.base import Stage, size


class Cost(Stage):
    """One job for each model; it needs no criteria."""

    name = "cost"
    notebook = "07_cost.ipynb"
    section = "cost"
    choices = {"cache": ("dynamic", "static")}
    exported = True
    files = ("model", "corpus")
    version = 3  # precision.parquet counts kept neurons; dtype is float32 by default, was bfloat16

    def from_hub(self, parameters):
        # A shape has random weights and random tokens.
        return [] if parameters["shape"] else [*super().from_hub(parameters), (parameters["corpus"], "dataset")]

    def work(self, parameters, known, ancestor):
        tokens = 20 * (parameters["repetitions"] + 1) * parameters["n_windows"] * parameters["seq_len"]
        return tokens * size(parameters, known), tokens
