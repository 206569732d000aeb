"""What does tuning bring back? Pruned models beside the dense control, each untuned and tuned by the same recipe, data and seed.

The paper compares a tuned pruned model with an untuned dense one. What tuning adds to the pruned model beyond what it adds to the
dense one is the difference in differences, `(pruned tuned - pruned untuned) - (dense tuned - dense untuned)`, item by item.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report import intervals, style
from hfprune_nb.report.apart import told_apart
from hfprune_nb.report.paper import read
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import (
    UNITS,
    Column,
    Results,
    collect,
    columns,
    model_row,
    percent,
    read_summary,
    sample,
    split_of,
    treatment,
)
from hfprune_nb.report.table import ABSENT, ONE_SEED, Table, format_cell, format_p, within_limits

MEASURED = ("task", "average", "average_without_crows", "perplexity")
SHOWN = ("average", "average_without_crows", "perplexity")
STATES = {False: "untuned", True: "tuned"}
GAIN, BEYOND = "tuned - untuned", "gain beyond the dense model's"
COMPENSATIONS = {
    "none": "",
    "least_squares": "least squares",
    "least_squares_bias": "least squares with bias",
    "flap_bias": "FLAP's bias",
}
PAPER_MODELS = {
    "meta-llama/Llama-2-7b-hf": "LLaMA-2-7B",
    "meta-llama/Llama-3.2-3B": "LLaMA3.2-3.2B",
    "meta-llama/Llama-3.2-1B": "LLaMA3.2-1.2B",
    "Qwen/Qwen2.5-7B": "Qwen2.5-7B",
    "Qwen/Qwen2.5-1.5B": "Qwen2.5-1.5B",
    "Qwen/Qwen3-1.7B": "Qwen3-1.7B",
}
DEFAULT_PAPER_MODEL = "LLaMA-2-7B"

# The paper's untuned rows are its Table 6; tuned rows of other criteria than the two are not in it.
PAPER_METHODS = {
    ("dense", False): ("dense",),
    ("entropy", True): ("HFPrune",),
    ("entropy", False): ("IE",),
    ("one_hot_ce", False): ("CE",),
    ("self_distillation", False): ("SD",),
    ("self_distillation", True): ("SDMPrune",),
}
PAPER_REMARK = (
    "Paper: average of ten tasks as printed for {model}; its dense row is untuned and a tuned dense row does not exist, so its "
    "tuned rows cannot be told from the effect of tuning alone."
)
READING = (
    "'tuned - untuned' and 'gain beyond the dense model's' are paired by item and calibration seed: percentage points for "
    "tasks, nats per token for perplexity (negative is better there), with 95 % intervals over seeds and items; p-values carry "
    f"Holm's correction over all differences of one column on one model. {intervals.FAMILY_ERROR} "
    "One seed gives no p-value and no verdict. The dense "
    "model is tuned once: what another order of the same data would do to it is in no interval."
)


class Recovered:
    """A study's evaluations by treatment: (tuned, compensation) -> Results, and what each tuning cost.

    split : which of the pruned models, by how their loss was shared between MLPs and attention (`selection.SPLITS`).
    """

    def __init__(self, evaluation_folders: Iterable[Path], split: str = "none"):
        folders = [Path(folder) for folder in evaluation_folders]
        read = told_apart((read_summary(folder), folder) for folder in folders)
        summaries = [summary for summary, _ in read if split_of(summary) in (style.DENSE, split)]
        self.by_treatment: dict[tuple[bool, str], Results] = {
            found: collect(folders, *found, split) for found in sorted({treatment(summary) for summary in summaries})
        }
        self.spent = [
            {name: summary[name] for name in ("model", "ratio", "seed", "compensation")}
            | {"criterion": model_row(summary)["criterion"]}
            | summary["recovery"]
            for summary in summaries
            if summary.get("tuned")
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to compare: an untuned model, and one that was tuned or compensated."""
        return len(self.by_treatment) > 1 and (False, "none") in self.by_treatment

    @property
    def legend(self) -> style.Legend:
        """Order, names and looks of the criteria."""
        return self.plain.legend

    @property
    def plain(self) -> Results:
        """The untuned models without compensation."""
        return self.by_treatment[False, "none"]

    def sample(self, tuned: bool, compensation: str, column: Column, model: str, criterion: str, ratio: float) -> pd.DataFrame:
        """Return one cell's data as `results.sample` does, empty where it was not measured."""
        # The dense model has no loss to be compensated.
        found = self.by_treatment.get((tuned, "none" if criterion == "dense" else compensation))
        return pd.DataFrame() if found is None else sample(found, column, model, criterion, ratio)


def recovery_table(recovered: Recovered) -> Table:
    """Return the recovery table: a row per model state, then its gains from tuning.

    `long` has the columns model, ratio, criterion, compensation, state (untuned, tuned, the two differences), column, measure,
    label, mean, low, high, p and p_holm (differences only), n_seeds, n_items, source and note.
    """
    rows = []
    for model in recovered.plain.model_names:
        shown = [column for column in columns(recovered.plain, model) if column.measure in MEASURED]
        for point in _points(recovered, model):
            for column in shown:
                cells = _cells(recovered, model, *point, column)
                rows += [{**_keys(model, point), **_named(column), **cell} for cell in cells]
    long = pd.DataFrame(rows)
    long["p_holm"] = long.groupby(["model", "column"])["p"].transform(lambda p: intervals.holm(p))
    notes = (READING, _spent_sentence(recovered), _paper_remark(recovered), protocol_note(recovered.plain))
    title = "Recovery beside the dense control: the same recipe, data and seed for every tuned row (measured)"
    return Table("recovery", title, long, _display(recovered, long), notes, recovered.legend)


def recovery_figure(table: Table, model: str) -> Figure:
    """Draw, for the average and each perplexity, every model untuned (hollow) and tuned (filled), with intervals."""
    cells = table.long[(table.long["model"] == model) & table.long["measure"].isin(SHOWN)]
    names = list(dict.fromkeys(cells["column"]))
    states = cells[cells["state"].isin(STATES.values())]
    points = list(dict.fromkeys(zip(states["criterion"], states["ratio"], states["compensation"], strict=True)))
    with plt.rc_context(style.STYLE):
        fig, axes = plt.subplots(1, len(names), figsize=(style.WIDTH, 1.1 + 0.42 * len(points)), sharey=True, squeeze=False)
        for ax, name in zip(axes[0], names, strict=True):
            part = states[states["column"] == name]
            for height, (criterion, ratio, compensation) in enumerate(points):
                at = part[(part["criterion"] == criterion) & (part["ratio"] == ratio) & (part["compensation"] == compensation)]
                for shift, cell in zip((-0.13, 0.13), at.sort_values("state", ascending=False).to_dict("records"), strict=False):
                    colour = table.legend.colour(criterion)
                    ax.plot([cell["low"], cell["high"]], [height + shift] * 2, color=colour, lw=1.2)
                    face = colour if cell["state"] == STATES[True] else "white"
                    ax.plot(cell["mean"], height + shift, marker="o", color=colour, mfc=face)
            measure = part["measure"].iloc[0]
            if measure == "perplexity":
                ax.set_xscale("log")
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_formatter("{x:g}")
            ax.set_title(part["label"].iloc[0].replace(" without", "\nwithout"), fontsize=9)
            ax.set_xlabel("lower is better" if measure == "perplexity" else "higher is better")
        axes[0][0].set_yticks(range(len(points)), [_point_label(*point, table.legend) for point in points])
        axes[0][0].set_ylim(len(points) - 0.5, -0.5)
        fig.suptitle(f"{model}: hollow untuned, filled tuned")
    gains = cells[(cells["state"] == GAIN) & (cells["measure"] == "average")].drop_duplicates(
        ["criterion", "ratio", "compensation"]
    )
    if gains.empty:
        return style.closed(fig)
    told = [
        f"{_point_label(row['criterion'], row['ratio'], row['compensation'], table.legend)} by {_in_points(row)}".replace(
            "\n", ", "
        )
        for row in gains.to_dict("records")
    ]
    return style.closed(fig, f"Tuning changes the average, in points, of {'; '.join(told)}.")


def sentences(table: Table) -> list[str]:
    """Return what the table says of each pruned model's average: its gain, the dense model's, and what is left of the gain."""
    found = []
    average = table.long[table.long["column"] == "average"]
    for (model, ratio, criterion, compensation), cells in average.groupby(
        ["model", "ratio", "criterion", "compensation"], sort=False
    ):
        by_state = {cell["state"]: cell for cell in cells.to_dict("records")}
        if BEYOND not in by_state:
            continue
        dense = average[(average["model"] == model) & (average["criterion"] == "dense") & (average["state"] == GAIN)]
        gain, beyond = by_state[GAIN], by_state[BEYOND]
        compensated = f", compensated by {COMPENSATIONS[compensation]}" if COMPENSATIONS.get(compensation) else ""
        verdict = ONE_SEED if pd.isna(beyond["p_holm"]) else "the two gains are not told apart"
        if beyond["p_holm"] < 1 - intervals.LEVEL:
            verdict = f"the pruned model gained {'more' if beyond['mean'] > 0 else 'less'}"
        found.append(
            f"{model}, {table.legend.label(criterion)} at {percent(ratio)}{compensated}: tuning changed the average by "
            f"{_in_points(gain)} points, that of the dense model by {_in_points(dense.iloc[0])}; "
            f"difference {_in_points(beyond)}: {verdict}."
        )
    return found


def _points(recovered: Recovered, model: str) -> list[tuple[str, float, str]]:
    found = set()
    for (_, compensation), results in recovered.by_treatment.items():
        of_model = results.models[results.models["model"] == model]
        for criterion, ratio in zip(of_model["criterion"], of_model["ratio"], strict=True):
            found.add((criterion, ratio, "none" if criterion == "dense" else compensation))
    return sorted(found, key=lambda point: (point[1], recovered.legend.order(point[0]), list(COMPENSATIONS).index(point[2])))


def _cells(recovered, model, criterion, ratio, compensation, column) -> list[dict]:
    def given(tuned, which=criterion, at=ratio):
        return recovered.sample(tuned, compensation, column, model, which, at)

    found = []
    frames = {tuned: given(tuned) for tuned in STATES}
    for tuned, frame in frames.items():
        if len(frame):
            interval = within_limits(intervals.mean_interval(frame), column.measure)
            found.append({"state": STATES[tuned], **_numbers(interval)})
    if not all(map(len, frames.values())):
        return found
    gain = intervals.paired_difference(frames[True], frames[False])
    found.append({"state": GAIN, **_numbers(gain)})
    dense = {tuned: given(tuned, "dense", 0.0) for tuned in STATES}
    if criterion != "dense" and all(map(len, dense.values())):
        own, control = _changes(frames), _changes(dense)
        # The dense model has no calibration seed: its gain stands beside each of them.
        spread = pd.concat([control.assign(seed=value) for value in own["seed"].unique()], ignore_index=True)
        found.append({"state": BEYOND, **_numbers(intervals.paired_difference(own, spread))})
    return found


def _changes(frames: dict[bool, pd.DataFrame]) -> pd.DataFrame:
    keys = [name for name in ("seed", "group", "item") if name in frames[True]]
    pairs = frames[True].merge(frames[False][[*keys, "value"]], on=keys, suffixes=("", "_before"))
    return pairs.assign(value=pairs["value"] - pairs["value_before"]).drop(columns="value_before")


def _numbers(found) -> dict:
    numbers = {name: getattr(found, name) for name in ("mean", "low", "high", "n_seeds", "n_items", "note")}
    return numbers | {"p": getattr(found, "p", float("nan")), "source": "measured"}


def _keys(model: str, point: tuple[str, float, str]) -> dict:
    return {"model": model, "ratio": point[1], "criterion": point[0], "compensation": point[2]}


def _named(column: Column) -> dict:
    return {"column": column.name, "measure": column.measure, "label": column.label}


def _display(recovered: Recovered, long: pd.DataFrame) -> pd.DataFrame:
    rows, several = [], len(recovered.plain.model_names) > 1
    paper = read()
    shown = long[long["measure"].isin(SHOWN)]
    keys = ["model", "ratio", "criterion", "compensation", "state"]
    for (model, ratio, criterion, compensation, state), cells in shown.groupby(keys, sort=False):
        row = {"Model": model} if several else {}
        row |= {
            "Ratio": percent(ratio),
            "Criterion": recovered.legend.label(criterion),
            "Compensation": COMPENSATIONS[compensation] or ABSENT,
            "State": state,
        }
        row |= {cell["label"]: _text(cell) for cell in cells.to_dict("records")}
        spent = _spent(recovered, model, criterion, ratio, compensation) if state == STATES[True] else None
        row["tokens"] = f"{spent['tokens']:,.0f}" if spent else ABSENT
        row["operations"] = f"{spent['flops']:.2g}" if spent else ABSENT
        tuned = {text: flag for flag, text in STATES.items()}.get(state)
        in_paper = tuned is not None and compensation == "none"
        row["paper, %"] = _paper_value(paper, model, criterion, ratio, tuned) if in_paper else ABSENT
        rows.append(row)
    return pd.DataFrame(rows).fillna(ABSENT)


def _text(cell: dict) -> str:
    if cell["state"] in STATES.values():
        return format_cell(cell)
    digits = 1 if UNITS[cell["measure"]] == "%" else 3
    values = [f"{cell[name]:+.{digits}f}" for name in ("mean", "low", "high")]
    told = "one seed" if pd.isna(cell["p_holm"]) else f"p {format_p(cell['p_holm'])}"
    return f"{values[0]} [{values[1]}, {values[2]}], {told}"


def _in_points(cell) -> str:
    return f"{cell['mean']:+.1f} [{cell['low']:+.1f}, {cell['high']:+.1f}]"


def _point_label(criterion: str, ratio: float, compensation: str, legend: style.Legend) -> str:
    if criterion == "dense":
        return legend.label(criterion)
    return f"{legend.label(criterion)}, {percent(ratio)}" + (
        f"\n{COMPENSATIONS[compensation]}" if COMPENSATIONS[compensation] else ""
    )


def _spent(recovered: Recovered, model: str, criterion: str, ratio: float, compensation: str) -> dict | None:
    found = [
        entry
        for entry in recovered.spent
        if (entry["model"], entry["criterion"], round(float(entry["ratio"] or 0), 4)) == (model, criterion, ratio)
        and (criterion == "dense" or entry["compensation"] == compensation)
    ]
    return found[0] if found else None


def _spent_sentence(recovered: Recovered) -> str:
    told: dict = {}
    for entry in recovered.spent:
        recipe = entry["recipe"]
        words = f"{recipe['name']} (rank {recipe['rank']}, learning rate {recipe['learning_rate']:g}), {entry['steps']} steps of "
        words += f"{recipe['rows_per_step']} rows of {recipe['seq_len']} tokens of {entry['data']}, seed {entry['seed']}"
        if entry["distillation"]:
            words += f", distillation {entry['distillation']:g}"
        words += ", with BOS" if entry.get("bos") else ""
        told[words] = None
    return "Tuned by " + "; ".join(told) + "." if told else "Nothing was tuned."


def _paper_name(model: str) -> str:
    return PAPER_MODELS.get(model, DEFAULT_PAPER_MODEL)


def _paper_value(paper: pd.DataFrame, model: str, criterion: str, ratio: float, tuned: bool) -> str:
    methods = PAPER_METHODS.get((criterion, tuned), ())
    found = paper[
        paper["table"].isin(("T1", "T2", "T3", "T6"))
        & (paper["model"] == _paper_name(model))
        & paper["method"].isin(methods)
        & (paper["metric"] == "avg10")
        & (paper["ratio_pct"].astype(float) == round(100 * ratio, 4))
        & (paper["finetuned"] == ("yes" if tuned else "no"))
    ]
    return f"{float(found['value'].iloc[0]):.1f}" if len(found) else ABSENT


def _paper_remark(recovered: Recovered) -> str:
    return PAPER_REMARK.format(model=" and ".join(dict.fromkeys(map(_paper_name, recovered.plain.model_names))))
