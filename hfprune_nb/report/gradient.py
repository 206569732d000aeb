"""What signal has self-distillation at the dense model? The size of each criterion's logit gradient."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.results import experiment, percent
from hfprune_nb.report.style import STYLE, WIDTH, Legend, closed, message


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
    """Draw the size of each criterion's logit gradient by what the student has lost (log scale; nothing at the bottom)."""
    rows = frame[frame["model"] == model]
    if rows.empty:
        return message("No gradient was measured: nothing to draw.")
    names, ratios = legend.in_order(rows["criterion"]), sorted(rows["student_ratio"].unique())
    positive = rows.loc[rows["gradient"] > 0, "gradient"]
    floor = positive.min() / 5
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, 3.4))
        for index, criterion in enumerate(names):
            values = rows[rows["criterion"] == criterion].set_index("student_ratio")["gradient"].reindex(ratios)
            places = np.arange(len(ratios)) + min(0.2, 0.6 / len(names)) * (index - (len(names) - 1) / 2)
            look = legend.look(criterion) | {"label": legend.label(criterion), "markersize": 7, "linewidth": 0.8}
            ax.plot(places, values.where(values >= floor), **look)
            for place, value in zip(places, values, strict=True):
                if value < floor:
                    text = "0" if value == 0 else f"{value:.0e}"
                    ax.plot(place, floor, **look | {"label": None}, clip_on=False)
                    ax.text(place + 0.08, floor * 1.1, text, va="bottom", color=legend.colour(criterion))
        ax.set(yscale="log", ylim=(floor, positive.max() * 2), ylabel="mean norm of dC/dz per position")
        ax.set_xticks(range(len(ratios)), ["dense model" if ratio == 0 else percent(ratio) for ratio in ratios])
        ax.set_xlabel("neurons that the scored model has lost (self-distillation: the student)")
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{model}: signal that each criterion has to score neurons with")
        fig.legend(loc="outside lower center", ncols=3)
    smallest = rows.loc[rows["gradient"].idxmin()]
    where = "at the dense model" if smallest["student_ratio"] == 0 else f"after {percent(smallest['student_ratio'])}"
    return closed(
        fig,
        f"The weakest signal is that of {legend.label(smallest['criterion'])} {where}, {smallest['gradient']:.2g}, beside "
        f"{rows['gradient'].median():.2g} in the median of all.",
    )


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
