"""The reading side of a node's cache: a set's shards, opened when they are there, or waited for until they are.

What the rest of a cache is, the package says.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import random
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from drwkv.data.cache.folder import CacheFolder
from drwkv.data.cache.index import fetch_index
from drwkv.data.cache.locks import open_shared
from drwkv.data.cache.session import Follower, Session
from drwkv.data.cache.space import GIB
from drwkv.data.manifest import Manifest, ShardEntry
from drwkv.data.open_files import OpenFile, OpenFiles
from drwkv.storage import StorageError, open_storage

log = logging.getLogger("drwkv")

DEFAULT_GIB = 64.0  # budget of a cache
DEFAULT_TIMEOUT_SEC = 540.0  # longest wait for a shard
POLL_SEC = 0.01  # how often a waiting reader looks
SAMPLE_ATTEMPTS = 6  # ranged reads of a sample that has not its checksum
BACKOFF_SEC, MAX_BACKOFF_SEC = 0.1, 5.0  # between them: the n-th is uniform in [0, min(MAX, BACKOFF 2^n)]


def default_folder() -> str:
    """$DRWKV_CACHE, or a folder of this user's beside the temporary files."""
    return os.environ.get("DRWKV_CACHE") or os.path.join(tempfile.gettempdir(), f"drwkv-cache-{os.getuid()}")


@functools.lru_cache(maxsize=8)
def open_cache(
    folder: str, budget_gib: float = DEFAULT_GIB, timeout_sec: float = DEFAULT_TIMEOUT_SEC
) -> NodeCache:
    """The process's one NodeCache of a folder, budget and time limit, open until the process ends."""
    return NodeCache(folder, budget_gib, timeout_sec=timeout_sec)


class NodeCache:
    """A cache folder, as one process uses it.

    folder: on a local disk, for flock must work; None: default_folder(). budget_gib: most GiB that it may hold,
    files on their way included; where runs share the folder, the largest of their budgets holds. timeout_sec: how
    long a reader waits for a shard before it gives up.
    Raises StorageError when the folder cannot be made or others may write there.
    """

    def __init__(
        self,
        folder: str | None = None,
        budget_gib: float = DEFAULT_GIB,
        *,
        timeout_sec: float = DEFAULT_TIMEOUT_SEC,
    ) -> None:
        if not budget_gib > 0:
            raise ValueError(f"config key 'data.cache_gib' is {budget_gib}, give more than 0")
        if not timeout_sec > 0:
            raise ValueError(f"config key 'data.timeout_sec' is {timeout_sec}, give more than 0")
        self.folder = CacheFolder(folder or default_folder())
        self.budget_bytes, self.timeout_sec = int(budget_gib * GIB), timeout_sec
        self._sets: weakref.WeakSet[CachedSet] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._session: Session | None = None
        _caches.add(self)
        atexit.register(self.close)

    def open_set(self, url: str, manifest: Manifest) -> CachedSet:
        """The set at `url`, its index fetched and checked. ValueError in one line when it is not sound."""
        url = url.rstrip("/")
        opened = CachedSet(self, url, _key(url, manifest.index_hash), manifest)
        with self._lock:
            self._sets.add(opened)
        # From here on the set has a living user, and nobody removes its index.
        session = self.session()
        session.publish()
        opened.learn(fetch_index(url, manifest, opened.key, session.space, self.timeout_sec))
        session.publish()
        return opened

    def open_sets(self) -> list[CachedSet]:
        """Those of this process that are in use."""
        with self._lock:
            return list(self._sets)

    @contextlib.contextmanager
    def follow(self, follower: Follower) -> Iterator[None]:
        """While it lasts, `follower` is asked now and then, from another thread, how far ahead shards are needed.

        It returns for each CachedSet (num_shards,) int64 counters from now on, NEVER for never.
        """
        with self.session().follow(follower):
            yield

    def session(self) -> Session:
        """This process's part in the cache: a forked child has its own."""
        with self._lock:
            if self._session is None:
                self._session = Session(self.folder, self.budget_bytes, self.open_sets)
            return self._session

    def close(self) -> None:
        """End this process's part: its demands are dropped, and another process fetches."""
        atexit.unregister(self.close)
        with self._lock:
            session, self._session = self._session, None
        if session:
            session.close()
        for opened in self.open_sets():
            opened.forget_all()

    def forget_parent(self) -> None:
        """In a forked child: let go of the files whose locks would speak for the parent."""
        self._lock = threading.Lock()
        session, self._session = self._session, None
        if session:
            session.forget()
        for opened in self.open_sets():
            opened.forget_parent()


class CachedSet(OpenFiles):
    """The files of one set: its index in `folder`, its shards when they are asked for."""

    def __init__(self, cache: NodeCache, url: str, key: str, manifest: Manifest) -> None:
        super().__init__()
        self._manifest = manifest
        self.cache, self.url, self.key = cache, url, key
        self.folder = cache.folder.set_folder(key)
        self.num_shards = 0
        self._names: list[str] = []

    def learn(self, entries: list[ShardEntry]) -> None:
        """What shards there are, once the index is known."""
        self._names, self.num_shards = [entry.name for entry in entries], len(entries)

    def open_again(self, shard: int) -> int:
        """As OpenFiles does; the file stays in the cache until this is closed."""
        file = self.get(shard)  # which keeps it there meanwhile
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    def fetch_again(self, shard: int, offset: int, size: int) -> Iterator[bytes]:
        """The same bytes from S3 itself, again and again with exponential backoff and jitter."""
        storage = open_storage(self.url)
        with contextlib.suppress(FileNotFoundError):
            for attempt in range(SAMPLE_ATTEMPTS):
                if attempt:
                    time.sleep(random.uniform(0, min(MAX_BACKOFF_SEC, BACKOFF_SEC * 2**attempt)))
                yield storage.read_range(self._names[shard], offset, size)

    def fetch_index_again(self) -> bool:
        """Replace what the cache has of the index; true. ValueError where it does not come right."""
        fetch_index(
            self.url,
            self._manifest,
            self.key,
            self.cache.session().space,
            self.cache.timeout_sec,
            afresh=True,
        )
        return True

    def mend(self, shard: int, offset: int, data: bytes) -> None:
        """Write what came right over what was wrong in the cached file, if that is still there and can be written."""
        file = self.cache.folder.shard_file(self.key, shard)
        try:
            fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, data, offset)
            finally:
                os.close(fd)
        except FileNotFoundError:
            pass  # evicted meanwhile
        except OSError as error:
            log.warning("%s: cannot be mended: %s", file, error)

    def _open(self, shard: int) -> OpenFile:
        """The shard's file, at once or when it has come. StorageError: it cannot be fetched, or not in time."""
        path = self.cache.folder.shard_file(self.key, shard)
        try:
            try:
                return OpenFile(open_shared(path))
            except FileNotFoundError:
                return self._wait_for(shard, path)
        except OSError as error:
            folder = self.cache.folder.path
            raise StorageError(f"{folder}: the cache folder cannot be used: {error}") from None

    def _wait_for(self, shard: int, path: Path) -> OpenFile:
        session, since = self.cache.session(), time.time()
        with session.waiting((self.key, shard)):
            while time.time() - since < self.cache.timeout_sec:
                with contextlib.suppress(FileNotFoundError):
                    return OpenFile(open_shared(path))
                self._check_fetched(shard, since)
                session.check()
                if _thread.ended.is_set():
                    raise StorageError(f"{self.url}/{self._names[shard]}: nobody waits for it any more")
                time.sleep(POLL_SEC)
        raise StorageError(
            f"{self.url}/{self._names[shard]} did not come into the cache {self.cache.folder.path} within "
            f"{self.cache.timeout_sec:.0f} s; look whether the store answers, and run the command again"
        )

    def _check_fetched(self, shard: int, since: float) -> None:
        """StorageError with the fetcher's own words, if it has failed after `since`."""
        file = self.cache.folder.error_file(self.key, shard)
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime >= since - 0.02:  # the file system's clock ticks more coarsely
                raise StorageError(file.read_text())


def give_up_when(ended: threading.Event) -> None:
    """From now on this thread does not wait for shards once `ended` is set: for threads that read ahead."""
    _thread.ended = ended


def _key(url: str, index_hash: str) -> str:
    """A set that is replaced under its name is another set."""
    return hashlib.sha256(f"{url}\n{index_hash}".encode()).hexdigest()[:32]


class _Thread(threading.local):
    """What is so for each thread apart."""

    def __init__(self) -> None:
        self.ended = threading.Event()  # never set, unless give_up_when gives another


_thread = _Thread()
_caches: weakref.WeakSet[NodeCache] = weakref.WeakSet()


def _in_forked_child() -> None:
    for cache in list(_caches):
        cache.forget_parent()


os.register_at_fork(after_in_child=_in_forked_child)
