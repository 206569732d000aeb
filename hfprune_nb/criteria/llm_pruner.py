"""LLM-Pruner's importance: what the loss of the next token would change without a neuron's weights."""

from hfprune_nb.criteria.base import WeightGradientCriterion
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy
from hfprune_nb.errors import UserError
from hfprune_nb.families import Setting


class LLMPruner(WeightGradientCriterion):
    """`sum over gate, up and down of |sum_j w_j g_j|` (vector) or of `sum_j |w_j g_j|` (element), g the mean over windows.

    Of elements also the second order, `|1/2 w q w|`, q being the mean of a window's squared gradient, and the mixed one,
    `|w g - 1/2 w q w|`: as published, where squares of a mean over T tokens count T times less than a token's curvature would.
    SDMPrune takes the absolute value of each window's own gradient, and of all three parts together. Elements need their sums in
    float64 for every weight: for small models.
    """

    name = "llm_pruner"
    label = "LLM-Pruner"
    source = "LLM-Pruner (arXiv 2305.11627), groups by sum"
    unit = "nat"
    gradient_of = OneHotCrossEntropy()
    settings = {
        "granularity": Setting(
            "vector", "where the absolute value is taken", choices={"vector": "vector-wise", "element": "element-wise"}
        ),
        "order": Setting(
            "first",
            "the order of the expansion; only elements have a second one",
            choices={"first": "first order", "second": "second order", "mixed": "mixed order"},
        ),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.subsets = int(self.granularity == "element")

    @classmethod
    def complete(cls, settings: dict) -> dict:
        """Return all settings as `Member.complete`; raise UserError also for a second order of vectors."""
        complete = super().complete(settings)
        if complete["granularity"] == "vector" and complete["order"] != "first":
            raise UserError(f"criterion '{cls.name}': order is of elements: leave it out, or add granularity element.")
        return complete

    def numbers_per_neuron(self, width, hidden):
        if self.granularity == "vector":
            return 3
        return 3 * hidden * (2 if self.order == "mixed" else 1)

    def statistics(self, weights, gradients):
        products = {part: w * g for part, w, g in zip(("gate", "up", "down"), weights, gradients, strict=True)}
        if self.granularity == "vector":
            return {part: product.sum(1) for part, product in products.items()}
        squares = {f"{part}, squared": product.square() for part, product in products.items() if self.order != "first"}
        return squares if self.order == "second" else products | squares

    def importance(self, sums, inputs, down, windows):
        if self.granularity == "vector":
            return sum(part.abs() for part in sums.values()) / windows
        changes = {}
        for name, total in sums.items():
            part, _, squared = name.partition(", ")
            changes[part] = changes.get(part, 0) + (-total[0] / 2 if squared else total[0])
        return sum(change.abs().sum(1) for change in changes.values()) / windows
