"""Which measure tells models apart? Signal-to-noise of tasks, and tasks whose answers tip over together."""

import numpy as np
import pandas as pd
from scipy import stats

from hfprune_nb.report import choices
from hfprune_nb.report.protocol import protocol_note
from hfprune_nb.report.results import KEYS, MEASURES, NO_ACCURACY, Results, percent
from hfprune_nb.report.style import DENSE, Legend
from hfprune_nb.report.table import ABSENT, Table, bounded

COMPARED = {"task": MEASURES["task"], **choices.MEASURES}
AVERAGE = "average"
# A share of one answer from which on a task says little about a model: it gives that answer to whatever is asked.
TIPPED = 0.8
TIPS = "⚠"


def signal_table(results: Results) -> Table:
    """Return the signal-to-noise ratio of each task, and of the average of all, in accuracy and the measures of `choices`.

    As in Heineman et al., Signal and Noise (2025, arXiv 2508.13144): signal is the largest difference between two models, here
    the dense one and those of every criterion and ratio, each the mean of its seeds; noise the standard deviation between
    calibration seeds, here of one model, root mean square over models. Their division by the mean cancels in the ratio. `long`
    has the columns model, task, measure, models, signal, noise, ratio, low, high (95 %, from the degrees of freedom of the noise
    alone) and gain, the ratio over that of accuracy; NaN where no model has two seeds.
    """
    rows = []
    for model in results.model_names:
        items = results.items[(results.items["model"] == model) & (results.items["metric"] != NO_ACCURACY)]
        values = [items.assign(measure="task", value=100 * items["value"].astype(float))]
        told = choices.measures(items)
        values += [told.assign(measure=measure, value=told[measure].astype(float)) for measure in choices.MEASURES]
        means = pd.concat(values).groupby(["measure", "task", *KEYS[1:]])["value"].mean().unstack("task")
        # The average of other tasks would be another measure.
        means[AVERAGE] = means.dropna(axis="columns").mean(axis="columns")
        for measure, task in [(measure, task) for task in [AVERAGE, *means.columns[:-1]] for measure in COMPARED]:
            if measure in means.index and (found := _ratio(means.loc[measure, task].dropna())):
                rows.append({"model": model, "task": task, "measure": measure} | found)
    long = pd.DataFrame(rows, columns=["model", "task", "measure", "models", "signal", "noise", "ratio", "low", "high"])
    accuracy = long[long["measure"] == "task"].set_index(["model", "task"])["ratio"]
    long["gain"] = long["ratio"] / accuracy.reindex(pd.MultiIndex.from_frame(long[["model", "task"]])).to_numpy()
    notes = [
        "Largest difference between two models over the standard deviation between calibration seeds of one (Heineman et al., "
        "arXiv 2508.13144), with 95 % intervals from the degrees of freedom of the noise: the larger, the fewer seeds tell two "
        "models apart. Models are the dense one and those of every criterion and ratio, baselines included. The probability of "
        "the right choice is the softmax over log-likelihoods per character; bits per byte are those of the right answer. The "
        "average is over the tasks that all these measures have. They stand beside accuracy, never in its place.",
        protocol_note(results),
    ]
    if not (long["measure"] != "task").any():
        notes.insert(0, "These evaluations kept no log-likelihoods of choices: stage 05 of today does.")
    return Table("signal", "Signal-to-noise ratio of each task and measure (measured)", long, _display(long), tuple(notes))


def _ratio(means: pd.Series) -> dict:
    """Return signal, noise and their ratio of the means of one task by criterion, ratio and seed."""
    by_model = means.groupby(KEYS[1:3])
    sizes, of_models = by_model.size(), by_model.mean()
    if len(of_models) < 2:
        return {}
    df = int((sizes - 1).sum())
    variances = by_model.var()[sizes > 1]
    noise = float(np.sqrt(variances.mean())) if df else np.nan
    signal = float(of_models.max() - of_models.min())
    ratio = signal / noise if noise else np.nan
    low, high = (ratio * np.sqrt(stats.chi2.ppf(q, df) / df) if df else np.nan for q in (0.025, 0.975))
    return {"models": len(of_models), "signal": signal, "noise": noise, "ratio": ratio, "low": low, "high": high}


def _display(long: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (model, task), part in long.groupby(["model", "task"], sort=False):
        row = {"Model": model, "Task": task}
        told = part.set_index("measure").to_dict("index")
        row |= {text: _cell(told.get(measure)) for measure, text in COMPARED.items()}
        rows.append(row | {"Models": str(part["models"].max())})
    frame = pd.DataFrame(rows, columns=["Model", "Task", *COMPARED.values(), "Models"])
    return frame.drop(columns=[] if long["model"].nunique() > 1 else ["Model"])


def _cell(row: dict | None) -> str:
    return ABSENT if row is None or pd.isna(row["ratio"]) else bounded(row["ratio"], row["low"], row["high"], ".1f")


def answers_table(results: Results) -> Table:
    """Return accuracy, balanced accuracy and the share of the commonest answer of each model and task with one right choice.

    Answers are told apart by their place among the choices, which in tasks like BoolQ is the answer itself. `long` has the
    columns model, criterion, ratio, task, n_seeds, n_items, accuracy, balanced (`choices.balanced_accuracy`), share (of one
    answer, the mean over seeds), share_right (of the commonest place of right choices), all of 0 to 1, and tips: whether a
    model's share is above `TIPPED` and above that. The table for readers shows the dense model and the models that tip.
    """
    told = choices.measures(results.items[results.items["metric"] != NO_ACCURACY])
    rows = []
    for (model, task, ratio, criterion), part in told.groupby(["model", "task", "ratio", "criterion"]):
        seeds = [
            {
                "accuracy": seed["value"].astype(float).mean(),
                "balanced": choices.balanced_accuracy(seed["chosen"], seed["right"]),
                "share": _commonest(seed["chosen"]),
                "share_right": _commonest(seed["right"]),
            }
            for _, seed in part.groupby("seed")
        ]
        place = {"model": model, "criterion": criterion, "ratio": ratio, "task": task}
        rows.append(place | {"n_seeds": len(seeds), "n_items": part["doc_id"].nunique()} | pd.DataFrame(seeds).mean().to_dict())
    head = ["model", "criterion", "ratio", "task", "n_seeds", "n_items", "accuracy", "balanced", "share", "share_right"]
    long = pd.DataFrame(rows, columns=head)
    long["tips"] = (long["share"] > TIPPED) & (long["share"] > long["share_right"])
    long = long.sort_values(["model", "task", "ratio"], kind="stable", ignore_index=True)
    notes = (
        f"{TIPS}: a model gives one answer to more than {TIPPED:.0%} of a task's items, more than it is right for: its accuracy "
        "is then that answer's share of the right ones, and a small change of the model can tip all answers over together. "
        "Balanced accuracy is the mean, over the places of right choices, of the share that was chosen; a model that always "
        "answers the same has one over the number of choices. Means over calibration seeds; all models: answers.csv.",
        protocol_note(results),
    )
    title = "Tasks whose answers tip over together, and balanced accuracy (measured)"
    return Table("answers", title, long, _answers_display(long, results.legend), notes, results.legend)


def _commonest(values: pd.Series) -> float:
    return float(values.value_counts(normalize=True).max())


def _answers_display(long: pd.DataFrame, legend: Legend) -> pd.DataFrame:
    rows = [
        {
            "Model": row["model"],
            "Task": row["task"],
            "Criterion": legend.label(row["criterion"]) + f" {TIPS}" * row["tips"],
            "Ratio": percent(row["ratio"]),
            "Accuracy, %": f"{100 * row['accuracy']:.1f}",
            "Balanced accuracy, %": f"{100 * row['balanced']:.1f}",
            "Share of one answer, %": f"{100 * row['share']:.0f}",
            "of the right ones, %": f"{100 * row['share_right']:.0f}",
            "Items": str(row["n_items"]),
            "Seeds": ABSENT if row["criterion"] == DENSE else str(row["n_seeds"]),
        }
        for row in long[long["tips"] | (long["criterion"] == DENSE)].to_dict("records")
    ]
    names = ["Model", "Task", "Criterion", "Ratio", "Accuracy, %", "Balanced accuracy, %", "Share of one answer, %"]
    frame = pd.DataFrame(rows, columns=[*names, "of the right ones, %", "Items", "Seeds"])
    return frame.drop(columns=[] if long["model"].nunique() > 1 else ["Model"])


def sentences(signal: Table, answers: Table) -> list[str]:
    """Return for each model what tells its variants apart best, and the tasks whose answers tip; from the two tables."""
    told = []
    for model, part in signal.long[signal.long["task"] == AVERAGE].groupby("model", sort=False):
        parts = [f"{COMPARED[row['measure']]} {_cell(row)}" for row in part.dropna(subset="ratio").to_dict("records")]
        if parts:
            told.append(f"{model}: signal-to-noise of the average of tasks: {'; '.join(parts)}.")
    tipping = answers.long[answers.long["tips"] & (answers.long["criterion"] != DENSE)]
    for (model, task), part in tipping.groupby(["model", "task"], sort=False):
        pruned = answers.long[(answers.long["model"] == model) & (answers.long["task"] == task) & (answers.long["ratio"] > 0)]
        told.append(
            f"{model}, {task}: {len(part)} of {len(pruned)} pruned models give one answer to more than {TIPPED:.0%} of "
            f"the items; their accuracy is {100 * part['accuracy'].mean():.1f} %, balanced {100 * part['balanced'].mean():.1f} %."
        )
    return told
