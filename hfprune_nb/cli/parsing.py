"""What all commands share: help, types of arguments, and words to the user."""

import argparse
import math
import sys
from typing import Any


def command(parent, name: str, purpose: str, examples: str = "", run=None) -> argparse.ArgumentParser:
    """Return the parser of a command, a part of `parent` or the whole; `run` is called with its options."""
    options: dict[str, Any] = {
        "description": purpose[0].upper() + purpose[1:].removesuffix(".") + ".",
        "epilog": examples,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = parent.add_parser(name, help=purpose, **options) if parent else argparse.ArgumentParser(name, **options)
    parser.set_defaults(command=run)
    return parser


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def say(line: str) -> None:
    """Write one line to the standard output."""
    sys.stdout.write(f"{line}\n")
