"""What a person sees of a run: in a terminal and in JupyterLab bars, in a log a line now and then."""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hfprune_nb import progress
from hfprune_nb.runs.forecast import in_words
from hfprune_nb.runs.outlook import Outlook

log = logging.getLogger(__name__)

LINE_SECONDS = 60.0
_MOST = 8


class Display:
    """One bar with the time left and under it one for each job that runs, or the same in lines.

    name : of the study; jobs : how many; workers : how many run at a time; bars : whether to draw them. Without bars lines go to
    the log, and with `HFPRUNE_PROGRESS=log` to the error output, when the first job begins and then every LINE_SECONDS.
    """

    def __init__(self, name: str, jobs: int, workers: int, bars: bool, clock: Callable[[], float] = time.monotonic):
        self._name, self._jobs, self._clock = name, jobs, clock
        self._said: float | None = None
        self._say: Callable[[str], object] = log.info
        self._bars: list = []
        if bars and progress.plain():
            self._say = lambda line: sys.stderr.write(f"{line}\n")
        elif bars:
            self._bars = [progress.share_bar(name), *(progress.share_bar("", row + 1) for row in range(min(workers, _MOST)))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for bar in reversed(self._bars):
            bar.close()

    def show(self, outlook: Outlook, settled: int, failed: int, running: dict[str, tuple[str, Path]]) -> None:
        """Show how far the run is: jobs settled and failed; of each that runs its words and the file in which it tells more."""
        states = {name: progress.read(file) for name, (_, file) in running.items()}
        told = {name: left for name, state in states.items() if (left := progress.seconds_left(state)) is not None}
        share, left = outlook.share(told), outlook.left(told)
        words = f"{settled}/{self._jobs} jobs" + (f", {failed} failed" if failed else "")
        if running:
            words += f", about {in_words(left / 3600) if left >= 90 else f'{left:.0f} s'} left"
        if not self._bars:
            self._line(words, share, running)
            return
        progress.draw(self._bars[0], self._name, share, words)
        for bar, name in zip(self._bars[1:], [*running, *[None] * len(self._bars)], strict=False):
            state = states.get(name)
            done = state["n"] / state["total"] if state and state["total"] else 0.0
            progress.draw(bar, running[name][0] if name else "", done, progress.told(running[name][1]) if name else "")

    def _line(self, words: str, share: float, running: dict[str, tuple[str, Path]]) -> None:
        now = self._clock()
        if not running or (self._said is not None and now - self._said < LINE_SECONDS):
            return
        self._said = now
        jobs = [f"{job} ({rate})" if (rate := progress.told(file)) else job for job, file in running.values()]
        self._say(f"{self._name}: {share:.0%}, {words}; {'; '.join(jobs)}")
