"""Tars on any storage, scanned by their headers: a seekable reader over ranged reads, and its members.

    with open_range(storage, "shard-000000.tar") as reader:
        for member in tar_members(reader, where=storage.where("shard-000000.tar")):
            member.name, member.offset_data, member.size

What the members mean is index.py's and sources/'s.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

from drwkv.storage import Storage, is_remote

LOCAL_READAHEAD = 4 << 10  # bytes: a page holds a header, and bodies are not read
REMOTE_READAHEAD = 1 << 20  # bytes: a request takes about as long as this much data


class SizedReader(io.RawIOBase):
    """A file of known size that can be read and sought in; what it holds is its kind's `readinto`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position


class _RangeReader(SizedReader):
    """Bytes [start, start + size) of a file as a file of their own."""

    def __init__(self, storage: Storage, name: str, start: int, size: int) -> None:
        super().__init__(size)
        self._storage, self._name, self._start = storage, name, start

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self._size - self._position)
        if size <= 0:
            return 0
        data = self._storage.read_range(self._name, self._start + self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_range(
    storage: Storage, name: str, *, start: int = 0, size: int | None = None, readahead: int | None = None
) -> io.BufferedReader:
    """Bytes [start, start + size) of a file, to its end if `size` is None, as a seekable binary file.

    Each request reads `readahead` bytes, or more when more are asked for at once; None takes what suits the
    scan of headers: LOCAL_READAHEAD, or REMOTE_READAHEAD on S3. Position 0 is `start`. FileNotFoundError.
    """
    end = storage.size(name)
    size = end - start if size is None else min(size, end - start)
    if readahead is None:
        readahead = REMOTE_READAHEAD if is_remote(storage.path) else LOCAL_READAHEAD
    return io.BufferedReader(_RangeReader(storage, name, start, size), readahead)


def tar_members(reader: io.BufferedReader, *, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in file order; their bodies are skipped by seeking.

    `offset_data` counts from the reader's position 0. The caller may read from `reader` between two members.
    Raises ValueError naming `where`: not a tar, broken, or cut short. tarfile alone takes a header that is cut
    or broken for the end of the tar, so the mark of the end is looked for.
    """
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # they pile up, a kilobyte each
                if member.isfile():
                    yield member
            reader.seek(tar.offset)
            end = reader.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise ValueError(f"{where}: not a whole tar ({error}); fetch or write it again") from None
    if end != tarfile.NUL * tarfile.BLOCKSIZE:
        what = f"ends at byte {tar.offset} without the mark of its end"
        raise ValueError(f"{where}: not a whole tar ({what}); fetch or write it again")
