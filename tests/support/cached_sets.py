"""What tests of the node's cache share: sizes, waiting, damage, and processes that read and what they should read."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
from processes import Finished, Group

from drwkv.data.cache.folder import CacheFolder
from drwkv.data.cache.space import GIB
from drwkv.data.loader import DataConfig, open_data

INDEX_BYTES = 64 << 10  # more than any index of these tests takes
TAR_BYTES = 20480  # of a shard of 10 samples
RANK = "tests/support/reading_rank.py"


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


def write_job(
    tmp_path: Path, url: str, *, shards: int, num_batches: int, batch_size: int = 16, **data: object
) -> Path:
    """A job for reading_rank.py; what rank r reads goes to `read-r` beside it."""
    job = {
        "data": {
            "paths": [url], "streams": 4, "window": 16, "workers": 2,
            "cache": str(tmp_path / "cache"), "cache_gib": room_gib(shards), **data,
        },
        "batch_size": batch_size,
        "start": 0,
        "num_batches": num_batches,
        "out": str(tmp_path / "read-{rank}"),
    }  # fmt: skip
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    return file


def what_was_read(tmp_path: Path, ranks: range) -> list[tuple[int, int, int, int]]:
    """(n, sample id, label, crc32c of x) of all these ranks; each rank's in the order in which it came."""
    return [
        (int(n), int(sample_id), int(label), int(crc))
        for rank in ranks
        for n, sample_id, label, crc in map(str.split, (tmp_path / f"read-{rank}").read_text().splitlines())
    ]


def what_should_be_read(
    folder: str, num_batches: int, world_size: int, batch_size: int = 16
) -> list[tuple[int, ...]]:
    """The same from the local set, by the same law; rank by rank."""

    class Place:
        size = world_size

        def __init__(self, rank: int) -> None:
            self.rank = rank

    data = open_data(DataConfig(paths=[folder], streams=4, window=16, workers=0), seed=0)
    rows: list[tuple[int, ...]] = []
    for rank in range(world_size):
        for micro_batches in itertools.islice(data.batches(batch_size, 0, world=Place(rank)), num_batches):
            for batch in micro_batches:
                crcs = [google_crc32c.value(x.numpy().tobytes()) for x in batch.x]
                rows += zip(batch.n.tolist(), batch.sample_id.tolist(), batch.y.tolist(), crcs, strict=True)
    return rows


def bytes_in(folder: Path) -> int:
    """What `du` would say, but of files' sizes, while nobody takes more; a file that moves meanwhile counts once."""
    found = {}
    with CacheFolder(folder).locked("space.lock"):
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(os.path.join(place, name))
                    found[status.st_ino] = status.st_size
    return sum(found.values())


def watch(group: Group, folder: Path) -> tuple[Finished, int]:
    """Wait for the processes; and the most bytes that were in the folder meanwhile."""
    most = 0
    while group.running():
        most = max(most, bytes_in(folder))
        time.sleep(0.02)
    return group.wait(), most
