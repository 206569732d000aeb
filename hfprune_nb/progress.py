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


def bar(total, unit, description, enabled=True):
    """Return a tqdm bar over `total` units with rate and time left; `HFPRUNE_PROGRESS=log` makes it plain text and slow."""
    options = {"total": total, "unit": unit, "desc": description, "disable": not enabled, "unit_scale": total >= 10_000}
    if plain():
        return _Logged(mininterval=10, ascii=True, ncols=100, **options)
    return tqdm.auto.tqdm(**options)


def plain() -> bool:
    """Return whether whoever started this process asked for plain text, with `HFPRUNE_PROGRESS=log`."""
    return os.environ.get("HFPRUNE_PROGRESS") == "log"


def share_bar(description: str, row: int = 0):
    """Return a bar that `draw` sets to a share, in this row of several; those below the first go when they are closed."""
    form = "{l_bar}{bar}| [{elapsed}{postfix}]" if row == 0 else "  {l_bar}{bar}|{postfix}"
    return tqdm.auto.tqdm(
        total=1.0, desc=description, position=row, leave=row == 0, bar_format=form, dynamic_ncols=True, mininterval=0
    )


def draw(bar, description: str, share: float, words: str) -> None:
    """Set a bar of `share_bar` to a share from 0 to 1, with these words behind it."""
    bar.n = min(share, 1.0)
    bar.set_description_str(description, refresh=False)
    bar.set_postfix_str(words, refresh=False)
    bar.refresh()


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


def read(path: Path) -> dict | None:
    """Return what a run tells in its file (what, n, total, unit, rate, time), None without one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def seconds_left(state: dict | None) -> float | None:
    """Return how many seconds are left of what a run tells (see `read`), None where it does not say."""
    if not (state and state["rate"] and state["total"]):
        return None
    return max(0.0, (state["total"] - state["n"]) / state["rate"] - (time.time() - state["time"]))


def told(path: Path) -> str:
    """Return how far a run is according to its file, such as `scoring 41 %, 812 tok/s, 3 min left`; empty without one."""
    if (state := read(path)) is None:
        return ""
    done, total, rate = state["n"], state["total"], state["rate"]
    parts = [f"{state['what']} {done / total:.0%}" if total else f"{state['what']} {done}"]
    if rate:
        parts.append(f"{rate:.3g} {state['unit']}/s")
    if (left := seconds_left(state)) is not None:
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(parts)
