"""Progress bars that suit the place: live in a terminal or in JupyterLab, a line every ten seconds in a batch run."""

import os

import tqdm
import tqdm.auto


def bar(total, unit, description, enabled=True):
    """Return a tqdm bar over `total` units with rate and time left; `HFPRUNE_PROGRESS=log` makes it plain text and slow."""
    options = {"total": total, "unit": unit, "desc": description, "disable": not enabled, "unit_scale": total >= 10_000}
    if os.environ.get("HFPRUNE_PROGRESS") == "log":
        return tqdm.tqdm(mininterval=10, ascii=True, ncols=100, **options)
    return tqdm.auto.tqdm(**options)
