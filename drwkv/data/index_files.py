"""The index of a shard set, read from local files and held against what vouches for it.

The chain of hashes is manifest.py's: the manifest vouches for the shard list, the list for each shard's rows.
`where`, in all of these, is the file to name in the DamagedIndexError; it may lie on S3 and be read through a cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, ShardEntry


class DamagedIndexError(ValueError):
    """An index file that is not what is vouched for."""


def parse_shard_list(text: bytes, manifest: Manifest, where: str) -> list[ShardEntry]:
    """The entries of index/shards.json, which must have the hash that the manifest gives."""
    if layout.sha256(text) != manifest.index_hash:
        raise DamagedIndexError(
            f"{where}: sha256 {layout.sha256(text)[:12]}..., but {layout.MANIFEST_NAME} says "
            f"{manifest.index_hash[:12]}...: they are of different sets; {_remedy(manifest, where)}"
        )
    return layout.shard_list_from_json(text.decode())


def map_rows(
    file: str | os.PathLike[str], manifest: Manifest, entries: Sequence[ShardEntry], where: str
) -> np.ndarray:
    """(num_samples,) rows of index/samples.npy, memory-mapped; their bytes are check_rows' business."""
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedIndexError(f"{where} cannot be mapped ({error}); {_remedy(manifest, where)}") from None
    if rows.dtype != manifest.row_dtype or rows.shape != (manifest.num_samples,):
        raise DamagedIndexError(
            f"{where}: {rows.shape} rows of {rows.dtype.itemsize} bytes, but {layout.MANIFEST_NAME} says "
            f"({manifest.num_samples},) of {manifest.row_dtype.itemsize}; {_remedy(manifest, where)}"
        )
    found = sum(entry.num_samples for entry in entries)
    if found != manifest.num_samples:
        raise DamagedIndexError(
            f"{where}: {manifest.num_samples} rows, but {layout.SHARD_LIST_NAME} gives the shards {found} samples; "
            f"{_remedy(manifest, where)}"
        )
    return np.asarray(rows)


def check_rows(rows: np.ndarray, entry: ShardEntry, manifest: Manifest, where: str) -> None:
    """DamagedIndexError unless these are the rows of that shard."""
    if layout.sha256(rows.tobytes()) != entry.rows_sha256:
        raise DamagedIndexError(
            f"{where}: the rows of {entry.name} do not have the hash that {layout.SHARD_LIST_NAME} gives; "
            f"{_remedy(manifest, where)}"
        )


def _remedy(manifest: Manifest, where: str) -> str:
    return manifest.remedy(where.rpartition("/index/")[0], "the set")
