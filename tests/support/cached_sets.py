"""What tests of the node's cache share: how large things are, waiting until something is so, damage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from drwkv.data.cache.space import GIB

INDEX_BYTES = 64 << 10  # more than any index of these tests takes
TAR_BYTES = 20480  # of a shard of 10 samples


def room_gib(shards: float) -> float:
    """A budget for so many shards of 10 samples and the index."""
    return (shards * TAR_BYTES + INDEX_BYTES) / GIB


def eventually(condition: Callable[[], object], timeout_sec: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def flip_bit(file: Path, offset: int) -> None:
    """One bit of the byte at `offset`, counted from the end where negative."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)
