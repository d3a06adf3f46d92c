"""Folders for what waits on its way: gone with the process that made them, also when it was killed.

A folder belongs to the process that holds its lock; the kernel drops the lock with the process, and the next one that
makes a folder in the same place takes away those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from drwkv.storage import NoSpaceError

PREFIX = "drwkv-scratch-"
_BEGUN = "begun"  # a file that is there once the lock is held


class Scratch:
    """A new folder below `parent` (None: the system's temporary folder), removed by `close` or with the process."""

    def __init__(self, parent: str | None) -> None:
        place = Path(parent or tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / _BEGUN).touch()
        self.close = weakref.finalize(self, _remove, self.path, self._lock)

    def require_free(self, num_bytes: int, *, key: str) -> None:
        """NoSpaceError that names the config `key` unless so many bytes are free here."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise NoSpaceError(
                f"{self.path.parent}: {free / 1e6:.0f} MB are free and {num_bytes / 1e6:.0f} MB wanted for files on "
                f"their way: free some space, or give {key} another folder"
            )


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _sweep(place: Path) -> None:
    """Remove the folders whose processes are gone."""
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, somebody else's, or has just gone
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (path / _BEGUN).exists():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
