"""A shard set opened for reading: any samples by id, from any thread, each checked when first read.

What the files hold is laid down in manifest.py; which sample comes when is order.py's; batches for the model
are loader.py's. Here a sample id becomes an array by one `pread` at the place that the index gives.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import google_crc32c
import numpy as np

from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, check_fits, read_manifest

__all__ = ["CorruptSampleError", "Manifest", "ShardSet", "check_fits", "read_manifest"]

MAX_OPEN_SHARDS = 256  # file descriptors one set keeps open
READ_ATTEMPTS = 2  # a sample that reads badly is fetched once more before it counts as corrupt


class CorruptSampleError(ValueError):
    """A sample that cannot be read or is not what the index says, after fetching it again."""


class ShardSet:
    """A committed shard set. Sample ids are rows of its index: 0..num_samples-1, shard by shard.

    Example: `x, y = ShardSet.open("demo/shards/train").read(np.array([5, 0, 5]))`.
    """

    manifest: Manifest
    path: str
    shard_names: list[str]
    shard_sizes: np.ndarray  # (num_shards,) int64: samples in each shard

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardSet:
        """Open the set in folder `path`; the cost does not grow with the samples' number.

        Raises ValueError in one line: not committed, another index than the manifest's, a shard missing or of
        another size.
        """
        return cls(os.fspath(path))

    def __init__(self, path: str):
        self.path = path
        self.manifest = read_manifest(path)
        entries = self._read_shard_list()
        self.shard_names = [entry.name for entry in entries]
        self.shard_sizes = np.array([entry.num_samples for entry in entries], np.int64)
        self._rows_sha256 = [entry.rows_sha256 for entry in entries]
        self._first_rows = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._rows = self._map_rows()
        self._check_files(entries)

        self._files = _OpenFiles([os.path.join(path, name) for name in self.shard_names])
        self._rows_checked = np.zeros(len(entries), bool)
        # One byte a stored array, not one bit: threads then need no lock. Untouched pages cost no memory.
        self._verified = np.zeros((len(self.manifest.members), self.num_samples), bool)
        self._dtype = np.dtype(self.manifest.dtype)
        self._num_bytes = int(np.prod(self.sample_shape)) * self._dtype.itemsize
        self._header = b""
        self._header = self._first_header()

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.manifest.sample_shape

    @property
    def index_hash(self) -> str:
        return self.manifest.index_hash

    @property
    def labels(self) -> np.ndarray:
        """(num_samples,) int32, memory-mapped."""
        return self._rows["label"]

    def rows_of(self, shard: int) -> np.ndarray:
        """The index rows of one shard, memory-mapped; ValueError when they are not those of the manifest."""
        rows = self._rows[self._first_rows[shard] : self._first_rows[shard + 1]]
        if not self._rows_checked[shard]:
            file = Path(self.path) / layout.ROWS_NAME
            if layout.sha256(rows.tobytes()) != self._rows_sha256[shard]:
                raise ValueError(
                    f"{file}: the rows of {self.shard_names[shard]} do not have the hash that "
                    f"{layout.SHARD_LIST_NAME} gives; write the index again"
                )
            top = max(self.num_classes - 1, 0)
            wrong = np.flatnonzero((rows["label"] < 0) | (rows["label"] > top))
            if wrong.size:
                raise ValueError(
                    f"{file}: sample {self._first_rows[shard] + wrong[0]} has label "
                    f"{rows['label'][wrong[0]]}, but the manifest allows 0..{top}"
                )
            self._rows_checked[shard] = True
        return rows

    def read(
        self, sample_ids: np.ndarray, flip: np.ndarray | None = None, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`sample_ids` (B,) int64 -> x (B, *sample_shape) of the stored dtype, labels y (B,) int64.

        Where `flip` (B,) bool is set, pixels come mirrored in W, and moments are those of the mirrored image.
        `out`, when given, is a C-contiguous array of x's shape and dtype that is filled and returned.
        Raises CorruptSampleError; ValueError when moments of mirrored images are asked for and not stored.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise ValueError(
                f"sample ids {ids.min()}..{ids.max()} asked of {self.path}, it has 0..{self.num_samples - 1}"
            )
        x = np.empty((ids.size, *self.sample_shape), self._dtype) if out is None else out
        assert x.shape == (ids.size, *self.sample_shape) and x.dtype == self._dtype and x.flags.c_contiguous
        mirrored = np.zeros(ids.size, bool) if flip is None else np.asarray(flip, bool)
        stored_twice = self.manifest.kind == "moments"
        if stored_twice and not self.manifest.has_flip and mirrored.any():
            raise ValueError(
                f"{self.path}: no moments of mirrored images are stored, and a latent is never flipped"
            )

        # Visit shard by shard, from front to back: row order is file order.
        visit = np.argsort(ids)
        ids_visited = ids[visit]
        shards = np.searchsorted(self._first_rows, ids_visited, side="right") - 1
        for shard in np.unique(shards).tolist():
            if not self._rows_checked[shard]:
                self.rows_of(shard)
        rows = self._rows[ids_visited]
        offsets = rows["offset"]
        copies = np.zeros(ids.size, np.intp)
        if stored_twice and flip is not None:
            copies = mirrored[visit].astype(np.intp)
            offsets = np.where(copies == 1, rows["flip_offset"], offsets) if copies.any() else offsets
        self._fill(x, visit, ids_visited, copies, shards, offsets + np.uint64(len(self._header)))

        if not stored_twice and mirrored.any():
            x[mirrored] = x[mirrored][..., ::-1]
        y = np.empty(ids.size, np.int64)
        y[visit] = rows["label"]
        return x, y

    def _fill(
        self,
        x: np.ndarray,
        visit: np.ndarray,
        ids: np.ndarray,
        copies: np.ndarray,
        shards: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        """One pread a sample, straight into its place in `x`; this loop is the loader's speed."""
        size, target = self._num_bytes, x.reshape(-1).view(np.uint8).data
        verified = self._verified[copies, ids].tolist()
        file, current = None, -1
        todo = zip(visit.tolist(), shards.tolist(), starts.tolist(), verified, strict=True)
        for k, (i, shard, start, known_good) in enumerate(todo):
            place = target[i * size : i * size + size]
            read = -1
            if known_good:
                try:
                    if shard != current:
                        file, current = self._files.get(shard), shard
                    read = os.preadv(file.fd, (place,), start)  # type: ignore[union-attr]
                except OSError:
                    current = -1
            if read != size:
                place[:] = self._read_checked(int(ids[k]), int(copies[k]))[len(self._header) :]

    def _read_checked(self, sample_id: int, copy: int) -> bytes:
        """One stored array as it stands in the tar, its size, checksum and header verified."""
        row = self._rows[sample_id]
        prefix = "flip_" if copy else ""
        offset, size, crc = (int(row[prefix + name]) for name in ("offset", "size", "crc32c"))
        shard = int(np.searchsorted(self._first_rows, sample_id, side="right")) - 1
        problem = ""
        for _ in range(READ_ATTEMPTS):
            try:
                file = self._files.get(shard)  # held while it is read, or another thread may close it
                data = os.pread(file.fd, size, offset)
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            else:
                problem = self._problem(data, size, crc)
                if not problem:
                    self._verified[copy, sample_id] = True
                    return data
            self._files.forget(shard)
        raise CorruptSampleError(
            f"{self.path}: sample {sample_id} in {self.shard_names[shard]} "
            f"({self.manifest.members[copy]}, {size} bytes at {offset}) {problem}; "
            f"run `python -m data_prep.verify {self.path}` and restore or rewrite that shard"
        )

    def _problem(self, data: bytes, size: int, crc: int) -> str:
        """What is wrong with the bytes of a member, or nothing."""
        if len(data) != size:
            return f"is cut short: {len(data)} bytes, expected {size}"
        found = google_crc32c.value(data)
        if found != crc:
            return f"is corrupt: crc32c {found:08x}, expected {crc:08x}"
        if not self._header:
            try:
                header_size = layout.npy_header_size(data, shape=self.sample_shape, dtype=self._dtype)
                self._header = data[:header_size]
            except ValueError as error:
                return f"is not the array that the manifest announces: {error}"
        if size != len(self._header) + self._num_bytes or not data.startswith(self._header):
            return "has another npy header than the first sample of the set"
        return ""

    def _first_header(self) -> bytes:
        self.rows_of(0)
        self._read_checked(0, 0)
        return self._header

    def _read_shard_list(self) -> list[layout.ShardEntry]:
        file = Path(self.path) / layout.SHARD_LIST_NAME
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{file} is missing, though there is a manifest; write the set again") from None
        if layout.sha256(text) != self.manifest.index_hash:
            raise ValueError(
                f"{file}: sha256 {layout.sha256(text)[:12]}..., but {layout.MANIFEST_NAME} says "
                f"{self.manifest.index_hash[:12]}...: they are of different sets; write the set again"
            )
        return layout.shard_list_from_json(text.decode())

    def _map_rows(self) -> np.ndarray:
        file = Path(self.path) / layout.ROWS_NAME
        try:
            rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing, though there is a manifest; write the set again") from None
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} cannot be mapped ({error}); write the index again") from None
        if rows.dtype != self.manifest.row_dtype or rows.shape != (self.num_samples,):
            raise ValueError(
                f"{file}: {rows.shape} rows of {rows.dtype.itemsize} bytes, but {layout.MANIFEST_NAME} says "
                f"({self.num_samples},) of {self.manifest.row_dtype.itemsize}; write the index again"
            )
        if self._first_rows[-1] != self.num_samples:
            list_file = Path(self.path) / layout.SHARD_LIST_NAME
            raise ValueError(
                f"{list_file}: the shards hold {self._first_rows[-1]} samples, but "
                f"{layout.MANIFEST_NAME} says {self.num_samples}; write the index again"
            )
        return np.asarray(rows)

    def _check_files(self, entries: list[layout.ShardEntry]) -> None:
        for entry in entries:
            file = os.path.join(self.path, entry.name)
            try:
                found = os.stat(file).st_size
            except FileNotFoundError:
                raise ValueError(
                    f"{file} is missing; restore it, or delete the set and write it again"
                ) from None
            if found != entry.num_bytes:
                raise ValueError(
                    f"{file} has {found} bytes, expected {entry.num_bytes}; "
                    "restore it, or delete the set and write it again"
                )


class _OpenFile:
    """A file descriptor that closes when the last thread that reads from it lets go."""

    __slots__ = ("fd",)

    def __init__(self, path: str):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _OpenFiles:
    """The shards' files, opened when needed, the least recently used let go; safe from any thread."""

    def __init__(self, paths: list[str], limit: int = MAX_OPEN_SHARDS):
        self._paths, self._limit = paths, limit
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = _OpenFile(self._paths[shard])
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return file

    def forget(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)
