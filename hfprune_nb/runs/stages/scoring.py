"""Stage 02: the importance of every neuron by every criterion."""

from hfprune_nb import allocations, criteria
from hfprune_nb.errors import UserError
from hfprune_nb.runs.stages.base import Input, Stage, mlps, size, source

# Tokens in a batch whose size is left to the engine, on a CPU; on a GPU it takes more where they fit.
SMALL_BATCH = 512


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
        stop_at, ratios = values.get("stop_at", 0), values.get("stop_ratios")
        if not 0 <= stop_at < 1:
            raise UserError(f"stop_at {stop_at:g} is outside 0 to 1: give an overlap such as 0.95, or 0 to score all windows.")
        if stop_at and not (ratios and all(0 < ratio < 1 for ratio in ratios)):
            raise UserError(f"stop_ratios {ratios} must be shares of a layer's neurons between 0 and 1: give those that go.")

    def common(self, study):
        wanted = [variant.spec for variant in study.variants]
        pruning = study.sections["pruning"]
        for allocation in study.axes["pruning"].get("allocation", [pruning["allocation"]] if "allocation" in pruning else []):
            (variant,) = allocations.variants(allocation)
            wanted = criteria.with_missing(wanted, variant.member.reads)
        splits = study.axes["pruning"].get("attention_split", [study.sections["pruning"].get("attention_split", "none")])
        groups = set(splits) != {"none"} and any(variant.of_groups for variant in study.variants)
        return {"criteria": wanted} | ({"attention_groups": True} if groups else {})

    def sources(self, parameters):
        return {variant.name: source(variant.criterion) for variant in criteria.variants(parameters["criteria"])}

    def work(self, parameters, known, ancestor):
        windows = ancestor(parameters["calibration"])
        tokens = windows["n_windows"] * windows["seq_len"]
        passes = [variant.passes for variant in criteria.variants(parameters["criteria"])]
        # One forward pass of the dense model serves all criteria.
        count = any(each.forward for each in passes) + sum(max(0, each.forward - 1) + each.backward for each in passes)
        layers, width, _ = mlps(parameters, known)
        count += sum(each.per_neuron for each in passes) * layers * width
        return tokens * count * size(parameters, known), tokens * count

    def memory(self, parameters, known, ancestor):
        # float64 sums for each snapshot or subset of the windows, and what one batch adds to them.
        windows = ancestor(parameters["calibration"])
        batch = parameters.get("batch_size") or max(1, SMALL_BATCH // windows["seq_len"])
        layers, width, hidden = mlps(parameters, known)
        numbers = 0
        for criterion in [variant.create() for variant in criteria.variants(parameters["criteria"])]:
            kept = criterion.subsets or windows["n_windows"].bit_length() + 1
            numbers += (kept + min(batch, windows["n_windows"])) * criterion.numbers_per_neuron(width, hidden)
        return 8 * numbers * layers * width / 1e9

    def disk(self, parameters, size, known):
        layers, width, _ = mlps(parameters, known)
        return len(parameters["criteria"]) * layers * width * 8 * 16 / 1e9
