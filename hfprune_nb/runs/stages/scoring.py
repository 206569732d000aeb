"""Stage 02: the importance of every neuron by every criterion."""

from hfprune_nb import allocations, criteria
from hfprune_nb.runs.stages.base import Input, Stage, size, source


class Scoring(Stage):
    """One job for each calibration; it scores all criteria of the study, and those that its allocations read."""

    name = "scoring"
    notebook = "02_scoring.ipynb"
    inputs = {"calibration": Input("calibration", passes=("model", "seed"))}
    grid = ("model", "seed", "criteria")
    version = 2  # dtype is float32 by default, was bfloat16

    def check(self, values):
        chosen = criteria.variants(values["criteria"])
        if values.get("attention_groups"):
            criteria.check_groups(chosen)

    def common(self, study):
        wanted = [variant.spec for variant in study.variants]
        pruning = study.sections["pruning"]
        for allocation in study.axes["pruning"].get("allocation", [pruning["allocation"]] if "allocation" in pruning else []):
            (variant,) = allocations.variants(allocation)
            wanted = criteria.with_missing(wanted, variant.member.reads)
        splits = study.axes["pruning"].get("attention_split", [study.sections["pruning"].get("attention_split", "none")])
        groups = {"attention_groups": True} if set(splits) != {"none"} else {}
        return {"criteria": wanted} | groups

    def sources(self, parameters):
        return {variant.name: source(variant.criterion) for variant in criteria.variants(parameters["criteria"])}

    def work(self, parameters, known, ancestor):
        windows = ancestor(parameters["calibration"])
        tokens = windows["n_windows"] * windows["seq_len"]
        passes = [variant.passes for variant in criteria.variants(parameters["criteria"])]
        # One forward pass of the dense model serves all criteria.
        count = any(each.forward for each in passes) + sum(max(0, each.forward - 1) + each.backward for each in passes)
        count += sum(each.per_neuron for each in passes) * known["neurons_per_parameter"] * size(parameters, known)
        return tokens * count * size(parameters, known), tokens * count

    def disk(self, parameters, size, known):
        return len(parameters["criteria"]) * known["neurons_per_parameter"] * size * 8 * 16 / 1e9
