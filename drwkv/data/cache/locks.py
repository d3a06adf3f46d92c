"""Locks on open files, by flock: they end with their process, however it ends.

A forked child holds its parent's open files, and so its locks. Who gives a lock up therefore says so before the file is
closed, and a child closes what it did not open without a word.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def open_shared(path: Path) -> int:
    """A descriptor of a file of the cache that keeps it from being removed; FileNotFoundError: it is not there."""
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if take(fd, fcntl.LOCK_SH) and os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # it was removed just now


def take(fd: int, kind: int) -> bool:
    """Whether the lock (LOCK_SH or LOCK_EX) could be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Give a lock up and close its descriptor. A child forked meanwhile keeps the file open, but not the lock."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
