"""What signal has self-distillation at the dense model? The size of each criterion's logit gradient."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.results import experiment, percent
from hfprune_nb.report.style import STYLE, Legend, closed, message


def gradients(experiment_folders: Iterable[Path]) -> pd.DataFrame:
    """Return the mean norm of each criterion's logit gradient by student: model, student_ratio, criterion, gradient, value."""
    parts = [
        pd.read_parquet(Path(folder) / "gradients.parquet").assign(model=experiment(folder)["model"])
        for folder in experiment_folders
    ]
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["model", "student_ratio", "criterion", "gradient"])
    )


def gradient_figure(frame: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw the size of each criterion's logit gradient by what the student has lost (log scale)."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return message("No gradient was measured: nothing to draw.")
    names, ratios = legend.in_order(rows["criterion"]), sorted(rows["student_ratio"].unique())
    positive = rows.loc[rows["gradient"] > 0, "gradient"]
    floor = positive.min() / 5
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 3.6))
        for index, criterion in enumerate(names):
            values = rows[rows["criterion"] == criterion].set_index("student_ratio")["gradient"].reindex(ratios)
            step = min(0.27, 0.81 / len(names))
            places = np.arange(len(ratios)) + step * (index - (len(names) - 1) / 2)
            ax.bar(places, values, width=step - 0.02, **legend.bar(criterion))
            for place, value in zip(places, values, strict=True):
                if value < floor:
                    text = "0" if value == 0 else f"{value:.0e}"
                    ax.text(place, floor, text, ha="center", va="bottom", color=legend.colour(criterion))
        ax.set(yscale="log", ylim=(floor, positive.max() * 2), ylabel="mean norm of dC/dz per position")
        ax.set_xticks(range(len(ratios)), ["dense model" if ratio == 0 else percent(ratio) for ratio in ratios])
        ax.set_xlabel("neurons that the scored model has lost (self-distillation: the student)")
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{model}: signal that each criterion has to score neurons with")
        fig.legend(loc="outside lower center", ncols=3)
    return closed(fig)


def gradient_sentence(frame: pd.DataFrame, model: str) -> str:
    """Return one sentence on the gradient of self-distillation at the dense model and after a first stage."""
    rows = frame[frame["model"] == model].set_index(["student_ratio", "criterion"])["gradient"]
    if rows.empty:
        return f"{model}: no gradient was measured."
    at_dense, ce = rows[0.0, "self_distillation"], rows[0.0, "one_hot_ce"]
    size = "exactly 0" if at_dense == 0 else f"{at_dense:.1e}, {at_dense / ce:.1e} of one-hot CE's"
    ratios = [ratio for ratio in rows.index.get_level_values(0).unique() if ratio > 0]
    told = ", ".join(f"{rows[ratio, 'self_distillation'] / ce:.3f} after {percent(ratio)}" for ratio in ratios)
    verdict = "has no signal" if at_dense < 1e-3 * ce else "has a signal"
    return (
        f"{model}: at the dense model self-distillation {verdict}, its logit gradient is {size}; relative to one-hot CE's it is "
        f"{told} of the neurons have been removed in a first stage."
    )
