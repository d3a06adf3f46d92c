"""One run folder has one run at a time: a lease on the folder, by rank 0, with job, host, process and heartbeat."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType

from drwkv.leases import Leases, wait_sec
from drwkv.parallel.distributed import World
from drwkv.storage import open_storage

log = logging.getLogger("drwkv")
LOCK = "lock"
SETTLE_SEC = 0.5  # after a takeover, until two that take over at once have seen each other


class RunLock:
    """The lock of a run folder, from `with` to its end. Collective.

    A lock whose process is gone from this machine, or whose job is this one queued again, is taken over at once; of
    any other, the heartbeat is watched for `lock_sec`. ValueError on every rank when its run is alive.
    """

    def __init__(self, folder: Path, lock_sec: float, world: World) -> None:
        self._folder, self._lock_sec, self._world = folder, lock_sec, world
        self._job = os.environ.get("SLURM_JOB_ID")
        self._restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        about = {"job": self._job, "restarts": self._restarts, "since": time.time()}
        self._leases = Leases(open_storage(folder), ".", lease_sec=lock_sec, about=about)

    def __enter__(self) -> RunLock:
        refused = self._world.from_first(self._take() if self._world.is_first else None)
        if refused is not None:
            raise ValueError(refused)
        if self._world.is_first:
            self._leases.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.is_first:
            self._leases.__exit__()

    def lost(self) -> ValueError | None:
        """What to raise when somebody has taken the folder over; also tells the lock that the run makes progress."""
        self._leases.note_progress()
        if not self._world.is_first or self._leases.holds(LOCK):
            return None
        return ValueError(f"{self._folder}: another run has taken this folder over: {self._named()}")

    def _take(self) -> str | None:
        """None when the folder is this run's, else why it is not. Waits while its holder may be dead."""
        holder = self._leases.holder(LOCK)
        if (
            self._job is not None
            and holder.get("job") == self._job
            and holder.get("restarts") != self._restarts
        ):
            open_storage(self._folder).remove(LOCK)  # a job that is queued again has ended before
        most_sec = 1.5 * self._lock_sec
        pauses, until = wait_sec(self._lock_sec), time.monotonic() + most_sec
        told = False
        while not self._leases.claim(LOCK):
            if time.monotonic() > until:
                return (
                    f"{self._folder} is in use by {self._named()}: wait for that run to end, stop it, or give another "
                    "run.folder"
                )
            if not told:
                log.warning(
                    "%s is locked by %s: waiting up to %.0f s for that run to end, or to be without a sign of life",
                    self._folder, self._named(), most_sec,
                )  # fmt: skip
                told = True
            time.sleep(next(pauses))
        if holder:
            time.sleep(SETTLE_SEC)
            if self._leases.holder(LOCK).get("worker") != self._leases.worker:
                return f"{self._folder} has just been taken by {self._named()}"
        return None

    def _named(self) -> str:
        holder = self._leases.holder(LOCK)
        job = f"job {holder['job']}, " if holder.get("job") else ""
        return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')}"
