"""Where do allocations take neurons from? Widths by layer of the pruned models of stage 03."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.results import percent, prunings, way_of
from hfprune_nb.report.style import STYLE, UNIFORM, WIDTH, Legend, closed, message, neutral
from hfprune_nb.report.table import ABSENT, Table

WIDTHS = ["model", "ratio", "allocation", "criterion", "seed", "layer", "width", "kept"]
POINT, MEASURED = ["model", "ratio", "allocation"], ["predicted_kl", "joint_kl"]
SHAPE = ["narrowest", "widest", "levels", "lost", "rounding", *MEASURED]


def widths(pruning_folders: Iterable[Path]) -> pd.DataFrame:
    """Return `width` and the fraction `kept` of each layer of each pruned model, a row each."""
    rows = []
    for facts, _ in prunings(pruning_folders):
        ratio = round(float(facts["ratio"] if facts["ratio"] is not None else facts["neuron_ratio"]), 4)
        point = [facts["model"], ratio, way_of(facts), facts["criterion"], facts["seed"]]
        for layer, (before, after) in enumerate(zip(facts["width_before"], facts["widths"], strict=True)):
            rows.append([*point, layer, after, after / before if before else 0.0])
    return pd.DataFrame(rows, columns=WIDTHS)


def widths_figure(frame: pd.DataFrame, model: str, legend: Legend) -> Figure | None:
    """Draw the kept fraction by layer at the model's middle ratio, a line for each allocation: mean and range of its models.

    None where all widths are uniform.
    """
    ratios = sorted(frame.loc[frame["model"] == model, "ratio"].unique())
    if not ratios:
        return message("No model was pruned: there are no widths to draw.")
    ratio = ratios[(len(ratios) - 1) // 2]
    part = frame[(frame["model"] == model) & (frame["ratio"] == ratio)]
    if set(part["allocation"]) == {UNIFORM}:
        return None
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, 3.8))
        for index, (allocation, own) in enumerate(part.groupby("allocation", sort=False)):
            look = neutral(index) | {"label": legend.allocation(allocation), "markersize": 4, "mec": "none"}
            seaborn.lineplot(own, x="layer", y="kept", errorbar=("pi", 100), ax=ax, legend=False, **look)
        ax.set(xlabel="layer (0 = first)", ylabel="fraction of neurons kept", ylim=(0, 1.02))
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        ax.set_title(f"{model}, {percent(ratio)} removed: widths by layer\n(mean and range of an allocation's models)")
        fig.legend(loc="outside lower center", ncols=3)
    means = part.groupby(["allocation", "layer"])["kept"].mean()
    (least, low), (most, high) = means.idxmin(), means.idxmax()
    return closed(
        fig,
        f"The narrowest layer is {low} under {legend.allocation(least)}, with {percent(round(means.min(), 3))} of its neurons "
        f"kept, the widest {high} under {legend.allocation(most)}, with {percent(round(means.max(), 3))}.",
    )


def widths_table(pruning_folders: Iterable[Path], legend: Legend) -> Table:
    """Return, for each model, ratio and allocation, the widths and what rounding them to few or even ones cost.

    lost : fraction of the importance removed, the mean of layers and models; rounding : how much of it `multiple_of` and `levels`
    add; predicted_kl : the sum of layers' measured losses, in nats; joint_kl : what they do together.
    """
    rows = [_shape(facts) for facts, _ in prunings(pruning_folders)]
    frame = pd.DataFrame(rows, columns=[*POINT, *SHAPE]).astype(dict.fromkeys(SHAPE, float))
    grouped = frame.groupby(POINT, sort=False)
    long = grouped[SHAPE].mean().assign(n_models=grouped.size()).reset_index()
    display = pd.DataFrame(
        {
            "Model": long["model"],
            "Removed": long["ratio"].map(percent),
            "Allocation": long["allocation"].map(legend.allocation),
            "Narrowest": long["narrowest"].map("{:.0f}".format),
            "Widest": long["widest"].map("{:.0f}".format),
            "Different widths": long["levels"].map("{:.3g}".format),
            "Importance removed (%)": 100 * long["lost"],
            "of it for rounding": 100 * long["rounding"],
            "KL, sum of layers (nat)": long["predicted_kl"],
            "KL, jointly (nat)": long["joint_kl"],
        }
    )
    for name in display.columns[6:]:
        display[name] = [ABSENT if pd.isna(value) else f"{value:.3g}" for value in display[name]]
    note = (
        "Means over criteria and seeds. Rounding is what multiple_of and levels add to the importance that goes, the mean of "
        "layers. KL is measured on the allocation's own calibration windows: its columns differ by the layers' interaction."
    )
    return Table("widths", "Widths of the allocations (measured)", long, display, (note,), legend)


def _shape(facts: dict) -> list:
    ratio = round(float(facts["ratio"] if facts["ratio"] is not None else facts["neuron_ratio"]), 4)
    lost, exact = facts.get("importance_lost"), facts.get("importance_lost_exact")
    mean = sum(lost) / len(lost) if lost else None
    return [
        facts["model"],
        ratio,
        way_of(facts),
        min(facts["widths"]),
        max(facts["widths"]),
        len(set(facts["widths"])),
        mean,
        mean - sum(exact) / len(exact) if lost else None,
        *(facts.get("found", {}).get(name) for name in MEASURED),
    ]
