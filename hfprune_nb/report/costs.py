"""Tables, figures and sentences about cost: the paper's Tables 4 and 5 beside what was measured; no model runs here."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb.report.paper import PAPER_MODEL, read
from hfprune_nb.report.protocol import commits_sentence
from hfprune_nb.report.results import percent
from hfprune_nb.report.style import GREYS, REFERENCE, STYLE, WIDTH, Legend, closed, neutral
from hfprune_nb.report.table import ABSENT, Table

PAPER_LOOPS = {"entropy: HFPrune loop": "HFPrune", "self_distillation: SDMPrune loop": "SDMPrune"}
LEGEND = Legend()  # cost is measured with the criteria's own settings
IMPLEMENTATION_COLOURS = {"engine": GREYS[0], "published loop": GREYS[2]}
PUBLISHED = f"Columns marked paper are published values of {PAPER_MODEL} on one A6000; columns marked measured are this run's."


def protocol(facts: dict) -> str:
    """Return the paragraph under each table: model, machine, sizes, what the intervals and the memory are."""
    machine, windows = facts["machine"], f"{facts['n_windows']} windows of {facts['seq_len']} tokens"
    weights = "random weights" if facts["shape"] else "its own weights"
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in facts["matmul_peak"].items())
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return (
        f"Protocol. {facts['model']} with {weights}, {size}, {facts['dtype']}; {windows} of {facts['corpus']}; "
        f"{machine['processor']}, {machine['threads']} threads, {versions}. Contestants alternate in one process, "
        f"{facts['repetitions']} repetitions after a warm-up; cells are medians with {_interval_words(facts['repetitions'])}. "
        f"Memory is the {machine['memory']}, beyond the weights. Measured peak of matrix products: {peaks}. "
        f"{commits_sentence([facts.get('commits', {})])}".strip()
    )


def scoring_table(summary: pd.DataFrame, facts: dict, paper: pd.DataFrame | None = None) -> Table:
    """Return the paper's Table 5: seconds, tokens/s, peak memory and fraction of the matmul peak, engine and published loops.

    summary : rows of `speed.summarise`; paper : `published.read()`.
    """
    paper = read() if paper is None else paper
    theirs = paper[(paper["table"] == "T5") & (paper["model"] == PAPER_MODEL)]
    rows = []
    for row in summary[summary["implementation"] != "ablation"].to_dict("records"):
        values = theirs[theirs["method"] == PAPER_LOOPS.get(row["contestant"])].set_index("metric")["value"]
        rows.append(
            {
                "Criterion": " + ".join(LEGEND.label(name) for name in row["criterion"].split(" + ")),
                "Scored by": row["contestant"].partition(": ")[2],
                "Seconds, measured": _spread(row, "seconds", 1, 2),
                "Tokens/s, measured": f"{row['tokens_per_second']:,.0f}",
                "Peak memory, MB, measured": f"{row['peak_bytes'] / 1e6:,.0f}",
                "Of the matmul peak, measured": percent(round(row["peak_fraction"], 4)),
                f"Seconds, paper: {PAPER_MODEL}": _published(values, "scoring time", "{:,.1f}"),
                f"Peak memory, GB, paper: {PAPER_MODEL}": _published(values, "peak GPU memory", "{:,.1f}"),
            }
        )
    notes = (
        "The fraction of the matmul peak counts the FLOPs that the criterion needs (forward, and backward for activations only), "
        "whatever a loop does beyond them. The paper's memory includes the weights and its loops read 1000 sequences of 1024 "
        "tokens; the measured loops are written anew from their description. One-hot CE in the manner of LLM-Pruner and SDMPrune "
        "score weights; the engine scores activations unless the row says by weight.",
        PUBLISHED,
        protocol(facts),
    )
    title = "Cost of scoring (paper's Table 5): engine and published loops"
    return Table("cost_scoring", title, summary[summary["implementation"] != "ablation"], pd.DataFrame(rows), notes)


def ablation_table(summary: pd.DataFrame, facts: dict) -> Table:
    """Return what each habit of HFPrune's loop costs: they are given up one after the other, each row keeping the rows above."""
    start = "entropy: HFPrune loop"
    steps = summary[(summary["contestant"] == start) | (summary["implementation"] == "ablation")].reset_index(drop=True)
    engine = summary[summary["contestant"] == "entropy: engine"]
    long = pd.concat([steps, engine], ignore_index=True)
    first = long.iloc[0] if len(long) else None
    rows = [
        {
            "HFPrune loop": row["contestant"].removeprefix(start).removeprefix(", ") or "as published",
            "Seconds, measured": _spread(row, "seconds", 1, 2),
            "Speed against the loop": f"{first['seconds'] / row['seconds']:.2f}x",
            "Peak memory, MB, measured": f"{row['peak_bytes'] / 1e6:,.0f}",
            "Memory against the loop": percent(round(row["peak_bytes"] / first["peak_bytes"], 3)),
        }
        for row in long.to_dict("records")
    ]
    if rows and len(engine):
        rows[-1]["HFPrune loop"] = "(the engine)"
    notes = ("Each row also gives up what the rows above it gave up.", protocol(facts))
    return Table("cost_ablation", "What each habit of the published loop costs", long, pd.DataFrame(rows), notes)


def targets_table(targets: pd.DataFrame, facts: dict) -> Table:
    """Return the project's own targets beside the measured ratios: met, missed, or only reported."""
    rows = [
        {
            "Target": row["target"],
            "Wanted": ABSENT if pd.isna(row["limit"]) else f"{row['bound']} {row['limit']:g}",
            "Measured": f"{row['median']:.4f}" if "correlation" in row["target"] else _spread(row, "median", 1, 2, "low", "high"),
            "Verdict": "reported" if pd.isna(row["limit"]) else "met" if row["met"] else "missed",
        }
        for row in targets.to_dict("records")
    ]
    notes = ("Ratios are medians over the repetitions, in each of which both sides ran.", protocol(facts))
    return Table("cost_targets", "Targets of the scoring engine", targets, pd.DataFrame(rows), notes)


def breakdown_table(breakdown: pd.DataFrame, facts: dict) -> Table:
    """Return where the engine's entropy scoring spends its time, as torch's profiler saw one window."""
    display = pd.DataFrame(
        {
            "Part": breakdown["part"],
            "Seconds, measured": breakdown["seconds"].map("{:.3f}".format),
            "Share": breakdown["share"].map(lambda share: percent(round(share, 3))),
        }
    )
    note = "Time inside operators only, one window; the profiler itself slows small operators down."
    return Table("cost_breakdown", "Where entropy scoring spends its time", breakdown, display, (note, protocol(facts)))


def inference_table(summary: pd.DataFrame, facts: dict, paper: pd.DataFrame | None = None) -> Table:
    """Return the paper's Table 4: latency of the first token, time per further token and throughput, by model and batch size.

    summary : rows of `inference.summarise` with the columns ratio and multiple_of.
    """
    paper = read() if paper is None else paper
    theirs = paper[(paper["table"] == "T4") & (paper["model"] == PAPER_MODEL)]
    dense = summary[summary["model"] == "dense"].set_index("batch_size")
    rows = []
    for row in summary.sort_values(["batch_size", "ratio", "multiple_of"]).to_dict("records"):
        same = theirs[(theirs["ratio_pct"].astype(float) == round(100 * row["ratio"], 1)) & (row["multiple_of"] == 1)]
        values = same.drop_duplicates("metric").set_index("metric")["value"]
        at_once = dense.loc[row["batch_size"]]
        rows.append(
            {
                "Batch": row["batch_size"],
                "Model": row["model"],
                "Width": f"{row['width']} ({_alignment(row['width'])})",
                "Parameters, M": f"{row['parameters'] / 1e6:,.1f}",
                "Prefill GFLOP per sequence": f"{row['prefill_flops'] / 1e9:,.1f}",
                "First token, ms, measured": _spread(row, "first_token", 1000, 1),
                "First token, speed-up": f"{at_once['first_token'] / row['first_token']:.2f}x",
                "Further token, ms, measured": _spread(row, "per_token", 1000, 1),
                "Decoding, tokens/s, measured": f"{row['tokens_per_second']:,.1f}",
                "Decoding, gain": f"{100 * (row['tokens_per_second'] / at_once['tokens_per_second'] - 1):+.1f} %",
                f"First token, ms, paper: {PAPER_MODEL}": _published(values, "prefill latency", "{:.1f}", row["batch_size"] == 1),
                f"Decoding, tokens/s, paper: {PAPER_MODEL}": _published(
                    values, "decode throughput", "{:.1f}", row["batch_size"] == 8
                ),
            }
        )
    doubtful = theirs[theirs["note"].str.contains("contradicts|not|need|latencies|DERIVED", na=False)]
    remarks = [f"{row['metric']} at {row['ratio_pct']:g} %: {row['note']}" for row in doubtful.to_dict("records")]
    notes = (
        f"Greedy generation of {facts['new_tokens']} tokens after {facts['prompt_tokens']} random ones, {facts['cache']} cache. "
        "The first token is prefill (all prompts of the batch), decoding all that follows. The paper has 256 tokens in and 1 "
        "out for prefill, and batches of 8 with 256 out for decoding.",
        "Remarks on the paper's values: " + "; ".join(remarks) + ".",
        PUBLISHED,
        protocol(facts),
    )
    return Table("cost_inference", "Speed of generation (paper's Table 4)", summary, pd.DataFrame(rows), notes)


def correlation_table(correlations: pd.DataFrame, facts: dict) -> Table:
    """Return by criterion the rank correlation of its scores with float64 ones, of the lowest and of the median layer, and how
    many of the neurons that pruning keeps are others.
    """
    grouped = correlations.groupby("criterion", sort=False)["spearman"]
    counts = correlations.groupby("criterion", sort=False)[["others", "kept"]].sum()
    display = pd.DataFrame(
        {
            "Criterion": [LEGEND.label(name) for name, _ in grouped],
            "Lowest layer": grouped.min().map("{:.5f}".format).to_numpy(),
            "Median layer": grouped.median().map("{:.5f}".format).to_numpy(),
            "Kept neurons that are others": [f"{row.others:,} of {row.kept:,}" for row in counts.itertuples()],
        }
    )
    text = f"{facts['float64_windows']} x {facts['seq_len']} tokens"
    note = (
        f"Spearman's correlation within each layer, the engine in {facts['dtype']} and in float64 on the same {text}. Neurons "
        f"kept at {percent(facts['accumulation_ratio'])} of all parameters, uniformly: precision alone decides the others."
    )
    title = f"The engine's ranking in {facts['dtype']} against float64"
    return Table("cost_precision", title, correlations, display, (note, protocol(facts)))


def cost_bars(summary: pd.DataFrame, facts: dict) -> Figure:
    """Draw seconds and peak memory of every contestant as bars, engine and published loops in two greys."""
    rows = summary[summary["implementation"] != "ablation"].iloc[::-1]
    height = np.arange(len(rows))
    colours = rows["implementation"].map(IMPLEMENTATION_COLOURS)
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.9 + 0.3 * len(rows)), sharey=True)
        spread = [rows["seconds"] - rows["seconds_low"], rows["seconds_high"] - rows["seconds"]]
        axes[0].barh(height, rows["seconds"], xerr=spread, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
        axes[1].barh(height, rows["peak_bytes"] / 1e6, color=colours)
        axes[0].set_yticks(height, rows["contestant"].str.replace("_", " "))
        axes[0].set_xlabel(f"seconds for {facts['n_windows']} x {facts['seq_len']} tokens (lower is better)")
        axes[1].set_xlabel("peak memory beyond the weights, MB (lower is better)")
        for ax in axes:
            ax.grid(axis="y", visible=False)
        handles = [mpl.patches.Patch(color=shade, label=name) for name, shade in IMPLEMENTATION_COLOURS.items()]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        fig.suptitle(f"{facts['model']}: cost of scoring", fontsize=10)
    told = [
        f"{', '.join(part['contestant'].str.replace('_', ' '))} in {part['seconds'].iloc[0]:.1f} s"
        for _, part in rows.sort_values("seconds").iloc[[0, -1]].groupby("contestant", sort=False)
    ]
    return closed(fig, f"The fastest and the slowest: {' and '.join(told)}.")


def speed_against_ratio(summary: pd.DataFrame, facts: dict) -> Figure:
    """Draw the speed-up over the dense model against the ratio: first token and decoding, a line per batch and alignment.

    The dotted line is what the removed share of prefill FLOPs would give.
    """
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True)
        lines = [
            (batch, multiple)
            for batch in sorted(summary["batch_size"].unique())
            for multiple in sorted(summary.loc[summary["ratio"] > 0, "multiple_of"].unique())
        ]
        for index, (batch, multiple) in enumerate(lines):
            rows = summary[(summary["batch_size"] == batch) & ((summary["multiple_of"] == multiple) | (summary["ratio"] == 0))]
            rows = rows.sort_values("ratio")
            dense = rows.iloc[0]
            text = f"batch {batch}, " + ("width as it comes" if multiple == 1 else f"multiple of {multiple}")
            style = neutral(index) | {"label": text}
            axes[0].plot(100 * rows["ratio"], dense["first_token"] / rows["first_token"], **style)
            axes[1].plot(100 * rows["ratio"], rows["tokens_per_second"] / dense["tokens_per_second"], **style)
        flops = summary[summary["multiple_of"] == 1].drop_duplicates("ratio").sort_values("ratio")
        ideal = flops["prefill_flops"].iloc[0] / flops["prefill_flops"]
        axes[0].plot(100 * flops["ratio"], ideal, color="black", linestyle=(0, (1, 2)), linewidth=1.2, label="by FLOPs")
        axes[0].set(title="first token", ylabel="speed-up over dense\n(higher is better)")
        axes[1].set(title="decoding")
        for ax in axes:
            ax.set_xlabel("parameters removed, %")
        handles, texts = axes[0].get_legend_handles_labels()
        fig.legend(handles, texts, loc="outside lower center", ncols=3)
        fig.suptitle(f"{facts['model']}: speed of generation after pruning", fontsize=10)
    dense = summary[summary["ratio"] == 0].set_index("batch_size")
    gains = (dense.loc[summary["batch_size"], "first_token"].to_numpy() / summary["first_token"]).groupby(summary["ratio"])
    told = [f"{percent(ratio)} {part.min():.2f} to {part.max():.2f} times" for ratio, part in gains if ratio]
    return closed(fig, f"Speed-up of the first token over batches and alignments: {', '.join(told)}.")


def correlation_figure(correlations: pd.DataFrame, facts: dict) -> Figure:
    """Draw 1 - the rank correlation with float64 by layer on a log axis, a line per criterion; the target is dashed."""
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
        for criterion, rows in correlations.groupby("criterion", sort=False):
            distance = np.maximum(1 - rows["spearman"], 1e-7)
            style = {"label": LEGEND.label(criterion), "color": LEGEND.colour(criterion)}
            ax.plot(rows["layer"], distance, marker="o", markersize=3, **style)
        ax.axhline(1e-3, color="black", linestyle=(0, (5, 2)), linewidth=1, label="target (0.999)")
        ax.set_yscale("log")
        ax.set(xlabel="layer", ylabel="1 - rank correlation with float64\n(lower is better)")
        ax.set_title(f"{facts['model']}: scores in {facts['dtype']} against float64")
        ax.legend(ncols=2)
    worst = correlations.loc[correlations["spearman"].idxmin()]
    return closed(
        fig,
        f"The lowest rank correlation with float64 is {worst['spearman']:.5f}, {LEGEND.label(worst['criterion'])} in layer "
        f"{worst['layer']}.",
    )


def accumulation_figure(rows: pd.DataFrame, facts: dict) -> Figure:
    """Draw what sums in bfloat16 do to the kept set and to the ranking, against the number of windows.

    rows : `accumulation.study`; lines are means over layers and streams, bands the range of the streams.
    """
    panels = {
        "changed": ("kept neurons that are others, %", 100),
        "spearman": ("rank correlation with float64 sums", 1),
        "sum_fraction": ("bfloat16 sum / float64 sum", 1),
    }
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.7))
        for ax, (column, (text, scale)) in zip(axes, panels.items(), strict=True):
            streams = scale * rows.groupby(["windows", "stream"])[column].mean().unstack()
            ax.plot(streams.index, streams.mean(axis=1), color=LEGEND.colour(REFERENCE), marker="o", markersize=4)
            ax.fill_between(streams.index, streams.min(axis=1), streams.max(axis=1), color=LEGEND.colour(REFERENCE), alpha=0.2)
            ax.set_xscale("log")
            ax.set(xlabel="windows (log scale)", ylabel=text)
        source = f"streams resampled from {facts['accumulation_windows']} windows"
        fig.suptitle(f"{facts['model']}: entropy importance summed in bfloat16 ({source})", fontsize=10)
    means = rows.groupby("windows")[["changed", "sum_fraction"]].mean().iloc[-1]
    return closed(
        fig,
        f"After {means.name:,} windows a bfloat16 sum has {percent(round(means['sum_fraction'], 3))} of the true one, and "
        f"{percent(round(means['changed'], 3))} of the kept neurons are others.",
    )


def accumulation_sentence(rows: pd.DataFrame, facts: dict) -> str:
    """Return the accumulator study in words: fewest and most windows, and that long streams are resampled."""
    means = rows.groupby("windows")[["changed", "spearman", "sum_fraction"]].mean()
    first, last = means.iloc[0], means.iloc[-1]
    return (
        f"Summed in bfloat16 over {last.name:,} windows, {100 * last['changed']:.1f} % of the neurons kept at a ratio of "
        f"{percent(facts['accumulation_ratio'])} are others than with float64 sums ({100 * first['changed']:.2f} % over "
        f"{first.name:,} windows); the rank correlation within a layer is {last['spearman']:.4f}, and the sums reach "
        f"{100 * last['sum_fraction']:.1f} % of their true value. Streams are resampled with replacement from "
        f"{facts['accumulation_windows']} windows of {facts['accumulation_tokens']} tokens: they say what rounding does, and "
        "nothing about more text."
    )


def findings(targets: pd.DataFrame, ablation: Table) -> list[str]:
    """Return one sentence per target, and one on the habit of the published loop that costs most time and most memory."""
    sentences = []
    for row in targets.to_dict("records"):
        figure = f"{row['median']:.4f}" if "correlation" in row["target"] else f"{row['median']:.2f}"
        if pd.isna(row["limit"]):
            sentences.append(f"{row['target']}: {figure} (no target here).")
        else:
            verdict = "met" if row["met"] else f"missed by {abs(row['median'] - row['limit']):.2g}"
            sentences.append(f"{row['target']}: {figure}, wanted {row['bound']} {row['limit']:g}: {verdict}.")
    steps = ablation.long[ablation.long["contestant"] != "entropy: engine"]
    for column, words, unit in (("seconds", "time", 1), ("peak_bytes", "memory", 1e6)):
        saved = -steps[column].diff()
        if saved.max() > 0:
            name = steps.loc[saved.idxmax(), "contestant"].partition(", ")[2]
            share = saved.max() / steps[column].iloc[0]
            text = f"{saved.max() / unit:,.2f} s" if unit == 1 else f"{saved.max() / unit:,.0f} MB"
            saving = f"{text}, {percent(round(share, 3))}"
            sentences.append(f"Of the habits of HFPrune's loop, the step to '{name}' saves most {words}: {saving}.")
    return sentences


def _interval_words(repetitions):
    if repetitions < 2:
        return "no interval"
    if repetitions < 6:
        return f"their range in brackets, which covers the median in {100 * (1 - 2 / 2**repetitions):.0f} of 100 cases"
    return "order-statistic 95 % intervals in brackets"


def _alignment(width):
    largest = next((multiple for multiple in (128, 64, 32, 16, 8) if width % multiple == 0), 1)
    return f"multiple of {largest}" if largest > 1 else "unaligned"


def _spread(row, column, scale, decimals, low=None, high=None):
    low, high = low or f"{column}_low", high or f"{column}_high"
    text = f"{scale * row[column]:,.{decimals}f}"
    if pd.isna(row.get(low)) or row[low] == row[high]:
        return text
    return f"{text} [{scale * row[low]:,.{decimals}f}, {scale * row[high]:,.{decimals}f}]"


def _published(values, metric, form, applies=True):
    return form.format(values[metric]) if applies and metric in values else ABSENT
