"""What a node's cache fetches from S3, and the fetching: one process of the node does it for all.

What is needed soonest, as the living processes say, is fetched first, as far ahead as space.py finds room for:
reading ahead needs no other rule. Waiting for what is fetched is node.py's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drwkv.data import manifest as layout
from drwkv.data.cache.folder import NOW, Place, put_in_place
from drwkv.data.cache.life import Demand
from drwkv.data.cache.space import GIB, Space
from drwkv.data.order import NEVER
from drwkv.files import write_whole
from drwkv.storage import NoSpaceError, StorageError, UnavailableError, open_storage

log = logging.getLogger("drwkv")

FETCHES = 3  # shards on their way at once, each in parallel parts; twice that when readers wait for them
RETRY_SEC, MAX_RETRY_SEC = (
    2.0,
    60.0,
)  # after a failure that nobody waits for, doubling; RETRY_SEC if somebody does
FULL_DISK_ATTEMPTS = 3  # fetches of a shard that may meet a full disk before who waits for it is told
LOOK_SEC = 1.0  # how often to see who has died

FETCHER_LOCK = "fetcher.lock"


@dataclass(frozen=True)
class Source:
    """Where the shards of one set come from."""

    url: str
    remedy: str  # what a user can do about a shard that is not that of the index
    names: list[str]
    num_bytes: np.ndarray  # (num_shards,) int64

    @classmethod
    def of(cls, folder: Path) -> Source:
        """As the set's folder in the cache says."""
        said = json.loads((folder / "source.json").read_text())
        entries = layout.shard_list_from_json((folder / layout.SHARD_LIST_NAME).read_text())
        sizes = np.array([entry.num_bytes for entry in entries], np.int64)
        return cls(said["url"], said["remedy"], [entry.name for entry in entries], sizes)

    def fetch(self, number: int, incoming: Path, target: Path) -> None:
        """Download one shard and put it in place whole. StorageError; OSError of the cache folder."""
        storage, name, expected = open_storage(self.url), self.names[number], int(self.num_bytes[number])
        try:
            try:
                found = storage.size(name)
                if found == expected:
                    storage.download(name, incoming)
                    found = incoming.stat().st_size
            except FileNotFoundError:
                raise StorageError(
                    f"{storage.where(name)} is missing, though the index lists it; {self.remedy}"
                ) from None
            if found != expected:
                raise StorageError(
                    f"{storage.where(name)} has {found} bytes, expected {expected}: the index is older than the tar; "
                    f"{self.remedy}"
                )
            put_in_place(incoming, target)
        finally:
            incoming.unlink(missing_ok=True)


class ProcessEndsError(Exception):
    """The interpreter is shutting down, and nothing can be fetched in it any more."""


@dataclass
class _Failure:
    """When to try a shard again that could not be fetched."""

    at: float
    wait_sec: float = RETRY_SEC
    in_a_row: int = 1  # failures of this shard


class Fetcher:
    """Does the fetching of one cache folder, for as long as its maker holds FETCHER_LOCK; `step` is called often."""

    def __init__(self, space: Space) -> None:
        self._space, self._folder, self._budget = space, space.folder, space.budget()
        self._sources: dict[str, Source] = {}
        self._under_way: dict[Place, Future[None]] = {}
        self._failures: dict[Place, _Failure] = {}
        self._demand: Demand = {}
        self._stamp: object = None
        self._looked = -LOOK_SEC
        self._warned = False

    def step(self) -> None:
        """Take what has come, look at the demands, begin what should be under way. Never waits for the store.

        Raises ProcessEndsError when another process should do it.
        """
        changed = self._finish()
        now, stamp = time.monotonic(), self._folder.demand_stamp()
        if stamp != self._stamp or now - self._looked >= LOOK_SEC:
            changed, self._stamp, self._looked = True, stamp, now
            living = self._folder.living()
            self._folder.clear_incoming(living)
            self._demand, self._budget = self._folder.demand(living), self._space.budget()
            self._warn_when_too_small()
        if changed or self._folder.bytes_leaving():
            self._folder.clear_leaving()
            while self._begin_nearest():
                pass

    def _begin_nearest(self) -> bool:
        """Begin the fetch of the missing shard that is needed first, if there is room for it."""
        key, number, distance = self._nearest_missing()
        if number is None or len(self._under_way) >= (2 * FETCHES if distance == NOW else FETCHES):
            return False
        place, source = (key, number), self._sources[key]
        num_bytes = int(source.num_bytes[number])
        try:
            if num_bytes > self._budget:
                raise StorageError(
                    f"{self._folder.path}: its budget of {self._budget / GIB:.3g} GiB is less than one shard of "
                    f"{source.url}, {num_bytes / GIB:.3g} GiB; raise data.cache_gib"
                )
            incoming = self._space.reserve(self._demand, num_bytes, distance)
        except StorageError as error:
            self._fail(place, str(error))
            return True
        if incoming is None:
            return False
        target = self._folder.shard_file(*place)
        self._under_way[place] = _in_thread(lambda: source.fetch(number, incoming, target))
        return True

    def _nearest_missing(self) -> tuple[str, int | None, int]:
        """Set, shard and distance of what to fetch next; (_, None, _) when nothing is."""
        best: tuple[str, int | None, int] = ("", None, NEVER)
        now = time.monotonic()
        for key, demanded in self._demand.items():
            if not len(demanded):
                continue
            distances = demanded.copy()
            held = self._folder.held_set(key)
            distances[held.numbers] = NEVER
            for (other, number), failure in self._failures.items():
                if other == key:
                    wait_sec = RETRY_SEC if distances[number] == NOW else failure.wait_sec
                    if now < failure.at + wait_sec:
                        distances[number] = NEVER
            distances[[number for other, number in self._under_way if other == key]] = NEVER
            number = int(distances.argmin())
            if distances[number] < best[2]:
                best = (key, number, int(distances[number]))
        if best[1] is not None:
            self._source(best[0])
        return best

    def _finish(self) -> bool:
        """Take note of the fetches that have ended, well or not; whether there were any."""
        ended = [(place, future) for place, future in self._under_way.items() if future.done()]
        for place, future in ended:
            del self._under_way[place]
            error = future.exception()
            if error is None:
                self._failures.pop(place, None)
                self._folder.error_file(*place).unlink(missing_ok=True)
                continue
            if isinstance(error, RuntimeError) and "interpreter shutdown" in str(
                error
            ):  # an executor's words
                raise ProcessEndsError
            if not isinstance(error, (OSError, ValueError)):
                log.error("fetching shard %d of set %s failed", place[1], place[0], exc_info=error)
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._fail(place, message, may_pass=self._may_pass(place, error))
        return bool(ended)

    def _fail(self, place: Place, message: str, *, may_pass: bool = False) -> None:
        """Try again later; tell whoever waits, unless all that is needed may be patience."""
        failure = _Failure(time.monotonic())
        if before := self._failures.get(place):
            failure.wait_sec = min(2 * before.wait_sec, MAX_RETRY_SEC)
            failure.in_a_row = before.in_a_row + 1
        self._failures[place] = failure
        if may_pass:
            log.warning("%s; trying again, as long as the reader's time limit allows", message)
            return
        with contextlib.suppress(FileNotFoundError):  # the whole set may have gone meanwhile
            write_whole(self._folder.error_file(*place), message.encode())

    def _may_pass(self, place: Place, error: BaseException) -> bool:
        """Whether patience may help: the store may answer again, and others, who filled the disk, be made room for."""
        if isinstance(error, UnavailableError):
            return True
        before = self._failures.get(place)
        return _is_full_disk(error) and (before.in_a_row if before else 0) < FULL_DISK_ATTEMPTS

    def _source(self, key: str) -> Source:
        if key not in self._sources:
            self._sources[key] = Source.of(self._folder.set_folder(key))
        return self._sources[key]

    def _warn_when_too_small(self) -> None:
        at_once = sum(
            int(self._source(key).num_bytes[distances <= 0].sum())
            for key, distances in self._demand.items()
            if len(distances)
        )
        if at_once > self._budget and not self._warned:
            self._warned = True
            log.warning(
                "%s: the shards in use at once take %.3g GiB, but the budget is %.3g GiB, so shards will be fetched "
                "again and again; raise data.cache_gib",
                self._folder.path, at_once / GIB, self._budget / GIB,
            )  # fmt: skip


def _is_full_disk(error: BaseException) -> bool:
    """Whether it says that the disk has no space left, in our words or in the system's."""
    return isinstance(error, NoSpaceError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """As an executor's submit, in a thread that does not keep a process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="drwkv-fetch", daemon=True).start()
    return future
