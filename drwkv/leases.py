"""Who works on which unit: advisory leases with a heartbeat, by files in the storage that the work goes to.

A lease is a small file that one worker makes, if it is not there (a hard link in a folder, a conditional PUT on S3),
and writes anew while it works. Nobody compares clocks: a lease is given up for dead when a watcher has seen it
unchanged for `lease_sec` of its own time, or at once when its process ran on this machine and is gone. Two workers
that take the same unit all the same do harmless double work, for a unit's bytes are fixed and its rename commits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drwkv.storage import Storage, StorageError

log = logging.getLogger("drwkv")

BEATS_PER_LEASE = 4  # a lease is renewed this often within lease_sec
STALLED_LEASES = 20  # times lease_sec without progress, after which a worker's leases are renewed no more
MOST_WAIT_SEC = 10.0  # for the last beat, at the end
MAX_PAUSE_SEC = 2.0  # between looks at what others hold


class Leases:
    """The leases that this worker holds, and its view of others'.

    Example:
        with Leases(storage, "index/claims", lease_sec=60) as leases:
            if leases.claim("shard-000003"):
                ...
                leases.release("shard-000003")
    """

    def __init__(
        self, storage: Storage, folder: str, *, lease_sec: float, about: dict[str, Any] | None = None
    ) -> None:
        if lease_sec <= 0:
            raise ValueError(f"lease_sec is {lease_sec}, give a time above 0")
        self._storage, self._folder, self._lease_sec = storage, folder, lease_sec
        self._owner = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._owner |= {"host": socket.gethostname(), "worker": secrets.token_hex(8), **(about or {})}
        self._held: dict[str, int] = {}  # unit -> beats
        self._seen: dict[str, tuple[bytes, float]] = {}  # unit -> (its lease, when first seen so)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._progress = time.monotonic()
        self._beating = threading.Thread(target=self._beat, name="drwkv-leases", daemon=True)

    @property
    def worker(self) -> str:
        """What tells this worker from all others."""
        return str(self._owner["worker"])

    def __enter__(self) -> Leases:
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._beating.join(MOST_WAIT_SEC)  # it may hang with its storage
        for unit in list(self._held):
            # A lease that stays is given up for dead by others in time.
            with contextlib.suppress(StorageError, OSError):
                self.release(unit)

    def claim(self, unit: str) -> bool:
        """Whether the unit is now this worker's."""
        name = self._name(unit)
        if self._storage.write_new(name, self._text(0)):
            with self._lock:
                self._held[unit] = 0
            self.note_progress()
            return True
        if not self._is_dead(unit):
            return False
        log.info("%s: its worker is gone, its unit is taken over", self._storage.where(name))
        self._storage.remove(name)
        self._seen.pop(unit, None)
        return self.claim(unit)

    def note_progress(self) -> None:
        """Say that the work goes on: a worker that hangs must not keep its units for ever."""
        self._progress = time.monotonic()

    def release(self, unit: str) -> None:
        """Give the unit back, done or not; nothing happens if it is not this worker's any more."""
        with self._lock:
            if self._held.pop(unit, None) is None:
                return
        self._storage.remove(self._name(unit))

    def holds(self, unit: str) -> bool:
        """Whether the unit is still this worker's, as far as the last beat has seen."""
        return unit in self._held

    def holder(self, unit: str) -> dict[str, Any]:
        """What the lease says of its worker: host, pid and what that one said `about` itself; {} if it is not there."""
        try:
            return dict(json.loads(self._storage.read(self._name(unit))))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def _is_dead(self, unit: str) -> bool:
        try:
            lease = self._storage.read(self._name(unit))
        except FileNotFoundError:
            return False
        if _is_gone(lease):
            return True
        before, since = self._seen.get(unit, (None, 0.0))
        if lease != before:
            self._seen[unit] = (lease, time.monotonic())
            return False
        return time.monotonic() - since > self._lease_sec

    def _beat(self) -> None:
        while not self._over.wait(self._lease_sec / BEATS_PER_LEASE):
            if time.monotonic() - self._progress > STALLED_LEASES * self._lease_sec:
                continue
            for unit in list(self._held):
                with self._lock:
                    if unit not in self._held:
                        continue
                    # One lost beat is no harm, and a store that is gone is the main thread's to report.
                    with contextlib.suppress(StorageError, OSError):
                        if self.holder(unit).get("worker", self._owner["worker"]) != self._owner["worker"]:
                            log.warning("%s was taken over by another worker", self._name(unit))
                            del self._held[unit]
                            continue
                        self._held[unit] += 1
                        self._storage.write(self._name(unit), self._text(self._held[unit]))

    def _name(self, unit: str) -> str:
        return f"{self._folder}/{unit}"

    def _text(self, beat: int) -> bytes:
        return (json.dumps(self._owner | {"beat": beat}) + "\n").encode()


def _is_gone(lease: bytes) -> bool:
    """Whether the lease is of a process that ran on this machine and has ended."""
    try:
        owner = json.loads(lease)
        if owner["machine"] != _machine():
            return False
        started = _started(owner["pid"])
    except (ValueError, KeyError, TypeError):
        return False  # damaged or of another version: time will tell
    return started is None or started != owner["started"]


def _machine() -> str:
    """This boot of this machine, as this process sees it: numbers of processes mean the same where it is the same."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {secrets.token_hex(8)}"


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def wait_sec(lease_sec: float) -> Iterator[float]:
    """How long to wait between looks at units that others hold: from a tenth of a second up to MAX_PAUSE_SEC."""
    pause = 0.1
    while True:
        yield pause
        pause = min(2 * pause, lease_sec / BEATS_PER_LEASE, MAX_PAUSE_SEC)
