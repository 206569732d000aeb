"""`hfprune cost`: what scoring and generation cost, with torch and transformers alone."""

import argparse
import json
from pathlib import Path

from hfprune_nb.cli.parsing import command, positive, say
from hfprune_nb.errors import UserError

_COST_EXAMPLES = """Needs torch and transformers only. Text is random tokens: cost does not depend on them. What is compared
alternates in one process; figures are medians. Memory is the peak beyond the weights.

examples:
  hfprune cost --model smollm2-135m --device cpu
  hfprune cost --shape llama-3.2-1b --device cuda --windows 16 --seq-len 1024 --new-tokens 256
  hfprune cost --shape llama-2-7b --device cuda --windows 16 --seq-len 1024 --batch-sizes 1 8 64 --out cost.json
  hfprune cost --model my_checkpoint --no-ablation --no-generation
  PYTHONPATH=. python -m hfprune_nb cost --shape tiny      from a checkout, nothing installed
"""


def add_cost(groups) -> None:
    """Add the command `cost` to the parser's commands."""
    cost = command(groups, "cost", "time and memory of scoring, speed of generation", _COST_EXAMPLES, _cost)
    subject = cost.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="NAME", help="alias, hub id or local folder")
    subject.add_argument("--shape", metavar="NAME", help="random weights of this architecture, such as llama-2-7b")
    cost.add_argument("--revision", default="main", metavar="COMMIT", help="branch, tag or commit of a hub model (default: main)")
    cost.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    cost.add_argument("--dtype", default="bfloat16", help="of weights and activations (default: bfloat16)")
    sizes = {
        "windows": (4, "calibration windows"),
        "seq-len": (512, "tokens in a window"),
        "repetitions": (3, "timed runs of each contestant"),
        "prompt-tokens": (256, "tokens of each prompt"),
        "new-tokens": (32, "tokens generated after each prompt"),
    }
    for name, (default, text) in sizes.items():
        cost.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: {default})")
    cost.add_argument(
        "--batch-size", type=int, default=0, metavar="N", help="the engine's windows at a time (default: 0, automatic)"
    )
    cost.add_argument(
        "--float64-windows", type=int, default=1, metavar="N", help="for the rank correlation; 0: none (default: 1)"
    )
    cost.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8], metavar="N", help="of generation (default: 1 8)")
    cost.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3], metavar="R", help="pruned models (default: 0.2 0.3)")
    cost.add_argument(
        "--multiples",
        type=positive,
        nargs="+",
        default=[1, 64],
        metavar="N",
        help="their widths are multiples of (default: 1 64)",
    )
    cost.add_argument("--cache", default="dynamic", help="key-value cache of generation: dynamic or static (default: dynamic)")
    cost.add_argument(
        "--ablation", action=argparse.BooleanOptionalAction, default=True, help="what each habit costs (default: yes)"
    )
    cost.add_argument("--generation", action=argparse.BooleanOptionalAction, default=True, help="time generation (default: yes)")
    cost.add_argument("--out", metavar="FILE", help="write every measurement as JSON")


def _cost(options) -> int:
    import torch

    try:
        found = _measured(options)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device: {options.shape or options.model} does not fit in the GPU's memory: use a larger GPU, a smaller model, or "
            "fewer --ratios and --multiples."
        ) from error
    _show_cost(found)
    return 0


def _measured(options) -> dict:
    from hfprune_nb import models
    from hfprune_nb.cost import shapes, timing
    from hfprune_nb.inputs import hub

    device, dtype = models.resolve_device(options.device), models.resolve_dtype(options.dtype)
    if options.shape:
        model = shapes.random_model(options.shape, dtype, device)
    else:
        hub.pin({hub.repository(options.model): options.revision})
        model, _ = models.load(options.model, options.dtype, device)
    found = {"model": options.shape or options.model, "machine": timing.machine(device)}
    found["settings"] = {name: value for name, value in vars(options).items() if name != "command"}
    found |= _scoring_cost(options, model, device, dtype)
    _write(found, options.out)  # should generation fail, this is kept
    if options.generation:
        found |= _generation_cost(options, model)
        _write(found, options.out)
    return found


def _write(found: dict, out: str | None) -> None:
    if out:
        Path(out).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _scoring_cost(options, model, device: str, dtype) -> dict:
    from hfprune_nb.cost import precision, published_loops, shapes, timing

    windows = shapes.random_windows(model, options.windows, options.seq_len)
    peaks = timing.matmul_peak(device, dtype)
    contestants = published_loops.contestants(model, windows, options.batch_size)
    contestants += published_loops.ablation(model, windows) if options.ablation else []
    runs = timing.alternate({contestant.name: contestant.run for contestant in contestants}, options.repetitions, device)
    summary = timing.summarise(runs, contestants, model, windows, peaks[options.dtype])
    lowest = {}
    if options.float64_windows:
        half, wide = published_loops.in_half_and_in_float64(model, windows[: options.float64_windows], options.batch_size)
        lowest = {name: min(precision.rank_correlation(half[name], wide[name])) for name in half}
    targets = timing.targets(runs, summary, device, lowest)
    return {"matmul_peak": peaks, "runs": runs, "scoring": summary, "targets": targets}


def _generation_cost(options, model) -> dict:
    from hfprune_nb.cost import generation, published_loops

    networks, _ = published_loops.variants(model, options.ratios, options.multiples)
    settings = options.prompt_tokens, options.new_tokens, options.repetitions, options.cache
    runs = generation.compare(networks, options.batch_sizes, *settings)
    return {"generations": runs, "generation": generation.summarise(runs, networks, options.prompt_tokens)}


def _show_cost(found: dict) -> None:
    machine, peaks = found["machine"], found["matmul_peak"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
    say(f"{found['model']} on {machine['processor']}, {machine['threads']} threads; matmul peak {rates}")
    say(f"memory: {machine['memory']}, beyond the weights")
    _show_table(
        {
            "scored by": [row["contestant"] for row in found["scoring"]],
            "seconds": [f"{row['seconds']:.2f}" for row in found["scoring"]],
            "tokens/s": [f"{row['tokens_per_second']:,.0f}" for row in found["scoring"]],
            "peak MB": [f"{row['peak_bytes'] / 1e6:,.0f}" for row in found["scoring"]],
            "of matmul peak": [f"{100 * row['peak_fraction']:.1f} %" for row in found["scoring"]],
        }
    )
    verdicts = {None: "reported", True: "met", False: "missed"}
    _show_table(
        {
            "target": [row["target"] for row in found["targets"]],
            "wanted": ["-" if row["limit"] is None else f"{row['bound']} {row['limit']:g}" for row in found["targets"]],
            "measured": [f"{row['median']:.4g}" for row in found["targets"]],
            "verdict": [verdicts[row["met"]] for row in found["targets"]],
        }
    )
    rows = found.get("generation", [])
    _show_table(
        {
            "generation by": [row["model"] for row in rows],
            "width": [str(row["width"]) for row in rows],
            "parameters": [f"{row['parameters'] / 1e6:,.0f} M" for row in rows],
            "batch": [str(row["batch_size"]) for row in rows],
            "first token": [f"{1000 * row['first_token']:,.1f} ms" for row in rows],
            "per token": [f"{1000 * row['per_token']:,.1f} ms" for row in rows],
            "tokens/s": [f"{row['tokens_per_second']:,.1f}" for row in rows],
        }
    )


def _show_table(columns: dict[str, list[str]]) -> None:
    """Print columns of texts, the first to the left and the others to the right; nothing where there are no rows."""
    lines = list(zip(*columns.values(), strict=True))
    if not lines:
        return
    widths = [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    say("")
    for line in [tuple(columns), *lines]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
