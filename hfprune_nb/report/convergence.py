"""How much calibration is enough, and which text?"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.neurons import overlap, rank_correlation
from hfprune_nb.report.results import experiment, importance_by_corpus, scores, snapshots, specs
from hfprune_nb.report.style import STYLE, WIDTH, Legend, closed, message
from hfprune_nb.report.table import Table

NEXT_SEED = ", next seed"


def convergence(scoring_folders: Iterable[Path], ratios: dict[str, float]) -> pd.DataFrame:
    """Return how the first n windows compare with all windows: model, criterion, seed, n, against, jaccard, spearman.

    against : `own total` (the same seed's, of which the n windows are a part) or `other seed` (the mean over the others'
    totals, independent text). `ratios` gives the neuron ratio of each model's kept sets. Means over layers.
    """
    read = [(scores(folder)[0], snapshots(folder)) for folder in scoring_folders]
    rows = []
    for facts, found in sorted(read, key=lambda pair: (pair[0]["model"], pair[0]["seed"] or 0)):
        model = facts["model"]
        for criterion, by_count in found.items():
            others = [theirs[criterion] for other, theirs in read if other["model"] == model and other["seed"] != facts["seed"]]
            totals = {"own total": [by_count]} | ({"other seed": others} if others else {})
            for n, (against, references) in itertools.product(sorted(by_count), totals.items()):
                finals = [reference[max(reference)] for reference in references]
                row = {"model": model, "criterion": criterion, "seed": facts["seed"], "n": n, "against": against}
                jaccard = np.mean([overlap(by_count[n], final, ratios[model]) for final in finals])
                spearman = np.mean([rank_correlation(by_count[n], final) for final in finals])
                rows.append(row | {"jaccard": jaccard, "spearman": spearman})
    return pd.DataFrame(rows, columns=["model", "criterion", "seed", "n", "against", "jaccard", "spearman"])


def corpora(experiment_folders: Iterable[Path], ratios: dict[str, float]) -> pd.DataFrame:
    """Return how each calibration text compares with the first corpus: model, criterion, corpus, jaccard, spearman, seeds.

    `seeds` marks the row that compares the first corpus with itself under the next seed: the noise of calibration.
    """
    rows = []
    for folder in experiment_folders:
        facts, importance = experiment(folder), importance_by_corpus(folder)
        first, *others = facts["corpora"]
        for criterion, corpus in itertools.product(Legend(specs(facts)).in_order(importance[first]), others):
            pair = importance[first][criterion], importance[corpus][criterion]
            row = {"model": facts["model"], "criterion": criterion, "first": first, "corpus": corpus}
            compared = {"jaccard": overlap(*pair, ratios[facts["model"]]), "spearman": rank_correlation(*pair)}
            rows.append(row | compared | {"seeds": corpus.endswith(NEXT_SEED), "n_windows": facts["calibration"]["n_windows"]})
    columns = ["model", "criterion", "first", "corpus", "jaccard", "spearman", "seeds", "n_windows"]
    return pd.DataFrame(rows, columns=columns).sort_values("seeds", ascending=False, kind="stable", ignore_index=True)


def corpora_table(frame: pd.DataFrame, notes: Iterable[str], legend: Legend) -> Table:
    """Return `corpora` as a table, with `notes` below."""
    display = pd.DataFrame(
        {
            "Model": frame["model"],
            "Criterion": frame["criterion"].map(legend.label),
            "Text": frame["corpus"],
            "Compared with": frame["first"],
            "Windows": frame["n_windows"].astype(str),
            "Jaccard of kept neurons": frame["jaccard"].map("{:.3f}".format),
            "Rank correlation": frame["spearman"].map("{:.3f}".format),
        }
    )
    note = (
        "Means over layers. The row of the next seed is one draw of the noise of calibration: one pair of seeds tests nothing, "
        "and a value close to it says nothing about the text."
    )
    return Table("calibration_text", "Kept neurons by calibration text (measured)", frame, display, (note, *notes))


def calibration_figure(converging: pd.DataFrame, texts: pd.DataFrame, model: str, legend: Legend) -> Figure:
    """Draw how kept neurons settle with the number of windows (left) and differ between calibration texts (right)."""
    left, right = converging[converging["model"] == model], texts[texts["model"] == model]
    if left.empty and right.empty:
        return message("Neither snapshots of scoring nor several calibration texts: nothing to draw.")
    with mpl.rc_context(STYLE):
        fig, (ax, dots) = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True)
        for (criterion, against), part in left.groupby(["criterion", "against"], sort=False):
            own = against == "own total"
            faint = {"alpha": 0.4, "linewidth": 1, "marker": "none"} if own else {"label": legend.label(criterion)}
            look = legend.look(criterion) | faint
            seaborn.lineplot(part, x="n", y="jaccard", errorbar=None, ax=ax, legend=False, mec="none", **look)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set(xlabel="calibration windows (first n of a seed)", ylabel="Jaccard overlap of kept neurons\n(1: same neurons)")
        ax.set_title("against all windows of another seed\n(faint: of the same seed)", fontsize=9)
        _text_dots(dots, right, legend)
        dots.set_ylim(top=1.01)
        handles = {text: line for axis in (dots, ax) for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        fig.suptitle(f"{model}: how much calibration is enough, and which text", fontsize=10)
    return closed(fig, _caption(left[left["against"] == "other seed"], right, legend))


def _caption(converging: pd.DataFrame, texts: pd.DataFrame, legend: Legend) -> str:
    told, ends = [], converging.groupby(["criterion", "n"], sort=False)["jaccard"].mean()
    if len(ends):
        name = legend.reference(converging["criterion"])
        few, many = ends[name].index.min(), ends[name].index.max()
        told = [f"{legend.label(name)} keeps {ends[name][few]:.2f} in common with another seed from {few} windows, "
                f"{ends[name][many]:.2f} from {many}"]  # fmt: skip
    if len(texts):
        means = texts.groupby("corpus", sort=False)["jaccard"].mean()
        told += [f"the text that changes most is {means.idxmin()} ({means.min():.2f})"]
    return "; ".join(told) + "."


def _text_dots(ax, rows: pd.DataFrame, legend: Legend) -> None:
    names, corpora = legend.in_order(rows["criterion"]), list(dict.fromkeys(rows["corpus"]))
    for index, criterion in enumerate(names):
        part = rows[rows["criterion"] == criterion].set_index("corpus").reindex(corpora)
        step = min(0.2, 0.7 / len(names))
        places = np.arange(len(corpora)) + step * (index - (len(names) - 1) / 2)
        ax.plot(places, part["jaccard"], **legend.look(criterion) | {"linestyle": "none", "markersize": 8})
    ax.set_xticks(range(len(corpora)), [name.replace(", ", ",\n") for name in corpora])
    ax.set_xlim(-0.5, max(len(corpora), 1) - 0.5)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("calibration text")
    if len(rows):
        ax.set_title(f"against {rows['first'].iloc[0]}, {rows['n_windows'].iloc[0]} windows each", fontsize=9)


def calibration_sentence(converging: pd.DataFrame, texts: pd.DataFrame, model: str, legend: Legend) -> str:
    """Return one sentence: what the last doubling of the windows still changes, and whether another text changes more."""
    told = []
    rows = converging[(converging["model"] == model) & (converging["against"] == "other seed")]
    for criterion, part in rows.groupby("criterion", sort=False):
        means = part.groupby("n")["jaccard"].mean()
        if len(means) > 1:
            before, after = means.index[-2:]
            gained = means[after] - means[before]
            state = "still grows" if gained > 0.01 else "no longer grows by more than 0.01"
            told.append(
                f"{legend.label(criterion)}: the overlap of kept neurons with another seed's goes from {means[before]:.3f} with "
                f"{before} to {means[after]:.3f} with {after} windows and {state}"
            )
    for criterion, part in texts[texts["model"] == model].groupby("criterion", sort=False):
        noise = part.loc[part["seeds"], "jaccard"].mean()
        foreign = part[~part["seeds"] & (part["jaccard"] < noise)]
        names = ", ".join(f"{row.corpus} {row.jaccard:.2f}" for row in foreign.itertuples())
        end = f"less overlap {names}" if names else "no other text overlaps less"
        first, count = part[["first", "n_windows"]].iloc[0]
        told.append(f"{legend.label(criterion)}, {count} windows: two seeds of {first} overlap {noise:.2f}; {end}")
    return f"{model}. " + ". ".join(told) + "." if told else f"{model}: one seed and one text say nothing about calibration."
