"""Stage 08: ablations, calibration texts and gradients, measured on the dense model."""

from hfprune_nb import criteria, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.runs.stages.base import Stage, size, source


class Experiments(Stage):
    """One job for each model."""

    name = "experiments"
    notebook = "08_experiments.ipynb"
    section = "experiments"
    told_apart = False
    files = ("model", "corpora", "own_text")
    version = 3  # own_text is another package's code, was the kit's own; 2: dtype is float32 by default, was bfloat16

    def check(self, values):
        criteria.variants(values["criteria"])
        if (pattern := values.get("own_text")) and not text_files.matching(pattern):
            raise UserError(f"own_text={pattern!r} matches no file of kit or package: mend the pattern, or leave it empty")

    def sources(self, parameters):
        return {variant.name: source(variant.criterion) for variant in criteria.variants(parameters["criteria"])}

    def from_hub(self, parameters):
        return [*super().from_hub(parameters), *((corpus, "dataset") for corpus in parameters["corpora"])]

    def work(self, parameters, known, ancestor):
        scored = (len(parameters["corpora"]) + 2) * (1 + len(parameters["criteria"]))
        scored += 3 * len(parameters["student_ratios"])
        groups = len(parameters["group_sizes"]) * (parameters["n_groups"] + len(parameters["criteria"]))
        ablations = parameters["n_layers"] * (parameters["n_single"] + groups)
        tokens = scored * parameters["n_windows"] * parameters["seq_len"]
        tokens += ablations * parameters["truth_windows"] * parameters["truth_seq_len"]
        return tokens * size(parameters, known), tokens
