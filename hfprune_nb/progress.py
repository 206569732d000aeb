"""Progress bars that suit the place: live in a terminal or in JupyterLab, a line every ten seconds in a batch run.

A batch run also tells `hfprune study status` how far it is, in the small JSON file named by `PROGRESS_FILE`.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import tqdm
import tqdm.auto

PROGRESS_FILE = "HFPRUNE_PROGRESS_FILE"


class _Logged(tqdm.tqdm):
    def display(self, *arguments, **options):
        state = self.format_dict
        rate = state["rate"] or (state["n"] - state["initial"]) / max(state["elapsed"], 1e-9)
        told = {
            "what": self.desc,
            "n": state["n"],
            "total": state["total"],
            "unit": state["unit"],
            "rate": rate,
            "time": time.time(),
        }
        if path := os.environ.get(PROGRESS_FILE):
            with contextlib.suppress(OSError):  # nobody's work may fail because a line about it could not be written
                complete = Path(f"{path}.new")
                complete.write_text(json.dumps(told), encoding="utf-8")
                complete.replace(path)
        return super().display(*arguments, **options)


def bar(total, unit, description, enabled=True, rate=True):
    """Return a tqdm bar over `total` units with rate and time left; `HFPRUNE_PROGRESS=log` makes it plain text and slow.

    rate : whether units take alike, so that a rate says something; without it the caller says in a postfix what is left.
    """
    options = {"total": total, "unit": unit, "desc": description, "disable": not enabled, "unit_scale": total >= 10_000}
    if not rate:
        options["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    if os.environ.get("HFPRUNE_PROGRESS") == "log":
        return _Logged(mininterval=10, ascii=True, ncols=100, **options)
    return tqdm.auto.tqdm(**options)


@contextlib.contextmanager
def followed(path: Path, seconds: float = 1.0):
    """Within the context, show as bars of its own what a run in another process tells in the file `path`, looked at every so
    many `seconds`.
    """
    ended = threading.Event()

    def follow():
        shown = None
        while not ended.wait(seconds):
            with contextlib.suppress(OSError, ValueError):
                state = json.loads(path.read_text(encoding="utf-8"))
                if shown is None or shown.desc.removesuffix(": ") != state["what"]:
                    shown and shown.close()
                    shown = bar(state["total"], state["unit"], state["what"])
                shown.update(state["n"] - shown.n)
        shown and shown.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def told(path: Path) -> str:
    """Return how far a run is according to its file, such as `scoring 41 %, 812 tok/s, 3 min left`; empty without one."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    done, total, rate = state["n"], state["total"], state["rate"]
    parts = [f"{state['what']} {done / total:.0%}" if total else f"{state['what']} {done}"]
    if rate:
        parts.append(f"{rate:.3g} {state['unit']}/s")
    if rate and total:
        left = max(0.0, (total - done) / rate - (time.time() - state["time"]))
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(parts)
