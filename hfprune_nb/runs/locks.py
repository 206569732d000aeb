"""Locks: the right to compute one artifact, so that any number of processes and machines can share a results folder.

The mechanism is filelock's `SoftFileLease`: a file created exclusively, which names host, process and start time and is
touched by a heartbeat. It needs no lock daemon, so it works on a shared file system. The lease of a process that died on
this machine is taken over at once, that of any other owner after `LEASE_SECONDS` without a heartbeat. A lease is no
proof: an owner that was suspended for longer may come back, so whoever seals an artifact asks `held` last.
"""

import contextlib
import logging
import os
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
POLL_SECONDS = 0.5
# A kernel works under the lock of the process that started it, which tells it by this variable.
INHERITED = "HFPRUNE_LOCK"


class Lock:
    """The lock in the file `path`; locks of one process on one path are the same lock."""

    def __init__(self, path: Path):
        self.path = path
        token, _, inherited = os.environ.get(INHERITED, "").partition(":")
        self._token = token if inherited == str(path) else None
        self._lease = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False, is_singleton=True)

    @property
    def held(self) -> bool:
        """Whether this process, or the one that it works for, still owns the lock."""
        token = self._token or self._lease.token
        try:
            return bool(token) and token in self.path.read_text(encoding="utf-8")
        except OSError:
            return False

    @property
    def environment(self) -> dict[str, str]:
        """What a child process must find in its environment to work under this lock."""
        return {INHERITED: f"{self._token or self._lease.token}:{self.path}"}

    def take(self) -> bool:
        """Take the lock if it is free or its owner is gone; return whether it is held now."""
        if self._token and self.held:
            return True
        self._token = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the first attempt may only clear away what a dead owner left
            try:
                self._lease.acquire(blocking=False)
                return True
            except Timeout:
                continue
        return False

    def wait(self) -> None:
        """Take the lock, however long that takes; says once who has it."""
        told = False
        while not self.take():
            if not told:
                name = f"{self.path.parent.name}/{self.path.name.split('.')[1]}"
                log.warning("%s is being computed by %s: waiting for it; to go on here, interrupt it there", name, self.owner())
                told = True
            time.sleep(POLL_SECONDS)

    def release(self, everything: bool = False) -> None:
        """Give the lock back, once for every time it was taken, or at once; an inherited one stays with its owner."""
        if not self._token:
            self._lease.release(force=everything)

    def taken(self) -> bool:
        """Whether somebody else works under this lock right now."""
        if not self.path.exists():
            return False
        free = self.take()
        if free:
            self.release()
        return not free

    def owner(self) -> str:
        """Return host and process of whoever holds the lock, in words."""
        with contextlib.suppress(OSError):
            marker = dict(line.split("=", 1) for line in self.path.read_text(encoding="utf-8").splitlines() if "=" in line)
            return f"process {marker.get('pid')} on {marker.get('host')}"
        return "nobody"

    def __enter__(self) -> "Lock":
        self.wait()
        return self

    def __exit__(self, *_) -> None:
        self.release()
