"""The command `hfprune`: fetch assets; plan, run, watch and clean studies."""

import argparse
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
_CLEAN_EXAMPLES = """examples:
  hfprune study clean offline            shows what would go and asks
  hfprune study clean offline --yes      artifacts go, published tables and figures stay
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

    study = _command(groups, "study", "studies: grids of notebooks").add_subparsers(metavar="ACTION", required=True)
    plan = _command(study, "plan", "show how many cells a study has and how many are done", run=_study_plan)
    run = _command(study, "run", "compute what is missing of a study", _RUN_EXAMPLES, _study_run)
    status = _command(study, "status", "show the state of every cell", run=_study_status)
    clean = _command(study, "clean", "delete the artifacts of a study", _CLEAN_EXAMPLES, _study_clean)
    for command in (plan, run, status, clean):
        command.add_argument("study", metavar="STUDY", help="study file, or the name of one in notebooks/studies")
        command.add_argument("--results", metavar="DIR", help="results folder of all studies (default: results)")
    run.add_argument("--workers", type=_positive, metavar="N", help="notebooks at a time (default: as the file says)")
    run.add_argument(
        "--fetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first fetch the assets that the study names (default: yes)",
    )
    clean.add_argument("--yes", action="store_true", help="do not ask")
    clean.add_argument("--published", action="store_true", help="delete the published tables, figures and pages too")
    return parser


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
    outcomes = study.status(loaded)
    cells = Counter(outcome.cell.stage for outcome in outcomes)
    done = Counter(outcome.cell.stage for outcome in outcomes if outcome.state == "done")
    _say(f"study {loaded.name}: {loaded.description}".rstrip(": "))
    for stage, number in cells.items():
        _say(f"  {stage:<12} {number:>4} cells, {done[stage]:>4} done")
    _say(f"  {'total':<12} {cells.total():>4} cells, {done.total():>4} done")
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
    summary = study.run(loaded, options.workers, progress=on_terminal)
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
