"""Stage 01: token windows of a corpus."""

from hfprune_nb.runs.stages.base import Stage


class Calibration(Stage):
    """One job for each model and calibration seed."""

    name = "calibration"
    notebook = "01_calibration.ipynb"
    axes = {"seeds": "seed"}
    files = ("model", "corpus")
