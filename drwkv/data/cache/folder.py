"""What lies in a node's cache folder, and who may touch it: life signs, demands, shards on their way in and out.

    CACHE/ranks/ID.lock          locked while the process ID lives; the bytes that it lets the cache hold
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

What is fetched and evicted when is fetcher.py's; reading is node.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drwkv.data.cache.life import Demand
from drwkv.data.cache.locks import take, unlock
from drwkv.storage import StorageError

MTIME_TICK_NS = 20_000_000  # how coarse the clock of a file system may be, and more
NOW = -1  # the distance of a shard that a reader waits for

Place = tuple[str, int]  # a set's key and a shard's number


@dataclass(frozen=True)
class HeldSet:
    """A set of which anything is in the cache: its index, and its whole shards."""

    key: str
    opened: float  # when last, seconds since 1970
    index_bytes: int
    numbers: np.ndarray  # (N,) int64: which of the set's shards
    shard_bytes: np.ndarray  # (N,) int64

    @property
    def num_bytes(self) -> int:
        return self.index_bytes + int(self.shard_bytes.sum())


@dataclass(frozen=True)
class _Listing:
    """The shards in one folder, good until the folder changes."""

    stamp: int  # st_mtime_ns of the folder; 0: it may have changed in the same tick, look again
    sizes: dict[str, int]  # file name -> bytes
    numbers: np.ndarray  # (N,) int64
    num_bytes: np.ndarray  # (N,) int64


_NOTHING = _Listing(0, {}, np.zeros(0, np.int64), np.zeros(0, np.int64))


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
        self._listings: dict[Path, _Listing] = {}

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
            unlock(fd)

    def try_lock(self, name: str) -> int | None:
        """The descriptor that holds a lock file of this folder until `unlock`; None: another holds it."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if take(fd, fcntl.LOCK_EX):
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
                    if not take(fd, fcntl.LOCK_EX):
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

    def largest_budget(self) -> int:
        """The most bytes that any process of those with a life sign lets the cache hold."""
        largest = 0
        for lock in self.ranks.glob("*.lock"):
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, int(lock.read_text() or 0))
        return largest

    def demand_stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever any process publishes or ends; cheap enough to ask often."""
        stamp = []
        for entry in os.scandir(self.ranks):
            if not entry.name.endswith(".npz"):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                stamp.append((entry.name, status.st_ino, status.st_mtime_ns))
        return tuple(sorted(stamp))

    def held(self) -> list[HeldSet]:
        """Everything whole that the cache holds."""
        return [self.held_set(entry.name) for entry in os.scandir(self.sets) if entry.is_dir()]

    def bytes_leaving(self) -> int:
        return sum(status.st_size for _, status in _files(self.leaving))

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
        # A download gives its file the full size at once: only the blocks tell what it has taken.
        to_come = sum(
            max(int(name.split(".")[1]) - 512 * status.st_blocks, 0) for name, status in _files(self.incoming)
        )
        return shutil.disk_usage(self.path).free - to_come

    def clear_incoming(self, living: list[str]) -> None:
        """Remove what dead processes were fetching."""
        for name, _ in _files(self.incoming):
            if name.split(".")[0] not in living:
                (self.incoming / name).unlink(missing_ok=True)

    def evict(self, place: Place) -> None:
        """Take a shard out of readers' sight; its bytes are free once the last has closed it."""
        key, number = place
        target = self.leaving / f"{key}.{number}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.shard_file(key, number), target)

    def remove_set(self, key: str) -> None:
        """Remove a set without shards, unless a living process has it open or is about to.

        Who opens a set says so first, and then looks at what is here while it holds the set's lock.
        """
        fd = self.try_lock(set_lock(key))
        if fd is None:
            return
        try:
            if key not in self.demand(self.living()):
                shutil.rmtree(self.set_folder(key), ignore_errors=True)
        finally:
            unlock(fd)

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
                    if take(fd, fcntl.LOCK_EX):
                        os.unlink(self.leaving / name)
                finally:
                    os.close(fd)

    def held_set(self, key: str) -> HeldSet:
        """What of one set is whole."""
        folder = self.set_folder(key)
        listing = self._list_shards(folder / "shards")
        index_bytes = sum(status.st_size for _, status in _files(folder / "index"))
        opened = 0.0
        with contextlib.suppress(FileNotFoundError):
            opened = (folder / "source.json").stat().st_mtime
        return HeldSet(key, opened, index_bytes, listing.numbers, listing.num_bytes)

    def _list_shards(self, folder: Path) -> _Listing:
        """The shards in a folder, read again only when it has changed, and then only what is new in it."""
        known, now = self._listings.get(folder, _NOTHING), time.time_ns()
        try:
            stamp = os.stat(folder).st_mtime_ns
            if known.stamp == stamp:
                return known
            names = {name for name in os.listdir(folder) if name.endswith(".tar")}
        except FileNotFoundError:
            self._listings.pop(folder, None)
            return _NOTHING
        if stamp > now - MTIME_TICK_NS:
            stamp = 0
        if names == known.sizes.keys():
            listing = dataclasses.replace(known, stamp=stamp)
        else:
            sizes = {name: num_bytes for name, num_bytes in known.sizes.items() if name in names}
            for name in names - sizes.keys():
                with contextlib.suppress(FileNotFoundError):
                    sizes[name] = (folder / name).stat().st_size
            numbers = np.array([int(name.removesuffix(".tar")) for name in sizes], np.int64)
            listing = _Listing(stamp, sizes, numbers, np.array(list(sizes.values()), np.int64))
        self._listings[folder] = listing
        return listing


def set_lock(key: str) -> str:
    """The lock file of a set, held by who fetches its index or removes it."""
    return f"sets/{key}.lock"


def put_in_place(incoming: Path, target: Path) -> None:
    """Rename what has come whole, once it is on the disk: after a power cut a name alone would vouch for it."""
    with open(incoming, "rb") as file:
        os.fsync(file.fileno())
    os.replace(incoming, target)


def _files(folder: Path) -> list[tuple[str, os.stat_result]]:
    """The files of one folder with their status; those that vanish meanwhile are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat()))
    return found
