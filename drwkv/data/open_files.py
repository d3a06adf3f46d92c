"""The files of a shard set, opened when needed, the least recently used let go; safe from any thread.

Here: files of a local folder. Those of a set on S3, which may have to be waited for, are the package cache's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

log = logging.getLogger("drwkv")

WANTED_DESCRIPTORS = 16384  # what the process's soft limit is raised to, where the hard one allows it


Copy = tuple[int, int, int]


@functools.cache
def most_open() -> int:
    """How many files one set keeps open: a quarter of the process's descriptors, its soft limit raised before.

    A batch reads hundreds of shards in rising order, epoch after epoch. With room for fewer, the least recently
    used is always the one that comes next, and every batch opens all of its files again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return WANTED_DESCRIPTORS // 4
    with contextlib.suppress(OSError, ValueError):  # a container may forbid even this
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(soft // 4, 1)


@functools.cache
def on_block_device(device: int) -> bool:
    """Whether files of this st_dev lie on a block device of this machine, and so on no network's file system."""
    return os.path.exists(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


class OpenFile:
    """A file descriptor that closes when the last thread that reads from it lets go."""

    __slots__ = ("_can_map", "_mapped", "_process", "copy", "fd")

    def __init__(self, fd: int) -> None:
        self.fd, self._process = fd, os.getpid()
        self._mapped: np.ndarray | None = None
        status = os.fstat(fd)
        self._can_map = on_block_device(status.st_dev)
        self.copy = (
            status.st_dev,
            status.st_ino,
            status.st_mtime_ns,
        )  # tells whether it is another than before

    def copy_out(
        self,
        starts: Sequence[int],
        size: int,
        target: np.ndarray,
        places: Sequence[int],
        *,
        file_bytes: int,
    ) -> list[int]:
        """Copy `size` bytes from each start in the file to each place in `target`, contiguous uint8.

        file_bytes: what the file should have. Returns the positions in `starts` of what could not be read.
        """
        mapped = self._map(file_bytes)
        if mapped is not None:
            # A fault on a cold page reads megabytes around it. Asked for before, just these pages come, and at once.
            for start in starts:
                os.posix_fadvise(self.fd, start, size, os.POSIX_FADV_WILLNEED)
            for start, place in zip(starts, places, strict=True):
                target[place : place + size] = mapped[start : start + size]
            return []
        failed, out = [], target.data
        for i, (start, place) in enumerate(zip(starts, places, strict=True)):
            try:
                num_read = os.preadv(self.fd, (out[place : place + size],), start)
            except OSError:
                num_read = -1
            if num_read != size:
                failed.append(i)
        return failed

    def _map(self, num_bytes: int) -> np.ndarray | None:
        """The file memory-mapped, which takes half the time of preads; None where that is not safe.

        What cannot be read through a mapping ends the process by SIGBUS, where pread returns an error. So only files
        on a block device of this machine are mapped, and only while they have their full size. Of a bad block there
        the process still dies; started again, it reads each sample first by pread, held against its checksum, and
        so names the sample, or in a cache mends it.
        """
        if not self._can_map or os.fstat(self.fd).st_size != num_bytes:
            return None
        if self._mapped is None:
            # Unlike Python's mmap, this keeps no second descriptor.
            path = f"/proc/self/fd/{self.fd}"
            try:
                mapped = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8)
            except (
                OSError,
                RuntimeError,
            ) as error:  # the file system cannot, or the process has too many mappings
                self._can_map = False
                log.warning(
                    "a file is read without a mapping, more slowly: %s", str(error).partition("\n")[0]
                )
                return None
            self._mapped = mapped.numpy()
        return self._mapped

    def __del__(self) -> None:
        # A child forked meanwhile may hold the same open file, and with it the lock of who opened it.
        if self._process == os.getpid():
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)


class OpenFiles:
    """Shard number -> open file. What it means to open one, and where another copy is, the kinds below say.

    limit: how many are kept open; None: most_open().
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit or most_open()
        self._open_now: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> OpenFile:
        """The shard's file; whoever reads from it holds on to it."""
        with self._lock:
            if shard in self._open_now:
                self._open_now.move_to_end(shard)
                return self._open_now[shard]
        # Opening may take long; two threads that both open it do no harm.
        file = self._open(shard)
        with self._lock:
            self._open_now[shard] = file
            if len(self._open_now) > self._limit:
                self._open_now.popitem(last=False)
        return file

    def open_again(self, shard: int) -> int:
        """A new descriptor of the shard's file, with a position of its own; the caller closes it."""
        file = self.get(shard)
        return os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def forget(self, shard: int) -> None:
        """Close the shard's file, once nobody reads from it."""
        with self._lock:
            self._open_now.pop(shard, None)

    def forget_all(self) -> None:
        """Close all of them, likewise."""
        with self._lock:
            self._open_now.clear()

    def forget_parent(self) -> None:
        """In a forked child: forget all, also where a thread of the parent held the lock."""
        self._lock = threading.Lock()
        self.forget_all()

    def fetch_again(self, shard: int, offset: int, size: int) -> Iterator[bytes]:
        """The same bytes from where they came from, as often as it is worth trying; none where that is here."""
        return iter(())

    def fetch_index_again(self) -> bool:
        """Whether a damaged index has been replaced from where it came from; never where that is here."""
        return False

    def mend(self, shard: int, offset: int, data: bytes) -> None:
        """Write bytes that `fetch_again` gave, and that are right, over those that are wrong."""

    def _open(self, shard: int) -> OpenFile:
        raise NotImplementedError


class LocalFiles(OpenFiles):
    """Files at known paths, read in place."""

    def __init__(self, paths: Sequence[str], limit: int | None = None) -> None:
        super().__init__(limit)
        self._paths = paths

    def _open(self, shard: int) -> OpenFile:
        return OpenFile(os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC))
