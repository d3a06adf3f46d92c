"""Is a shard set what it says? Reads every byte of it and compares with index and manifest.

    python -m data_prep.verify SET

Checked: manifest and index hashes, sizes, each tar's members, labels and checksums against the index, label
range, npy headers, that floats are finite, the source list. Prints a summary; trouble is one line that names
shard and sample, and exit code 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.index import index_tar
from drwkv import command
from drwkv.data import manifest as layout
from drwkv.data.shards import ShardSet

_BATCH = 1024  # samples in memory at once


def verify(path: str) -> str:
    """A summary of the set in folder `path`; ValueError naming shard and sample when it is not sound."""
    shards = ShardSet.open(path)
    counts = np.zeros(max(shards.num_classes, 1), np.int64)
    total, total_squares, first = 0.0, 0.0, 0
    for shard, name in enumerate(shards.shard_names):
        _compare_with_tar(shards, shard, first)
        for at in range(first, first + int(shards.shard_sizes[shard]), _BATCH):
            ids = np.arange(at, min(at + _BATCH, first + int(shards.shard_sizes[shard])))
            for copy in range(len(shards.manifest.members)):
                x, y = shards.read(ids, np.full(len(ids), copy == 1))
                _check_finite(x, ids, f"{path}: {name}", shards.manifest.members[copy])
                if copy == 0:
                    counts += np.bincount(y, minlength=len(counts))
                    total += x.sum(dtype=np.float64)
                    total_squares += np.square(x, dtype=np.float64).sum()
        first += int(shards.shard_sizes[shard])
    _check_sources(shards)
    num_values = shards.num_samples * int(np.prod(shards.sample_shape))
    mean = total / num_values
    std = max(total_squares / num_values - mean**2, 0.0) ** 0.5
    m = shards.manifest
    shape = "x".join(str(size) for size in shards.sample_shape)
    spread = f"{counts.min()} to {counts.max()} each" if m.num_classes else "unlabelled"
    return (
        f"{path}: sound: {shards.num_samples} samples in {len(shards.shard_names)} shards, "
        f"{m.kind} {shape} {m.dtype}, {m.num_classes} classes, {spread}, "
        f"mean {mean:.4g}, std {std:.4g}, index {shards.index_hash[:12]}"
    )


def _compare_with_tar(shards: ShardSet, shard: int, first: int) -> None:
    """The index rows made anew from the tar are those of the index."""
    name = shards.shard_names[shard]
    rows = shards.rows_of(shard)
    _, found = index_tar(Path(shards.path) / name, shard=shard, members=shards.manifest.members)
    if len(found) != len(rows):
        raise ValueError(f"{shards.path}: {name} holds {len(found)} samples, the index says {len(rows)}")
    differing = np.flatnonzero(found != rows)
    if differing.size:
        i = int(differing[0])
        what = "; ".join(
            f"{key} {rows[key][i]} in the index, {found[key][i]} in the tar"
            for key in rows.dtype.names or ()
            if rows[key][i] != found[key][i]
        )
        raise ValueError(
            f"{shards.path}: sample {first + i} in {name} differs ({what}), and {differing.size - 1} more; "
            "restore or rewrite that shard"
        )


def _check_finite(x: np.ndarray, ids: np.ndarray, where: str, member: str) -> None:
    if x.dtype.kind == "f":
        bad = ~np.isfinite(x).all(axis=(1, 2, 3))
        if bad.any():
            raise ValueError(f"{where}: sample {ids[bad][0]}: {member} is not finite, {bad.sum() - 1} more")


def _check_sources(shards: ShardSet) -> None:
    file = Path(shards.path) / layout.SOURCES_NAME
    expected = json.loads((Path(shards.path) / layout.SHARD_LIST_NAME).read_text())["sources_sha256"]
    if not file.exists() or layout.sha256(file.read_bytes()) != expected:
        raise ValueError(
            f"{file}: missing, or not of the hash that {layout.SHARD_LIST_NAME} gives; write the set again"
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify", description="check every byte of a shard set"
    )
    parser.add_argument("set", help="folder of a committed shard set")
    print(verify(parser.parse_args(arguments).set))


if __name__ == "__main__":
    command.run(main)
