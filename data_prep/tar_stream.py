"""A tar as bytes from front to back, from any storage, once and in large pieces.

A file that is streamed rather than fetched piece by piece, which is tar_reader.py's job. What stands in the tars is
tar_samples.py's.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator

from data_prep.tar_reader import SizedReader
from drwkv.s3 import S3Storage
from drwkv.s3_checksums import DamagedTransferError
from drwkv.storage import Storage, StorageError

LOCAL_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 1 << 16  # the parts are in memory already
KEPT_PARTS = 2  # of a stream from S3: how far a reader may seek back


class _PartsReader(SizedReader):
    """The first `size` bytes of an object on S3 as a file that is read from front to back, each byte fetched once."""

    def __init__(self, storage: S3Storage, name: str, size: int) -> None:
        super().__init__(size)
        self._parts: Iterator[tuple[int, bytes]] = storage.read_parts(name, size)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_PARTS)
        self._where = storage.where(name)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._position >= self._size:
            return 0
        while not self._kept or self._position >= self._kept[-1][0] + len(self._kept[-1][1]):
            try:
                self._kept.append(next(self._parts))
            except DamagedTransferError as error:
                raise StorageError(f"{self._where}: has changed while it was read ({error})") from None
        start, data = next(part for part in reversed(self._kept) if part[0] <= self._position)
        piece = data[self._position - start :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._parts.close()  # type: ignore[attr-defined]  # read_parts is a generator: this ends its threads
        super().close()


def open_stream(storage: Storage, name: str) -> io.BufferedReader:
    """A file for reading from front to back; on S3 large parts come ahead of the reader. FileNotFoundError."""
    if isinstance(storage, S3Storage):
        return io.BufferedReader(_PartsReader(storage, name, storage.size(name)), REMOTE_BUFFER_BYTES)
    return io.BufferedReader(io.FileIO(storage.where(name)), LOCAL_BUFFER_BYTES)
