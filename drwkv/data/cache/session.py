"""One process's part in a node's cache: the thread that says what it will need, lets go, and maybe fetches.

Every process publishes its demand beside a life sign; the one that holds the fetcher's lock also fetches (fetcher.py),
and when it dies, however that is, the thread of another takes the lock over. The reading is node.py's.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from drwkv.data.cache.fetcher import FETCHER_LOCK, Fetcher, ProcessEndsError
from drwkv.data.cache.folder import NOW, CacheFolder, Place
from drwkv.data.cache.life import Demand, LifeSign
from drwkv.data.cache.locks import unlock
from drwkv.data.cache.space import Space
from drwkv.data.order import NEVER
from drwkv.storage import StorageError

if TYPE_CHECKING:
    from drwkv.data.cache.node import CachedSet

TICK_SEC = 0.05  # how soon a demand is seen, a file let go of, a dead fetcher replaced
PROBLEM_SEC = 2.0  # how long the folder may be out of order before those who wait are told
REPUBLISH_SEC = 3600.0  # how old its file may get though nothing changes: old files are taken for rubbish
PUBLISH_SEC = 1.0  # how old a published demand may get while the run goes on

# How far ahead in counters a run needs each shard of each set, from where it stands when it is asked.
Follower = Callable[[], Mapping["CachedSet", np.ndarray]]


class Session:
    """One process's part in a cache folder, from its first use of it until it closes it or ends.

    sets: those that the process has open now.
    """

    def __init__(self, folder: CacheFolder, budget_bytes: int, sets: Callable[[], list[CachedSet]]) -> None:
        self.life = LifeSign(folder.ranks, budget_bytes)
        self.space = Space(folder, self.life.id, budget_bytes)
        self._folder, self._sets = folder, sets
        self._followers: list[Follower] = []
        self._waiting: Counter[Place] = Counter()
        self._lock = threading.Lock()
        self._distances: Demand = {}  # as the followers said last
        self._published: Demand = {}
        self._published_at = -math.inf
        self._asked = -math.inf  # when the followers were asked last
        self._wake = threading.Event()
        self._problem, self._well = "", time.monotonic()  # what is wrong with the folder; when all was well
        self._fetcher: Fetcher | None = None
        self._fetcher_fd = -1
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="drwkv-cache", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def follow(self, follower: Follower) -> Iterator[None]:
        """While it lasts, `follower` is asked now and then, from this session's thread."""
        self._followers.append(follower)
        self._hurry()
        try:
            yield
        finally:
            self._followers.remove(follower)

    @contextlib.contextmanager
    def waiting(self, place: Place) -> Iterator[None]:
        """While it lasts, a reader of this process stands still for want of this shard."""
        with self._lock:
            self._waiting[place] += 1
        try:
            self.publish()
            self._hurry()
            yield
        finally:
            with self._lock:
                self._waiting[place] -= 1
                self._waiting += Counter()  # drops zeros

    def check(self) -> None:
        """For who waits: StorageError when that is in vain, RuntimeError when the thread has ended by an error."""
        if self._problem and time.monotonic() - self._well > PROBLEM_SEC:
            raise StorageError(f"{self._folder.path}: the cache folder cannot be used: {self._problem}")
        if self._closing:
            raise StorageError(f"{self._folder.path}: the process ends, nothing more is fetched")
        if not self._thread.is_alive():
            raise RuntimeError(
                f"{self._folder.path}: the cache's thread has ended by the error printed above"
            )

    def publish(self) -> None:
        """Tell the other processes what this one needs, if that has changed."""
        with self._lock:
            demand: Demand = {}
            for opened in sorted(
                self._sets(), key=lambda opened: opened.num_shards
            ):  # 0 while it is being opened
                demand[opened.key] = np.full(opened.num_shards, NEVER)
            for key in demand.keys() & self._distances.keys():
                demand[key] = np.minimum(demand[key], self._distances[key])
            for key, shard in self._waiting:
                demand[key][shard] = NOW
            now = time.monotonic()
            if not _same(demand, self._published) or now - self._published_at > REPUBLISH_SEC:
                self.life.publish(demand)
                self._published, self._published_at = demand, now

    def close(self) -> None:
        """Stop the thread and take the life sign away."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.life.end()

    def forget(self) -> None:
        """In a forked child, which has no such thread."""
        self.life.forget()
        if self._fetcher_fd >= 0:
            os.close(self._fetcher_fd)

    def _serve(self) -> None:
        while not self._closing:
            self._wake.wait(TICK_SEC)
            self._wake.clear()
            try:
                self._let_go()
                self._refresh()
                self._fetch()
            except OSError as error:  # the folder is gone, or its disk is full; it may pass
                self._problem = str(error)
            except ProcessEndsError:
                self._closing = True
            else:
                self._problem, self._well = "", time.monotonic()
        if self._fetcher_fd >= 0:
            unlock(self._fetcher_fd)
            self._fetcher_fd = -1

    def _hurry(self) -> None:
        """Ask the followers and look at the demands now."""
        self._asked = -math.inf
        self._wake.set()

    def _let_go(self) -> None:
        """Close what has been evicted, so that its space is free."""
        leaving = self._folder.shards_leaving()
        for opened in self._sets() if leaving else ():
            for key, shard in leaving:
                if key == opened.key:
                    opened.forget(shard)

    def _refresh(self) -> None:
        """Ask the followers how far the run is, and publish that, but not too often."""
        now = time.monotonic()
        if now - self._asked < PUBLISH_SEC:
            return
        self._asked, nearest = now, Demand()
        for follower in list(self._followers):
            for opened, distances in follower().items():
                others = nearest.get(opened.key, distances)
                nearest[opened.key] = np.minimum(others, distances)
        self._distances = nearest
        self.publish()

    def _fetch(self) -> None:
        if self._fetcher is None:
            fd = self._folder.try_lock(FETCHER_LOCK)
            if fd is None:
                return
            self._fetcher_fd, self._fetcher = fd, Fetcher(self.space)
        self._fetcher.step()


def _same(a: Demand, b: Demand) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
