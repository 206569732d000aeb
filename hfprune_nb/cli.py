"""The command `hfprune`: fetch assets; plan, run, watch, verify and clean studies."""

import argparse
import errno
import json
import logging
import os
import signal
import sys
from collections import Counter

from hfprune_nb import __version__
from hfprune_nb.errors import UserError

_EXAMPLES = """examples:
  hfprune assets list                    what can be fetched, its licence, and what is here
  hfprune assets fetch smollm2-135m      fetch one asset through your own pip configuration
  hfprune cost --model smollm2-135m      time and memory of scoring, speed of generation
  hfprune study plan offline             what the study consists of and what is done already
  hfprune study run offline              compute what is missing, publish tables and figures
  hfprune study status offline           one line per cell
"""
_RUN_EXAMPLES = """STUDY is a file, or the name of one in notebooks/studies.

examples:
  hfprune study run smoke
  hfprune study run offline --workers 4
  hfprune study run my_study.yaml --results results_on_scratch --no-fetch

Interrupt with Ctrl-C at any time: a second run continues where the first stopped.
Exit status: 0 everything is finished, 1 a cell failed, 2 bad input, 130 interrupted.
"""
_VERIFY_EXAMPLES = """examples:
  hfprune study verify offline --dry-run   hashes every file of every artifact and lists what is damaged
  hfprune study verify offline             computes the damaged ones again, and nothing else

Exit status: 0 nothing is damaged (any more), 1 something is, 2 bad input.
"""
_CELL_EXAMPLES = """CELL is `stage/key`, as `hfprune study graph` lists it. Its inputs must be
finished; a cell that is finished itself is left as it is.

examples:
  hfprune study cell smoke calibration/c9d1f1a0c1b2d3e4

Exit status: 0 the cell is finished, 1 it failed, 2 bad input.
"""
_RATES_EXAMPLES = """examples:
  hfprune study rates results/offline/cards.json results/offline-qwen/cards.json
"""
_CLEAN_EXAMPLES = """examples:
  hfprune study clean offline            shows what would go and asks
  hfprune study clean offline --yes      artifacts go, published tables and figures stay
"""
_COST_EXAMPLES = """Needs torch and transformers only. Text is random tokens: cost does not depend on them. What is compared
alternates in one process; figures are medians. Memory is the peak beyond the weights.

examples:
  hfprune cost --model smollm2-135m --device cpu
  hfprune cost --shape llama-3.2-1b --device cuda --windows 16 --seq-len 1024 --new-tokens 256
  hfprune cost --shape llama-2-7b --device cuda --windows 16 --seq-len 1024 --batch-sizes 1 8 64 --out cost.json
  hfprune cost --model my_checkpoint --no-ablation --no-generation
  PYTHONPATH=. python -m hfprune_nb.cli cost --shape tiny      from a checkout, nothing installed
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 finished, 1 a cell failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    # A cluster ends jobs with SIGTERM: treat it as Ctrl-C, so that no kernel stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.command(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write("error: no disk space left: free some and run the same command again\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to continue\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _command(None, "hfprune", "Reproduce High-Fidelity Pruning (HFPrune) for language models.", _EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hfprune {__version__}")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    assets = _command(groups, "assets", "pinned models and data").add_subparsers(metavar="ACTION", required=True)
    _command(assets, "list", "list the assets and what is cached", run=_assets_list)
    fetch = _command(assets, "fetch", "fetch and verify assets", run=_assets_fetch)
    fetch.add_argument("names", nargs="*", metavar="NAME", help="asset names, see `hfprune assets list`")
    fetch.add_argument("--all", action="store_true", help="fetch every asset")

    _add_cost(groups)
    study = _command(groups, "study", "studies: grids of notebooks").add_subparsers(metavar="ACTION", required=True)
    plan = _command(study, "plan", "show what a study consists of, what is done, and what it will cost", run=_study_plan)
    run = _command(study, "run", "compute what is missing of a study", _RUN_EXAMPLES, _study_run)
    status = _command(study, "status", "show the state of every cell", run=_study_status)
    clean = _command(study, "clean", "delete the artifacts of a study", _CLEAN_EXAMPLES, _study_clean)
    verify = _command(study, "verify", "hash every artifact and compute the damaged ones again", _VERIFY_EXAMPLES, _study_verify)
    cell = _command(study, "cell", "compute one cell, as a workflow engine does", _CELL_EXAMPLES, _study_cell)
    rates = _command(study, "rates", "fit the rates behind `plan` to studies that ran", _RATES_EXAMPLES, _study_rates)
    rates.add_argument("cards", nargs="+", metavar="CARDS", help="published cards.json of a study, its run.log beside it")
    graph = _command(study, "graph", "print the cells and what they wait for as JSON", run=_study_graph)
    for command in (plan, run, status, verify, clean, cell, graph):
        command.add_argument("study", metavar="STUDY", help="study file, or the name of one in notebooks/studies")
        command.add_argument("--results", metavar="DIR", help="results folder of all studies (default: results)")
    cell.add_argument("cell", metavar="CELL", help="stage/key")
    for command in (run, cell):
        words = "give each notebook, of this machine's N GPUs, one for each of its processes"
        command.add_argument("--gpus", type=_positive, default=0, metavar="N", help=words)
    for command in (run, verify):
        command.add_argument("--workers", type=_positive, metavar="N", help="notebooks at a time (default: as the file says)")
    verify.add_argument("--dry-run", action="store_true", help="only list what is damaged")
    run.add_argument(
        "--fetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first fetch the assets that the study names (default: yes)",
    )
    clean.add_argument("--yes", action="store_true", help="do not ask")
    clean.add_argument("--published", action="store_true", help="delete the published tables, figures and pages too")
    return parser


def _add_cost(groups) -> None:
    cost = _command(groups, "cost", "time and memory of scoring, speed of generation", _COST_EXAMPLES, _cost)
    subject = cost.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="NAME", help="alias, hub id or local folder")
    subject.add_argument("--shape", metavar="NAME", help="random weights of this architecture, such as llama-2-7b")
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
        cost.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{text} (default: {default})")
    cost.add_argument(
        "--batch-size", type=int, default=0, metavar="N", help="the engine's windows at a time (default: 0, automatic)"
    )
    cost.add_argument(
        "--float64-windows", type=int, default=1, metavar="N", help="for the rank correlation; 0: none (default: 1)"
    )
    cost.add_argument(
        "--batch-sizes", type=_positive, nargs="+", default=[1, 8], metavar="N", help="of generation (default: 1 8)"
    )
    cost.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3], metavar="R", help="pruned models (default: 0.2 0.3)")
    cost.add_argument(
        "--multiples",
        type=_positive,
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


def _command(parent, name: str, purpose: str, examples: str = "", run=None) -> argparse.ArgumentParser:
    options = {
        "description": purpose[0].upper() + purpose[1:].removesuffix(".") + ".",
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = parent.add_parser(name, help=purpose, **options) if parent else argparse.ArgumentParser(name, **options)
    parser.set_defaults(command=run)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _assets_list(options) -> int:
    from hfprune_nb.inputs import assets

    for asset in assets.list_assets():
        state = "cached" if assets.is_cached(asset.name) else "-"
        size = f"{asset.size / 1e6:,.1f} MB"
        _say(f"{asset.name:<20} {asset.kind:<10} {state:<7} {size:>11}  {asset.description} ({asset.licence})")
    return 0


def _assets_fetch(options) -> int:
    from hfprune_nb.inputs import assets

    names = [asset.name for asset in assets.list_assets()] if options.all else options.names
    if not names:
        raise UserError("name at least one asset, or give --all: see `hfprune assets list`")
    for name in names:
        assets.get(name)  # a misspelt name is refused before anything is fetched
    for name in names:
        _say(f"{name}: {assets.fetch(name, progress=True)}")
    return 0


def _study_plan(options) -> int:
    study, loaded = _load(options)
    from hfprune_nb.runs import forecast

    table = study.forecast_table(loaded)
    _say(f"study {loaded.name}: {loaded.description}".rstrip(": "))
    _say(f"  {'stage':<12} {'cells':>5} {'done':>5} {'tokens':>9} {'alone':>9} {'memory':>8} {'disk':>9}")
    for stage, row in table.iterrows():
        _say(_plan_row(stage, row))
    total = table.sum()
    total["memory"] = table["memory"].max()
    _say(_plan_row("total", total))
    counts = sorted({1, loaded.run["workers"], *forecast.WORKERS})
    times = ", ".join(f"{number}: {forecast.in_words(study.hours(loaded, number))}" for number in counts)
    left = forecast.in_words(study.hours(loaded, loaded.run["workers"], only_missing=True))
    _say(f"whole study by workers or GPUs: {times}; what is missing, with {loaded.run['workers']}: {left}")
    late = study.overdue(loaded)
    if late:
        minutes = loaded.run["timeout_minutes"]
        _say(f"too long for run.timeout_minutes {minutes:g}: {len(late)} cells, such as {late[0].stage} {late[0].label}")
    kinds = sorted({forecast.device(cell.parameters) for cell in study.plan(loaded) if "device" in cell.parameters})
    for kind in kinds:
        _say(f"rates of the {kind}: {forecast.rates()['devices'][kind]['protocol']}")
    return 0


def _plan_row(name: str, row) -> str:
    from hfprune_nb.runs.forecast import in_words

    tokens = f"{row['tokens'] / 1e6:,.2f} M" if row["tokens"] else "-"
    disk = f"{row['disk']:.2f} GB"
    return (
        f"  {name:<12} {row['cells']:>5.0f} {row['done']:>5.0f} {tokens:>9} {in_words(row['hours']):>9} "
        f"{row['memory']:>5.1f} GB {disk:>9}"
    )


def _study_rates(options) -> int:
    from pathlib import Path

    from hfprune_nb.runs import forecast

    fitted = forecast.refit([Path(name) for name in options.cards])
    for stage, seconds in fitted["seconds_per_unit"].items():
        _say(f"{stage:<12} {seconds:.4g} s per unit of work")
    return 0


def _study_run(options) -> int:
    study, loaded = _load(options)
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger("hfprune_nb.runs")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if any(outcome.state != "done" for outcome in study.status(loaded)):
        _check_criteria(loaded.criteria)
        if options.fetch:
            _fetch_missing(loaded.assets)
    summary = study.run(loaded, options.workers, on_terminal, options.gpus)
    _say(summary.text())
    if loaded.folder.is_dir():
        _say(f"results: {loaded.folder}")
    return 0 if summary.ok else 1


def _check_criteria(names: list[str]) -> None:
    # Here and not in the study's loader, which must not wait for torch when everything is done.
    from hfprune_nb.method import criteria

    for name in names:
        criteria.create(name)


def _fetch_missing(names: list[str]) -> None:
    from hfprune_nb.inputs import assets

    for name in names:
        if not assets.is_cached(name):
            assets.fetch(name, progress=True)


def _study_status(options) -> int:
    study, loaded = _load(options)
    outcomes = study.status(loaded)
    for outcome in outcomes:
        _say(outcome.line())
    states = Counter(outcome.state for outcome in outcomes)
    _say(f"{len(outcomes)} cells: {', '.join(f'{number} {state}' for state, number in sorted(states.items()))}")
    return 0


def _study_verify(options) -> int:
    study, loaded = _load(options)
    damaged, summary = study.verify(loaded, not options.dry_run, options.workers, progress=sys.stderr.isatty())
    checked = sum((loaded.folder / cell.reference).is_dir() for cell in study.plan(loaded))
    if not damaged:
        _say(f"study {loaded.name}: {checked} artifacts, every byte as it was written")
        return 0
    for cell, wrong in damaged:
        _say(f"damaged   {cell.stage:<11}  {cell.label:<52}  {wrong}")
    _say(f"study {loaded.name}: {len(damaged)} of {checked} artifacts are damaged")
    if summary is None:
        return 1
    _say(summary.text())
    return 0 if summary.ok else 1


def _study_cell(options) -> int:
    study, loaded = _load(options)
    outcome = study.run_cell(loaded, options.cell, options.gpus)
    _say(outcome.line())
    return 0 if outcome.state in ("done", "computed") else 1


def _study_graph(options) -> int:
    study, loaded = _load(options)
    _say(json.dumps(study.graph(loaded), indent=1))
    return 0


def _study_clean(options) -> int:
    study, loaded = _load(options)
    doomed = study.removable(loaded, options.published)
    if not doomed:
        _say(f"study {loaded.name}: nothing to delete")
        return 0
    for path in doomed:
        _say(str(path))
    if not options.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was deleted: give --yes to delete these without being asked")
        if input(f"Delete these {len(doomed)}? [y/N] ").strip().lower() not in ("y", "yes"):
            _say("nothing was deleted")
            return 0
    _say(f"deleted {len(study.clean(loaded, options.published))}")
    return 0


def _load(options):
    """Return the study module and the checked study; the results folder is set for this process and its kernels."""
    # Imported here, so that `--help` and bad options answer at once.
    from hfprune_nb.runs import study

    if options.results:
        os.environ["HFPRUNE_RESULTS"] = os.path.abspath(options.results)
    return study, study.load(options.study)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _cost(options) -> int:
    from hfprune_nb.inputs import models
    from hfprune_nb.measure import speed

    device, dtype = models.resolve_device(options.device), models.resolve_dtype(options.dtype)
    if options.shape:
        model = speed.random_model(options.shape, dtype, device)
    else:
        model, _ = models.load(options.model, options.dtype, device)
    found = {"model": options.shape or options.model, "machine": speed.machine(device)}
    found |= _scoring_cost(options, model, device, dtype)
    if options.generation:
        found |= _generation_cost(options, model)
    _show_cost(found)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "command"}
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found | {"settings": settings}, file, indent=1)
    return 0


def _scoring_cost(options, model, device: str, dtype) -> dict:
    from hfprune_nb.measure import accumulation, speed
    from hfprune_nb.method import reference

    windows = speed.random_windows(model, options.windows, options.seq_len)
    peaks = speed.matmul_peak(device, dtype)
    contestants = reference.contestants(model, windows, options.batch_size)
    contestants += reference.ablation(model, windows) if options.ablation else []
    runs = speed.alternate({contestant.name: contestant.run for contestant in contestants}, options.repetitions, device)
    summary = speed.summarise(runs, contestants, model, windows, peaks[options.dtype])
    lowest = {}
    if options.float64_windows:
        half, wide = reference.in_half_and_in_float64(model, windows[: options.float64_windows], options.batch_size)
        lowest = {name: min(accumulation.rank_correlation(half[name], wide[name])) for name in half}
    targets = speed.targets(runs, summary, device, lowest)
    return {"matmul_peak": peaks, "runs": runs, "scoring": summary, "targets": targets}


def _generation_cost(options, model) -> dict:
    from hfprune_nb.measure import inference
    from hfprune_nb.method import reference

    networks, _ = reference.variants(model, options.ratios, options.multiples)
    settings = options.prompt_tokens, options.new_tokens, options.repetitions, options.cache
    runs = inference.compare(networks, options.batch_sizes, *settings)
    return {"generations": runs, "generation": inference.summarise(runs, networks, options.prompt_tokens)}


def _show_cost(found: dict) -> None:
    machine, peaks = found["machine"], found["matmul_peak"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
    _say(f"{found['model']} on {machine['processor']}, {machine['threads']} threads; matmul peak {rates}")
    _say(f"memory: {machine['memory']}, beyond the weights")
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
    _say("")
    for line in [tuple(columns), *lines]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        _say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


if __name__ == "__main__":
    sys.exit(main())
