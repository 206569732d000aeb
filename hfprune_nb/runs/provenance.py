"""How a run was made: versions, machine, memory, commit."""

import contextlib
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.machine import processor
from hfprune_nb.runs.keys import content, local_path


def peak_memory() -> int | None:
    """Return the highest resident memory of this process in bytes, its GPU memory included; None where nobody counts it."""
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    return host + torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else host


def model_revision(parameters: dict) -> str:
    """Return what pins the weights of a run's model: a commit of the hub, the first 16 hex digits of a SHA-256 of local files.

    Empty for the kit's own aliases (`models.revision`).
    """
    name = parameters["model"]
    commit = parameters["revisions"].get(hub.repository(name), "")
    pinned = [f"commit {commit}"] if commit else []
    folder = local_path(name)
    return " and ".join([*pinned, *([f"files sha256 {content(folder)}"] if folder else [])])


def surroundings() -> dict:
    """Return versions, machine and commit."""
    versions = {}
    for package in ("torch", "transformers", "datasets", "lm_eval", "numpy", "hfprune_nb"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    torch = sys.modules.get("torch")
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "git": _git(),
    }


def committed(commit: str, path: str, folder: Path) -> Path:
    """Write what the kit's repository holds at `path` in a commit into `folder`; return the folder that holds it there.

    Raises UserError where there is no such commit, or it holds nothing there.
    """
    command = ["git", "-C", str(paths.project()), "archive", commit, path]
    answer = subprocess.run(command, capture_output=True)
    if answer.returncode:
        reason = answer.stderr.decode(errors="replace").strip().splitlines()[-1]
        raise UserError(f"--against {commit!r} is no folder, and git has nothing of {path} in such a commit ({reason})")
    with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return (folder / path).parent


def _git() -> dict:
    def ask(*command):
        answer = subprocess.run(["git", "-C", paths.project(), *command], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        # A study writes into results while it runs, which changes nothing about the code that it is made with.
        changed = ask("status", "--porcelain", "--", ".", ":(exclude)results")
        return {"commit": ask("rev-parse", "--verify", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
