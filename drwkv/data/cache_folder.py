"""What lies in a node's cache folder, and who may touch it: life signs, demands, shards on their way in and out.

    CACHE/ranks/ID.lock          locked while the process ID lives
    CACHE/ranks/ID.npz           its demand: for each set, how far ahead in counters it needs each shard
    CACHE/sets/KEY/source.json   which set this is; touched whenever it is opened
    CACHE/sets/KEY/index/...     its shard list and index rows, checked
    CACHE/sets/KEY/shards/7.tar  shard number 7, whole; 7.error: why it could not be fetched
    CACHE/incoming/ID.SIZE.n     on its way in; holds SIZE bytes of the budget from the start
    CACHE/leaving/...            evicted; holds its bytes until its last reader lets go
    CACHE/fetcher.lock           held by the process that fetches
    CACHE/space.lock             held for the moment in which space is taken

Locks are flock's, which end with their process however it ends. So nothing has to be cleaned up by the one who
is killed, and everything here is either whole or known to be somebody's who lives.

What is fetched and evicted when is fetcher.py's; reading is cache.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drwkv.files import write_whole
from drwkv.storage import StorageError

NOW = -1  # the distance of a shard that a reader waits for

Demand = dict[
    str, np.ndarray
]  # set key -> (num_shards,) int64 distances: counters until each shard is needed
Place = tuple[str, int]  # a set's key and a shard's number


@dataclass(frozen=True)
class HeldShard:
    """A whole shard in the cache."""

    key: str  # of its set
    number: int  # in the set's shard list
    num_bytes: int


@dataclass(frozen=True)
class HeldSet:
    """A set of which anything is in the cache."""

    key: str
    opened: float  # when last, seconds since 1970
    index_bytes: int
    shards: list[HeldShard]

    @property
    def num_bytes(self) -> int:
        return self.index_bytes + sum(shard.num_bytes for shard in self.shards)


class LifeSign:
    """A locked file that says that this process lives, and beside it what the process needs."""

    def __init__(self, ranks: Path) -> None:
        self.id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._demand = ranks / f"{self.id}.npz"
        self._lock = ranks / f"{self.id}.lock"
        # Locked before it has its name, or another process could take it for one of the dead.
        unnamed = ranks / f".{self.id}"
        self._fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.rename(unnamed, self._lock)

    def publish(self, demand: Demand) -> None:
        """Replace what this process says that it needs."""
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **demand)
        write_whole(self._demand, stream.getvalue())

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


class CacheFolder:
    """The folder itself; every method is safe from any thread and process of the node."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.ranks, self.sets = self.path / "ranks", self.path / "sets"
        self.incoming, self.leaving = self.path / "incoming", self.path / "leaving"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.ranks, self.sets, self.incoming, self.leaving):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be the cache folder: {error.strerror}; give another by data.cache"
            ) from None
        status = self.path.stat()
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise StorageError(
                f"{self.path}: others may write here, so it cannot be the cache folder: "
                "chmod go-w it, or give another by data.cache"
            )
        self._count = itertools.count()

    def set_folder(self, key: str) -> Path:
        return self.sets / key

    def shard_file(self, key: str, number: int) -> Path:
        return self.sets / key / "shards" / f"{number}.tar"

    def error_file(self, key: str, number: int) -> Path:
        return self.sets / key / "shards" / f"{number}.error"

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Wait for a lock file of this folder and hold it."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def try_lock(self, name: str) -> int | None:
        """The descriptor that holds a lock file of this folder until it is closed; None: another holds it."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _take(fd, fcntl.LOCK_EX):
            return fd
        os.close(fd)
        return None

    def living(self) -> list[str]:
        """Ids of the processes that live; what the dead left behind is taken away."""
        living = []
        for lock in sorted(self.ranks.glob("*.lock")):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if not _take(fd, fcntl.LOCK_EX):
                        living.append(lock.stem)
                        continue
                    for left_behind in (*self.ranks.glob(f"{lock.stem}.npz*"), lock):
                        left_behind.unlink(missing_ok=True)
                finally:
                    os.close(fd)
        return living

    def demand(self, living: list[str]) -> Demand:
        """The least distance at which any of these processes needs each shard."""
        nearest: Demand = {}
        for rank in living:
            with (
                contextlib.suppress(FileNotFoundError),
                np.load(self.ranks / f"{rank}.npz", allow_pickle=False) as demand,
            ):
                for key in demand.files:
                    theirs, others = demand[key], nearest.get(key)
                    # Empty: the set is being opened, and how many shards it has is not known yet.
                    if others is None or not len(others):
                        nearest[key] = theirs
                    elif len(theirs):
                        nearest[key] = np.minimum(others, theirs)
        return nearest

    def demand_stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever any process publishes, begins or ends; cheap enough to ask often."""
        stamp = []
        for entry in os.scandir(self.ranks):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                stamp.append((entry.name, status.st_ino, status.st_mtime_ns))
        return tuple(sorted(stamp))

    def held(self) -> list[HeldSet]:
        """Everything whole that the cache holds."""
        return [self.held_set(entry.name) for entry in os.scandir(self.sets) if entry.is_dir()]

    def bytes_leaving(self) -> int:
        return sum(size for _, size in _files(self.leaving))

    def bytes_incoming(self) -> int:
        return sum(int(name.split(".")[1]) for name, _ in _files(self.incoming))

    def used_bytes(self) -> int:
        """All that counts against the budget: what is whole, on its way in, and on its way out."""
        # In this order what is put in place meanwhile may count twice, but cannot be missed.
        incoming = self.bytes_incoming()
        return incoming + sum(held.num_bytes for held in self.held()) + self.bytes_leaving()

    def new_incoming(self, owner: str, num_bytes: int) -> Path:
        """An empty file that stands for `num_bytes` until it is renamed or removed; under space.lock."""
        path = self.incoming / f"{owner}.{num_bytes}.{next(self._count)}"
        path.touch(mode=0o600)
        return path

    def free_bytes(self) -> int:
        """What the disk still has for us, less what files on their way in have yet to take of it."""
        to_come = sum(max(int(name.split(".")[1]) - size, 0) for name, size in _files(self.incoming))
        return shutil.disk_usage(self.path).free - to_come

    def clear_incoming(self, living: list[str]) -> None:
        """Remove what dead processes were fetching."""
        for name, _ in _files(self.incoming):
            if name.split(".")[0] not in living:
                (self.incoming / name).unlink(missing_ok=True)

    def evict(self, shard: HeldShard) -> None:
        """Take a shard out of readers' sight; its bytes are free once the last has closed it."""
        target = self.leaving / f"{shard.key}.{shard.number}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.shard_file(shard.key, shard.number), target)

    def remove_set(self, key: str) -> None:
        """Remove a set without shards, which no living process has open; under space.lock."""
        shutil.rmtree(self.set_folder(key), ignore_errors=True)

    def shards_leaving(self) -> set[Place]:
        """(set key, shard number) of what readers should close."""
        found = set()
        for name, _ in _files(self.leaving):
            key, number, _ = name.split(".")
            found.add((key, int(number)))
        return found

    def clear_leaving(self) -> None:
        """Remove what has been evicted and is read by nobody any more."""
        for name, _ in _files(self.leaving):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.leaving / name, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _take(fd, fcntl.LOCK_EX):
                        os.unlink(self.leaving / name)
                finally:
                    os.close(fd)

    def held_set(self, key: str) -> HeldSet:
        """What of one set is whole."""
        folder = self.set_folder(key)
        shards = [
            HeldShard(key, int(name.removesuffix(".tar")), size)
            for name, size in _files(folder / "shards")
            if name.endswith(".tar")
        ]
        index_bytes = sum(size for _, size in _files(folder / "index"))
        with contextlib.suppress(FileNotFoundError):
            return HeldSet(key, (folder / "source.json").stat().st_mtime, index_bytes, shards)
        return HeldSet(key, 0.0, index_bytes, shards)


def open_shared(path: Path) -> int:
    """A descriptor of a file of the cache that keeps it from being removed; FileNotFoundError: it is not there."""
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if _take(fd, fcntl.LOCK_SH) and os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # it was removed just now


def _take(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files of one folder; those that vanish meanwhile are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat().st_size))
    return found
