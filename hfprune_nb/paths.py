"""Where the kit keeps its notebooks, data and results; each folder can be moved by one environment variable."""

import functools
import os
from pathlib import Path


def project() -> Path:
    """Return the kit's folder: `HFPRUNE_HOME`, else the checkout that holds the package, else the working directory."""
    return _project(os.environ.get("HFPRUNE_HOME"), os.getcwd())


def notebooks() -> Path:
    """Return the folder of the study's notebooks."""
    return project() / "notebooks"


def data() -> Path:
    """Return the folder of published tables and local task files."""
    return project() / "data"


def cache() -> Path:
    """Return the folder of downloads and converted models: `HFPRUNE_CACHE`, else `data/cache`."""
    return _resolved(os.environ.get("HFPRUNE_CACHE") or str(data() / "cache"), os.getcwd())


def results() -> Path:
    """Return the folder of all studies' results: `HFPRUNE_RESULTS`, else `results`."""
    return _resolved(os.environ.get("HFPRUNE_RESULTS") or str(project() / "results"), os.getcwd())


@functools.lru_cache(maxsize=16)
def _project(home: str | None, working: str) -> Path:
    if home:
        return _resolved(home, working)
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path(working)


@functools.lru_cache(maxsize=64)
def _resolved(folder: str, working: str) -> Path:
    # A plan asks a thousand times, and resolving looks at every folder on the way.
    return Path(working, Path(folder).expanduser()).resolve()
