"""A process's sign of life in a node's cache folder, with what it needs of the cache, for who fetches.

Whose signs there are, and what they say together, folder.py knows.
"""

from __future__ import annotations

import fcntl
import io
import os
import secrets
from pathlib import Path

import numpy as np

from drwkv.files import write_whole

Demand = dict[
    str, np.ndarray
]  # set key -> (num_shards,) int64 distances: counters until each shard is needed


class LifeSign:
    """A locked file that says that this process lives, and beside it what the process needs.

    budget_bytes: what it lets the cache hold; of all the living, the one that allows the most decides.
    """

    def __init__(self, ranks: Path, budget_bytes: int = 0) -> None:
        self.id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._demand = ranks / f"{self.id}.npz"
        self._lock = ranks / f"{self.id}.lock"
        # Locked before it has its name, or another process could take it for one of the dead.
        unnamed = ranks / f".{self.id}"
        self._fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.write(self._fd, str(budget_bytes).encode())
        os.rename(unnamed, self._lock)

    def publish(self, demand: Demand) -> None:
        """Replace what this process says that it needs; both files are new to who tidies up old ones."""
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **demand)
        write_whole(self._demand, stream.getvalue())
        os.utime(self._fd)

    def end(self) -> None:
        """Take the sign away: the process needs nothing any more."""
        self._demand.unlink(missing_ok=True)
        self._lock.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Close the file without a word, as a forked child does with its parent's sign."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
