"""A committed shard set as it lies in a folder or on S3, for a look at it: index and single samples, no node cache.

What trains reads through drwkv.data.shards.ShardSet. Here nothing is kept between two calls.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from drwkv.data import index_files
from drwkv.data import manifest as layout
from drwkv.data.manifest import read_manifest
from drwkv.storage import is_remote, open_storage

READ_ATTEMPTS = 3  # of a sample on S3 that does not have its checksum
REQUESTS = 16  # samples read at once


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it counts: 1 shard, 2 shards."""
    return f"{number} {one if number == 1 else many or one + 's'}"


class StoredSet:
    """The set at `path`, its shard list and index rows; sample ids are rows.

    ValueError in one line: not committed, an index file missing or another than the manifest's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.storage = open_storage(path)
        self.manifest = read_manifest(self.path)
        try:
            self.shard_list = self.storage.read(layout.SHARD_LIST_NAME)
            where = self.storage.where(layout.SHARD_LIST_NAME)
            self.entries = index_files.parse_shard_list(self.shard_list, self.manifest, where)
            self._rows = self._map_rows()
        except FileNotFoundError as error:
            missing = error.filename or str(error).removesuffix(" is not there")
            remedy = self.manifest.remedy(self.path, "the set")
            raise ValueError(f"{missing} is missing, though there is a manifest; {remedy}") from None
        self.first_rows = np.concatenate([[0], np.cumsum([entry.num_samples for entry in self.entries])])

    @property
    def remedy(self) -> str:
        """What to do about a tar that is not that of the index."""
        return self.manifest.remedy(self.path)

    @property
    def labels(self) -> np.ndarray:
        """(num_samples,) int32."""
        return self._rows["label"]

    def rows_of(self, shard: int) -> np.ndarray:
        """The index rows of one shard; ValueError when they are not those of the manifest."""
        rows = self._rows[self.first_rows[shard] : self.first_rows[shard + 1]]
        index_files.check_rows(rows, self.entries[shard], self.manifest, self.storage.where(layout.ROWS_NAME))
        return rows

    def read(self, sample_ids: np.ndarray) -> np.ndarray:
        """`sample_ids` (B,) -> (B, *sample_shape) of the stored dtype, by one ranged read each, checked.

        ValueError naming shard and sample when one is not what the index says.
        """
        with ThreadPoolExecutor(REQUESTS) as pool:
            return np.stack(list(pool.map(self._read_one, sample_ids.tolist())))

    def _read_one(self, sample_id: int) -> np.ndarray:
        row, manifest = self._rows[sample_id], self.manifest
        name, size = self.entries[int(row["shard"])].name, int(row["size"])
        shape, dtype = manifest.sample_shape, np.dtype(manifest.dtype)
        problem = ""
        for _ in range(READ_ATTEMPTS if is_remote(self.path) else 1):
            try:
                data = self.storage.read_range(name, int(row["offset"]), size)
            except FileNotFoundError:
                raise ValueError(
                    f"{self.storage.where(name)} is missing, and sample {sample_id} is in it; {self.remedy} "
                    f"(`python -m data_prep.verify {self.path}` finds all that is)"
                ) from None
            if manifest.checksums and google_crc32c.value(data) != row["crc32c"]:
                problem = f"is corrupt: crc32c {google_crc32c.value(data):08x}, expected {row['crc32c']:08x}"
                continue
            try:
                start = layout.npy_header_size(data, shape=shape, dtype=dtype)
                return np.frombuffer(data, dtype, offset=start).reshape(shape)
            except ValueError as error:
                problem = f"is not the array that the manifest announces: {error}"
        raise ValueError(f"{self.path}: sample {sample_id} in {name} {problem}; {self.remedy}")

    def _map_rows(self) -> np.ndarray:
        where = self.storage.where(layout.ROWS_NAME)
        if not is_remote(self.path):
            return index_files.map_rows(where, self.manifest, self.entries, where)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.npy"
            self.storage.download(layout.ROWS_NAME, file)
            # The mapping outlives the file's name.
            return index_files.map_rows(file, self.manifest, self.entries, where)
