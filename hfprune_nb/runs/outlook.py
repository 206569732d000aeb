"""What a run still takes: the forecast of every job, corrected by what has finished and by what runs."""

import time
from collections.abc import Callable

from hfprune_nb.runs.forecast import makespan


class Outlook:
    """Follows the jobs of one run and says how much is done and how long the rest takes.

    seconds : the forecast of each job, whose name begins with its stage (`scoring/...`); depends_on : what each waits for;
    clock : seconds, of any origin.
    """

    def __init__(
        self,
        seconds: dict[str, float],
        depends_on: dict[str, tuple[str, ...]],
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._seconds, self._depends_on, self._workers, self._clock = seconds, depends_on, workers, clock
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Note that a job begins."""
        self._began[name] = self._clock()

    def again(self, name: str) -> None:
        """Note that a job which began waits once more."""
        self._began.pop(name, None)

    def end(self, name: str, seconds: float = 0.0) -> None:
        """Note that a job is settled; `seconds` is what it took here, 0 where that says nothing, as of one that failed."""
        self._began.pop(name, None)
        self._ended[name] = seconds

    def pace(self, stage: str) -> float:
        """Return how many times its forecast a job of `stage` takes: of its finished jobs, else of all, else 1.

        A job that runs for longer than was forecast counts as well, with what it took so far.
        """
        took = {name: seconds for name, seconds in self._ended.items() if seconds}
        took |= {name: past for name in self._began if (past := self._elapsed(name)) > self._seconds[name]}
        chosen = [name for name in took if name.split("/")[0] == stage] or list(took)
        return sum(took[name] for name in chosen) / sum(self._seconds[name] for name in chosen) if chosen else 1.0

    def left(self, told: dict[str, float] | None = None) -> float:
        """Return the seconds until the last job ends; told : of running jobs, the seconds that they say are left at least."""
        return makespan(self._rest(told or {}), self._depends_on, self._workers)

    def share(self, told: dict[str, float] | None = None) -> float:
        """Return the share of the run's work that is done, 1 where nothing is left."""
        paces = self._paces()
        done = sum(seconds or self._seconds[name] * paces[name.split("/")[0]] for name, seconds in self._ended.items())
        done += sum(map(self._elapsed, self._began))
        rest = sum(self._rest(told or {}).values())
        return done / (done + rest) if rest else 1.0

    def _rest(self, told: dict[str, float]) -> dict[str, float]:
        paces = self._paces()
        rest = {n: s * paces[n.split("/")[0]] for n, s in self._seconds.items() if n not in self._ended}
        for name in self._began:
            rest[name] = max(0.0, rest[name] - self._elapsed(name), told.get(name, 0.0))
        return rest

    def _paces(self) -> dict[str, float]:
        return {stage: self.pace(stage) for stage in {name.split("/")[0] for name in self._seconds}}

    def _elapsed(self, name: str) -> float:
        return self._clock() - self._began[name]
