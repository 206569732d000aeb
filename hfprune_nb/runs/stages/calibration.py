"""Stage 01: token windows of a corpus."""

from hfprune_nb.inputs import hub
from hfprune_nb.runs.stages.base import Stage


class Calibration(Stage):
    """One job for each model and calibration seed."""

    name = "calibration"
    notebook = "01_calibration.ipynb"
    axes = {"seeds": "seed"}
    files = ("model", "corpus")

    def from_hub(self, parameters):
        return [*super().from_hub(parameters), (parameters["corpus"], "dataset")]

    def work(self, parameters, known, ancestor):
        # The unit is a calibration on a small local corpus; beyond it, what tokenising a large one takes.
        large = known["data_sets"].get(hub.repository(parameters.get("corpus", "")), {})
        documents = parameters["n_windows"] / large["share_of_long_documents"] if large else 0
        return 1 + documents / known["documents_per_calibration"], 0

    def memory(self, parameters, known, ancestor):
        return 20 * _tokens(parameters) / 1e9  # four bytes a token while they are gathered, then stacked, then eight

    def disk(self, parameters, size, known):
        return super().disk(parameters, size, known) + 8 * _tokens(parameters) / 1e9


def _tokens(parameters: dict) -> int:
    return parameters.get("n_windows", 0) * parameters.get("seq_len", 0)
