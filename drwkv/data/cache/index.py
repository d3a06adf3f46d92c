"""The index of a set on S3, fetched into a node's cache once, by whoever opens the set first, and checked whole.

What vouches for it is index_files.py's; a damaged download is tried again, and what stays wrong is an error.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import numpy as np

from drwkv.data import index_files
from drwkv.data import manifest as layout
from drwkv.data.cache.folder import NOW, put_in_place, set_lock
from drwkv.data.cache.space import GIB, Space
from drwkv.data.manifest import Manifest, ShardEntry
from drwkv.files import write_whole
from drwkv.storage import StorageError, no_space_is_named, open_storage

log = logging.getLogger("drwkv")

ATTEMPTS = 3  # downloads of rows that do not have their hashes
POLL_SEC = 0.1  # how often to ask for room


def fetch_index(
    url: str, manifest: Manifest, key: str, space: Space, timeout_sec: float, *, afresh: bool = False
) -> list[ShardEntry]:
    """The set's shard list; it and the index rows are in the cache afterwards, both as the manifest wants them.

    The process that owns `space` has said already that it uses the set, or others might evict the index. What the
    cache has is replaced where it is damaged, as far as that shows without reading all rows; `afresh`: in any case.
    Raises ValueError in one line: a file is missing or another, or there is no room for index and one shard.
    """
    folder = space.folder.set_folder(key)
    mark = folder / "source.json"  # written last
    with space.folder.locked(set_lock(key)), no_space_is_named(str(space.folder.path)):
        entries = None if afresh else _look(folder, manifest)
        if entries is None:
            (folder / layout.ROWS_NAME).unlink(missing_ok=True)  # who has it mapped keeps it
            try:
                entries = _download(url, manifest, folder, space, timeout_sec)
            except FileNotFoundError as error:
                raise ValueError(
                    f"{error}, though there is a manifest; {manifest.remedy(url, 'the set')}"
                ) from None
            source = {"url": url, "index_hash": manifest.index_hash, "remedy": manifest.remedy(url)}
            write_whole(mark, json.dumps(source).encode())
    index_bytes = sum((folder / name).stat().st_size for name in (layout.SHARD_LIST_NAME, layout.ROWS_NAME))
    _check_budget(f"the index and the largest shard of {url} take",
                  index_bytes + max(entry.num_bytes for entry in entries), space)  # fmt: skip
    return entries


def _look(folder: Path, manifest: Manifest) -> list[ShardEntry] | None:
    """The shard list of an index that is in the cache already; None: there is none, or it is damaged."""
    mark, text = folder / "source.json", folder / layout.SHARD_LIST_NAME
    if not mark.exists():
        return None
    try:
        entries = index_files.parse_shard_list(text.read_bytes(), manifest, str(text))
        index_files.map_rows(folder / layout.ROWS_NAME, manifest, entries, str(folder / layout.ROWS_NAME))
    except (FileNotFoundError, index_files.DamagedIndexError) as error:
        log.warning(
            "%s: a damaged index in the cache is fetched again (%s)", folder, str(error).partition(";")[0]
        )
        return None
    os.utime(mark)
    return entries


def _download(
    url: str, manifest: Manifest, folder: Path, space: Space, timeout_sec: float
) -> list[ShardEntry]:
    """Put rows and shard list into `folder`, all of them held against their hashes."""
    storage = open_storage(url)
    text = storage.read(layout.SHARD_LIST_NAME)
    entries = index_files.parse_shard_list(text, manifest, storage.where(layout.SHARD_LIST_NAME))
    where = storage.where(layout.ROWS_NAME)
    num_bytes = storage.size(layout.ROWS_NAME) + len(text)
    _check_budget(f"the index of {url} takes", num_bytes, space)
    incoming = _wait_for_room(space, num_bytes, timeout_sec)
    try:
        for attempts_left in reversed(range(ATTEMPTS)):
            storage.download(layout.ROWS_NAME, incoming)
            try:
                _check_rows(incoming, manifest, entries, where)
                break
            except index_files.DamagedIndexError:
                if not attempts_left:
                    raise
        for name in ("index", "shards"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        put_in_place(incoming, folder / layout.ROWS_NAME)
        # Not synced: its hash is looked at whenever it is read
        write_whole(folder / layout.SHARD_LIST_NAME, text)
    finally:
        incoming.unlink(missing_ok=True)
    return entries


def _check_rows(file: Path, manifest: Manifest, entries: list[ShardEntry], where: str) -> None:
    """DamagedIndexError unless all rows in `file` are right."""
    rows = index_files.map_rows(file, manifest, entries, where)
    ends = np.cumsum([entry.num_samples for entry in entries]).tolist()
    for entry, end in zip(entries, ends, strict=True):
        index_files.check_rows(rows[end - entry.num_samples : end], entry, manifest, where)


def _check_budget(what: str, num_bytes: int, space: Space) -> None:
    if num_bytes > space.budget_bytes:
        raise ValueError(
            f"config key 'data.cache_gib' is {space.budget_bytes / GIB:.3g}, but {what} {num_bytes / GIB:.3g} GiB: "
            "raise it, to hold the index and one shard for each stream that the node's ranks read, at the least"
        )


def _wait_for_room(space: Space, num_bytes: int, timeout_sec: float) -> Path:
    """Room for the index, which goes before any shard."""
    deadline = time.monotonic() + timeout_sec
    while time.monotonic() < deadline:
        demand = space.folder.demand(space.folder.living())
        if incoming := space.reserve(demand, num_bytes, NOW - 1):
            return incoming
        time.sleep(POLL_SEC)
    raise StorageError(
        f"{space.folder.path}: no room came free for an index of {num_bytes / GIB:.3g} GiB within "
        f"{timeout_sec:.0f} s; raise data.cache_gib, or give another folder by data.cache"
    )
