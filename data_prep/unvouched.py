"""Files on S3 whose bytes nothing vouches for: ranges of containers, and tars before they have an index.

A range has no checksum, so each is read until two answers agree. Whole objects have theirs, and are read once.
"""

from __future__ import annotations

import functools
import os
from collections import Counter

import google_crc32c

from drwkv.s3 import S3Storage
from drwkv.storage import Storage, StorageError, is_remote, open_storage

AGREEING_ATTEMPTS = 10  # reads of one range, of which two must be the same


class ReadTwice(S3Storage):
    """An S3 prefix for those who cannot check what they read: each range is right when two reads of it agree."""

    def read_range(self, name: str, start: int, size: int) -> bytes:
        seen: Counter[tuple[int, int]] = Counter()
        for _ in range(AGREEING_ATTEMPTS):
            data = super().read_range(name, start, size)
            what = len(data), google_crc32c.value(data)
            seen[what] += 1
            if seen[what] == 2:
                return data
        raise StorageError(
            f"{self.where(name)}: no two of {AGREEING_ATTEMPTS} reads of its bytes {start}..{start + size} agree; "
            "run the same command again when the network is sound"
        )


def open_unvouched(path: str | os.PathLike[str]) -> Storage:
    """The storage at a folder or S3 prefix of files whose bytes nothing vouches for."""
    return _read_twice(os.fspath(path)) if is_remote(path) else open_storage(path)


@functools.lru_cache(maxsize=16)
def _read_twice(path: str) -> ReadTwice:
    return ReadTwice(path)
