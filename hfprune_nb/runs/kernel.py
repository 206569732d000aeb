"""One notebook, one kernel: papermill on this very interpreter, nothing shared with kernels that run beside it."""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path

from hfprune_nb import paths

# Whether kernels of this process are forked from one that has the libraries: see `hfprune_nb.runs.warm`.
warm_starts = False


def run(
    notebook: Path,
    output: Path,
    parameters: dict,
    environment: dict[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> None:
    """Execute `notebook` with parameters that the caller has checked and save it, outputs included, as `output`.

    `environment` is added to the kernel's. Raises TimeoutError when the kernel was killed after `timeout_seconds`, else
    whatever papermill raises.
    """
    import papermill
    from traitlets.config import Config

    from hfprune_nb.runs import warm

    with tempfile.TemporaryDirectory(prefix="hf") as private, _watchdog(timeout_seconds) as timed_out:
        config = Config()
        if os.name == "posix":
            # TCP kernels are unencrypted and race for ports. A socket's path holds about 100 characters: keep it short.
            config.ConnectionFileMixin.transport = "ipc"
            config.ConnectionFileMixin.connection_file = f"{private}/k.json"
        forked = {"kernel_manager_class": warm.Manager} if warm_starts and warm.is_possible() else {}
        with _environment(_isolation(Path(private)) | (environment or {})):
            try:
                papermill.execute_notebook(
                    _literal(notebook),
                    _literal(output),
                    parameters,
                    kernel_name="python3",
                    cwd=Path(notebook).parent,
                    progress_bar=False,
                    config=config,
                    shutdown_kernel="immediate",
                    **forked,
                )
            except Exception as error:
                if timed_out.is_set():
                    minutes = f"{timeout_seconds / 60:g} minutes"
                    raise TimeoutError(f"stopped after {minutes}: raise run.timeout_minutes") from error
                raise


def kill_children(process: int | None = None) -> None:
    """Kill every process that descends from `process` (its id; default: this one)."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def end_with_parent() -> None:
    """End this process, one of multiprocessing's, and what it started as soon as its parent is gone, even by SIGKILL."""

    def watch():
        multiprocessing.parent_process().join()
        kill_children()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _literal(path: Path) -> str:
    """Return a path in which papermill, which formats it with the parameters, finds nothing to put in."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _isolation(private: Path) -> dict[str, str]:
    """Return the environment that binds a kernel to this interpreter, this package, these folders and private ones.

    What lies beside the notebook is no module for it, and drawing is as in JupyterLab, whatever the user has set for other work.
    """
    specification = private / "kernels" / "python3" / "kernel.json"
    specification.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += ["--InteractiveShellApp.ignore_cwd=True", "--InteractiveShellApp.exec_PYTHONSTARTUP=False"]
    specification.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    (private / "matplotlibrc").touch()
    package = str(Path(__file__).resolve().parents[2])
    return {
        "IPYTHONDIR": str(private / "ipython"),
        "JUPYTER_PATH": str(private),
        "JUPYTER_RUNTIME_DIR": str(private),
        "MATPLOTLIBRC": str(private / "matplotlibrc"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "HFPRUNE_HOME": str(paths.project()),
        "HFPRUNE_RESULTS": str(paths.results()),
        "HFPRUNE_CACHE": str(paths.cache()),
        "HFPRUNE_PROGRESS": "log",
    }


@contextlib.contextmanager
def _environment(changes: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _watchdog(seconds: float | None):
    """Kill the kernel and what it started after `seconds`; yields an event that tells whether that happened."""
    fired = threading.Event()

    def stop():
        fired.set()
        kill_children()

    timer = threading.Timer(seconds or 0, stop)
    if seconds:
        timer.start()
    try:
        yield fired
    finally:
        timer.cancel()
