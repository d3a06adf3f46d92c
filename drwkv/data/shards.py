"""A shard set opened for reading: any samples by id, from any thread, each checked when first read.

What the files hold is laid down in manifest.py; which sample comes when is order.py's; batches for the model
are loader.py's. Here a sample id becomes an array by one read at the place that the index gives. A set in a
folder is read in place; one on S3 through the node's cache, the package cache. How a file is read is open_files.py's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from typing import BinaryIO

import google_crc32c
import numpy as np

from drwkv.data import index_files
from drwkv.data import manifest as layout
from drwkv.data.cache import NodeCache, default_folder, open_cache
from drwkv.data.manifest import Manifest, check_fits, read_manifest
from drwkv.data.open_files import Copy, LocalFiles, OpenFile, OpenFiles
from drwkv.storage import is_remote

__all__ = ["CorruptSampleError", "Manifest", "ShardSet", "check_fits", "read_manifest"]

log = logging.getLogger("drwkv")

# A sample that reads badly is read once more before it is fetched again or counts as corrupt
READ_ATTEMPTS = 2
DAMAGE_ERRORS = (errno.EIO, errno.ENOENT)  # of a read; all others are the machine's trouble, and no sample's
REPLACEMENTS = 8  # samples that are tried in place of a corrupt one
ON_CORRUPT = ("raise", "replace")


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
    def open(
        cls, path: str | os.PathLike[str], *, cache: NodeCache | None = None, on_corrupt: str = "raise"
    ) -> ShardSet:
        """Open the set at `path`, a folder or S3 prefix; the cost does not grow with the samples' number.

        cache: where the shards of a set on S3 go; None: the default folder and budget. on_corrupt "replace": a
        sample that stays corrupt is replaced by the next one of its class in its shard (in row order, round
        from the end to the start), the same one for every reader. Nothing else about it changes, its id and
        label included; `replaced` holds it.
        Raises ValueError in one line: not committed, another index than the manifest's, a shard missing or of
        another size.
        """
        return cls(os.fspath(path), cache, on_corrupt)

    def __init__(self, path: str, cache: NodeCache | None = None, on_corrupt: str = "raise"):
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"config key 'data.on_corrupt' is {on_corrupt!r}, give one of {ON_CORRUPT}")
        self.path = path
        self.manifest = read_manifest(path)
        self.replaced: dict[tuple[int, int], int] = {}  # (sample id, 1 if mirrored moments) -> its stand-in
        self._replaces = on_corrupt == "replace"
        self._files: OpenFiles
        folder = path
        if is_remote(path):
            cached = (cache or open_cache(default_folder())).open_set(path, self.manifest)
            self._files, folder = cached, os.fspath(cached.folder)
        self._index_folder = folder
        self._entries, self._rows = self._read_index(folder)
        self.shard_names = [entry.name for entry in self._entries]
        self.shard_sizes = np.array([entry.num_samples for entry in self._entries], np.int64)
        self._first_rows = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        if not is_remote(path):
            self._check_files()
            self._files = LocalFiles([os.path.join(path, name) for name in self.shard_names])

        self._rows_checked = np.zeros(len(self._entries), bool)
        # One byte a stored array, not one bit: threads then need no lock. Untouched pages cost no memory.
        self._verified = np.zeros((len(self.manifest.members), self.num_samples), bool)
        self._copies: dict[int, Copy] = {}  # shard -> the copy of its file that `_verified` is about
        self._dtype = np.dtype(self.manifest.dtype)
        self._num_bytes = int(np.prod(self.sample_shape)) * self._dtype.itemsize
        self._header = b""
        self._header = self._first_header()

    @property
    def files(self) -> OpenFiles:
        """The shards' open files; a cache.CachedSet for a set on S3."""
        return self._files

    def open_shard(self, shard: int) -> BinaryIO:
        """The tar itself, from its start; of a set on S3 the cached one, which stays until this is closed."""
        return os.fdopen(self._files.open_again(shard), "rb")

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
        span = slice(self._first_rows[shard], self._first_rows[shard + 1])
        if not self._rows_checked[shard]:
            file = os.path.join(self.path, layout.ROWS_NAME)
            try:
                index_files.check_rows(self._rows[span], self._entries[shard], self.manifest, file)
            except index_files.DamagedIndexError:
                if not self._files.fetch_index_again():
                    raise
                log.warning("%s was damaged in the cache: fetched again", file)
                self._entries, self._rows = self._read_index(self._index_folder)
                index_files.check_rows(self._rows[span], self._entries[shard], self.manifest, file)
            rows = self._rows[span]
            top = max(self.num_classes - 1, 0)
            wrong = np.flatnonzero((rows["label"] < 0) | (rows["label"] > top))
            if wrong.size:
                raise ValueError(
                    f"{file}: sample {self._first_rows[shard] + wrong[0]} has label "
                    f"{rows['label'][wrong[0]]}, but the manifest allows 0..{top}"
                )
            self._rows_checked[shard] = True
        return self._rows[span]

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
        starts = rows["offset"]
        copies = np.zeros(ids.size, np.intp)
        if stored_twice and flip is not None:
            copies = mirrored[visit].astype(np.intp)
            starts = np.where(copies == 1, rows["flip_offset"], starts) if copies.any() else starts
        starts = starts + np.uint64(len(self._header))
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), ids.size]
        for first, end in itertools.pairwise(bounds):
            if first < end:
                part = slice(first, end)
                self._fill(x, int(shards[first]), visit[part], ids_visited[part], copies[part], starts[part])

        if not stored_twice and mirrored.any():
            x[mirrored] = x[mirrored][..., ::-1]
        y = np.empty(ids.size, np.int64)
        y[visit] = rows["label"]
        return x, y

    def _fill(
        self,
        x: np.ndarray,
        shard: int,
        places: np.ndarray,
        ids: np.ndarray,
        copies: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        """Copy samples of one shard straight into their places in `x`; most of the loader's time goes here."""
        size, doubtful = self._num_bytes, np.ones(len(ids), bool)
        # What goes wrong here, _read_checked tries again and names.
        with contextlib.suppress(OSError):
            file = self._file(shard)
            doubtful = ~self._verified[copies, ids]
            known_good = np.flatnonzero(~doubtful)
            failed = file.copy_out(
                starts[known_good].tolist(),
                size,
                x.reshape(-1).view(np.uint8),
                (places[known_good] * size).tolist(),
                file_bytes=self._entries[shard].num_bytes,
            )
            doubtful[known_good[failed]] = True
            del file  # while others are waited for, it may have to be closed
        for k in np.flatnonzero(doubtful).tolist():
            data = self._read_or_replace(shard, int(ids[k]), int(copies[k]))
            x[places[k]] = np.frombuffer(data, self._dtype, offset=len(self._header)).reshape(
                self.sample_shape
            )

    def _file(self, shard: int) -> OpenFile:
        """The shard's open file; nothing is known of the samples in a copy that was not open before."""
        file = self._files.get(shard)
        if self._copies.get(shard) != file.copy:
            self._verified[:, self._first_rows[shard] : self._first_rows[shard + 1]] = False
            self._copies[shard] = file.copy
        return file

    def _read_or_replace(self, shard: int, sample_id: int, copy: int) -> bytes:
        """One stored array as _read_checked gives it, or if so set another one in its place."""
        if (sample_id, copy) in self.replaced:
            return self._read_checked(shard, self.replaced[sample_id, copy], copy)
        try:
            return self._read_checked(shard, sample_id, copy)
        except CorruptSampleError as error:
            if not self._replaces:
                raise
            first, end = self._first_rows[shard : shard + 2].tolist()
            same_class = first + np.flatnonzero(
                self._rows["label"][first:end] == self._rows["label"][sample_id]
            )
            others = np.roll(same_class, -int(np.searchsorted(same_class, sample_id)))[1 : REPLACEMENTS + 1]
            for other in others.tolist():
                with contextlib.suppress(CorruptSampleError):
                    data = self._read_checked(shard, other, copy)
                    self.replaced[sample_id, copy] = other
                    log.warning("%s; sample %d stands in for it from now on", error, other)
                    return data
            raise CorruptSampleError(
                f"{error}; none of the {len(others)} next of its class in the shard could stand in for it"
            ) from None

    def _read_checked(self, shard: int, sample_id: int, copy: int) -> bytes:
        """One stored array as it stands in the tar, its size, checksum and header verified."""
        row = self._rows[sample_id]
        prefix = "flip_" if copy else ""
        offset, size, crc = (int(row[prefix + name]) for name in ("offset", "size", "crc32c"))
        problem = ""
        for attempts_left in reversed(range(READ_ATTEMPTS)):
            try:
                file = self._file(shard)  # held while it is read, or another thread may close it
                data = os.pread(file.fd, size, offset)
            except OSError as error:
                if error.errno not in DAMAGE_ERRORS and not attempts_left:
                    raise
                problem = f"cannot be read ({error.strerror})"
            else:
                problem = self._problem(data, size, crc)
                if not problem:
                    # Another thread may have begun with another copy of the file meanwhile.
                    self._verified[copy, sample_id] = self._copies.get(shard) == file.copy
                    return data
            self._files.forget(shard)
        what = f"{self.path}: sample {sample_id} in {self.shard_names[shard]} ({self.manifest.members[copy]}"
        for data in self._files.fetch_again(shard, offset, size):
            if not (still := self._problem(data, size, crc)):
                log.warning("%s) %s in the cache: fetched again, mended", what, problem)
                self._files.mend(shard, offset, data)
                return data
            problem = still
        raise CorruptSampleError(
            f"{what}, {size} bytes at {offset}) {problem}; "
            f"run `python -m data_prep.verify {self.path}` to see all; {self.manifest.remedy(self.path)}"
        )

    def _problem(self, data: bytes, size: int, crc: int) -> str:
        """What is wrong with the bytes of a member, or nothing."""
        if len(data) != size:
            return f"is cut short: {len(data)} bytes, expected {size}"
        if self.manifest.checksums and (found := google_crc32c.value(data)) != crc:
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
        """The npy header of the first sample, which all others share; on S3, not at the price of a whole shard."""
        row = self.rows_of(0)[0]
        offset, size, crc = (int(row[name]) for name in ("offset", "size", "crc32c"))
        for data in self._files.fetch_again(0, offset, size):
            if not self._problem(data, size, crc):
                return self._header
        self._read_or_replace(0, 0, 0)
        return self._header

    def _read_index(self, folder: str) -> tuple[list[layout.ShardEntry], np.ndarray]:
        """The shard list and the index rows, from `folder`, which is the set's own or the cache's."""
        name = layout.SHARD_LIST_NAME
        try:
            with open(os.path.join(folder, name), "rb") as file:
                text = file.read()
            entries = index_files.parse_shard_list(text, self.manifest, os.path.join(self.path, name))
            name = layout.ROWS_NAME
            rows_file = os.path.join(folder, name)
            return entries, index_files.map_rows(
                rows_file, self.manifest, entries, os.path.join(self.path, name)
            )
        except FileNotFoundError:
            raise ValueError(
                f"{os.path.join(self.path, name)} is missing, though there is a manifest; "
                f"{self.manifest.remedy(self.path, 'the set')}"
            ) from None

    def _check_files(self) -> None:
        for entry in self._entries:
            file = os.path.join(self.path, entry.name)
            try:
                found = os.stat(file).st_size
            except FileNotFoundError:
                raise ValueError(f"{file} is missing; {self.manifest.remedy(self.path)}") from None
            if found != entry.num_bytes:
                raise ValueError(
                    f"{file} has {found} bytes, expected {entry.num_bytes}; "
                    f"the index is older than the tar; {self.manifest.remedy(self.path)}"
                )
