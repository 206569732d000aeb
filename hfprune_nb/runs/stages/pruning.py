"""Stage 03: from scores to a narrower model."""

from hfprune_nb import allocations, criteria
from hfprune_nb.errors import UserError
from hfprune_nb.runs.stages.base import Input, Stage, mlps, size, source
from hfprune_nb.runs.stages.scoring import Scoring


class Pruning(Stage):
    """One job for each scoring, criterion, ratio, allocation, compensation and split between MLPs and attention."""

    name = "pruning"
    notebook = "03_pruning.ipynb"
    inputs = {"scores": Input("scoring", passes=("model", "seed", "device"), within=("criterion", "criteria"))}
    axes = {
        "criteria": "criterion",
        "ratios": "ratio",
        "neuron_ratios": "neuron_ratio",
        "allocations": "allocation",
        "compensations": "compensation",
        "attention_splits": "attention_split",
    }
    grid = ("model", "seed")
    choices = {
        "compensation": ("none", "least_squares", "least_squares_bias", "flap_bias"),
        "attention_split": ("none", "proportional", "measured"),
    }
    version = 2  # dtype is float32 by default, was bfloat16

    def check(self, values):
        (rule,) = allocations.variants(values["allocation"])
        if values.get("levels", 0) < 0:
            raise UserError(f"levels {values['levels']} must be 0, for any number of different widths, or above")
        ratios = {name: values[name] for name in ("ratio", "neuron_ratio") if values[name]}
        for name, value in ratios.items():
            if not 0 < value < 1:
                raise UserError(f"{name} {value:g} must lie between 0 and 1: write 20 % as 0.2")
        if len(ratios) != 1:
            raise UserError("give either ratio (of all parameters) or neuron_ratio (of the MLP neurons), and 0 for the other")
        if (rounds := values.get("rounds", 1)) < 1:
            raise UserError(f"rounds {rounds} must be 1, or above to score what is left again in between")
        self._check_combination(values, rule)

    def _check_combination(self, values, rule):
        """Raise UserError for values that are right, each by itself, and cannot go together."""
        rounds = values.get("rounds", 1)
        if values.get("attention_split", "none") != "none":
            if values.get("neuron_ratio"):
                raise UserError("attention_split shares out a ratio of all parameters: give ratio in place of neuron_ratio")
            if rounds != 1:
                raise UserError("rounds score neurons anew and no attention groups: set rounds to 1, or attention_split to none")
        if rounds > 1 and not rule.member.in_rounds:
            raise UserError(f"allocation '{rule.name}' cannot share out in rounds: set rounds to 1, or choose another allocation")

    def warning(self, values):
        from hfprune_nb.inputs import shares  # it reads weights, which plans do not

        return shares.warning(values["model"], values["ratio"])

    def plan(self, grid):
        seeds = grid.study.axes["calibration"].get("seed", [])
        for values in grid.combinations(self.name):
            variant = grid.study.variant(values["criterion"])
            given = grid.study.sections[self.name] | values
            (rule,) = allocations.variants(given.get("allocation", "uniform"))
            try:
                criteria.check_split(given.get("attention_split", "none"), variant)
                allocations.check(rule, variant)
                self._check_combination(given, rule)
            except UserError:
                if grid.study.skips_impossible:
                    continue
                raise
            for job in grid.of("scoring"):
                allocations.check_windows(rule, grid.jobs[job.parameters["calibration"]].parameters["n_windows"])
                # One seed says all about a criterion that reads weights alone, unless the allocation reads text.
                if variant.criterion.seeded or rule.member.needs or job.point["seed"] == seeds[0]:
                    own = {"model": job.point["model"], "seed": job.point["seed"], "scores": job.reference}
                    grid.add(self.name, job.point, {"ratio": 0.0, "neuron_ratio": 0.0} | own | values)

    def sources(self, parameters):
        (variant,) = allocations.variants(parameters["allocation"])
        return {variant.name: source(variant.member)}

    def work(self, parameters, known, ancestor):
        amount, tokens = self._rescoring(parameters, known, ancestor)
        measured, rates = self._measured(parameters, known, ancestor), known["devices"]["cpu"]["seconds_per_unit"]
        # The unit of this stage is a parameter; scoring and measuring take parameter-tokens.
        amount = (amount + measured * size(parameters, known)) * rates["scoring"] / rates["pruning"]
        return size(parameters, known) + amount, tokens + measured

    def _rescoring(self, parameters, known, ancestor):
        """Return the work and the tokens of all rounds but the first, which was scored before."""
        if parameters.get("rounds", 1) == 1:
            return 0, 0
        again = parameters["rounds"] - 1
        amount, tokens = Scoring().work(self._scored_again(parameters, ancestor), known, ancestor)
        return again * amount, again * tokens

    def memory(self, parameters, known, ancestor):
        layers, width, _ = mlps(parameters, known)
        squares = 8 * layers * width**2 / 1e9 if parameters.get("compensation", "none") != "none" else 0
        if parameters.get("rounds", 1) == 1:
            return squares
        scored = self._scored_again(parameters, ancestor)
        return max(squares, Scoring().memory(scored, known, ancestor))

    def _scored_again(self, parameters, ancestor):
        """Return the parameters of a scoring by this run's criterion alone."""
        scored = ancestor(parameters["scores"])
        chosen = [variant.spec for variant in criteria.variants(scored["criteria"]) if variant.name == parameters["criterion"]]
        return scored | {"criteria": chosen}

    def _measured(self, parameters, known, ancestor):
        """Return the tokens that pass the model while the allocation measures."""
        (variant,) = allocations.variants(parameters.get("allocation", "uniform"))
        if not issubclass(variant.member, allocations.MeasuredRule):
            return 0
        windows = ancestor(ancestor(parameters["scores"])["calibration"])
        passes = 1 + variant.member.measurements * mlps(parameters, known)[0] / 2
        return passes * variant.settings["windows"] * windows["seq_len"]

    def disk(self, parameters, size, known):
        return checkpoint(parameters, size)


def checkpoint(parameters: dict, size: float) -> float:
    """Return the GB of a checkpoint in the run's dtype, if one is written."""
    width = {"float32": 4, "float64": 8}.get(parameters.get("dtype"), 2)
    return width * size * (1 - parameters.get("ratio", 0)) / 1e9 if parameters.get("save_checkpoint") else 0.002
