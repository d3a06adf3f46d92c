"""Latents in .npy files, as the scripts around DiT and SiT publish them, repacked as moments.

    imagenet256_features/0.npy     (B, C, h, w) or (C, h, w)
    imagenet256_labels/0.npy       (B,)

or in class folders, CLASS/NAME.npy, labelled by these as images are, or in one place without labels.

Those scripts (fast-DiT, U-DiT) draw once from the posterior and multiply by the VAE's scale, 0.18215; a random half
of the images is mirrored, and nothing says which. Not read: the mean and standard deviation of EDM2 and REPA, which
have the shape of moments and no log-variance.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.sources import BadSampleError, Item, Source
from data_prep.sources.folder import labels_by_folder, split_folder
from data_prep.sources.labels import numbered
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import Lazy, packed
from data_prep.sources.moments import Numbers, definite
from data_prep.unvouched import open_unvouched
from drwkv.data.manifest import npy_array, read_npy_header

NUM_READERS = 16  # small files read at once
_FEATURES, _LABELS = (re.compile(rf"(?<![^/_]){word}/") for word in ("features", "labels"))


@dataclass(frozen=True)
class NpyLatents(Item):
    """One row of a .npy file."""

    root: str  # path of the storage
    file: str  # name in it
    row: int
    numbers: Numbers

    def load_latents(self, *, flip: bool = False) -> np.ndarray:
        assert not flip, "these have no latents of mirrored images"
        try:
            header = _read_header(self.root, self.file)
            start, size = header.place_of(self.row)
            data = open_unvouched(self.root).read_range(self.file, start, size)
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes at {start}, expected {size}")
        except ValueError as error:
            raise BadSampleError(f"{self.name}: cannot be read ({error})") from None
        stored = np.frombuffer(data, header.dtype).reshape(header.shape[-3:])
        return self.numbers.moments(stored, self.name)


@dataclass(frozen=True)
class _Header:
    """What opens a .npy file."""

    shape: tuple[int, ...]  # (B, C, h, w) or (C, h, w)
    dtype: np.dtype
    size: int  # bytes before the numbers

    def place_of(self, row: int) -> tuple[int, int]:
        """First byte and size of one sample. ValueError if there is no such row."""
        if len(self.shape) not in (3, 4) or row >= (self.shape[0] if len(self.shape) == 4 else 1):
            raise ValueError(f"shape {self.shape} has no row {row}")
        size = int(np.prod(self.shape[-3:])) * self.dtype.itemsize
        return self.size + row * size, size


@functools.lru_cache(maxsize=64)
def _read_header(root: str, file: str) -> _Header:
    """The header of a .npy file, without the numbers. ValueError."""
    start = io.BytesIO(open_unvouched(root).read_range(file, 0, 1 << 10))
    shape, fortran_order, dtype = read_npy_header(start)
    if fortran_order or dtype.hasobject:
        raise ValueError(
            f"{dtype} in {'Fortran' if fortran_order else 'C'} order, expected numbers in C order"
        )
    return _Header(shape, dtype, start.tell())


def open_npy(listing: Listing) -> Source:
    """Folders *_features/ and *_labels/ of .npy files, paired by name; class folders; or files without labels."""
    prefix = split_folder(listing)
    arrays = [name for name in listing.names if name.startswith(prefix) and name.endswith(".npy")]
    features = sorted((name for name in arrays if not _LABELS.search(name)), key=_numeric_order)
    if not features:
        raise ValueError(f"{listing.spec}: holds no .npy files of latents")
    shape = _npy_shape(listing, features[0])
    if len(shape) not in (3, 4):
        where = listing.storage.where(features[0])
        raise ValueError(f"{where}: has shape {shape}, expected (B, C, h, w) or (C, h, w)")
    numbers = definite(listing, (shape[-3], shape[-2], shape[-1]), default_scale=None)

    labelled = len(features) < len(arrays)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        read = _npy_labels if labelled else _npy_rows
        labels = list(pool.map(lambda name: read(listing, name), features))
    file_of = np.repeat(np.arange(len(features), dtype=np.int32), [len(of_file) for of_file in labels])
    first_of = np.cumsum([0, *map(len, labels)])
    names = packed(
        features[file] if len(labels[file]) == 1 else f"{features[file]}#{i - first_of[file]}"
        for i, file in enumerate(file_of.tolist())
    )
    files = packed(features)

    def make(i: int) -> NpyLatents:
        file = int(file_of[i])
        return NpyLatents(names[i], listing.storage.path, files[file], i - int(first_of[file]), numbers)

    if labelled or any(_FEATURES.search(name) for name in features):
        array, class_names = numbered([x for of_file in labels for x in of_file], names, where=listing.spec)
    else:
        of_files, class_names = labels_by_folder(
            listing, prefix, (name[len(prefix) :] for name in features), ".npy files"
        )
        array = of_files[file_of]
    return Source(Lazy(len(names), make), names, array, class_names, kind="moments")


def _numeric_order(name: str) -> tuple[str, int, str]:
    """0, 1, 2, 10: by folder, then numbers by value."""
    folder, _, file = name.rpartition("/")
    stem = file.removesuffix(".npy")
    return folder, len(stem) if stem.isdigit() else -1, stem


def _npy_shape(listing: Listing, name: str) -> tuple[int, ...]:
    """The shape in the header, without reading the numbers."""
    try:
        return _read_header.__wrapped__(listing.storage.path, name).shape  # as it is now
    except ValueError as error:
        raise ValueError(f"{listing.storage.where(name)}: not a .npy file ({error})") from None


def _npy_rows(listing: Listing, name: str) -> Sequence[int | None]:
    """As many missing labels as the file has rows."""
    shape = _npy_shape(listing, name)
    return [None] * (shape[0] if len(shape) == 4 else 1)


def _npy_labels(listing: Listing, name: str) -> Sequence[int | None]:
    """The labels that lie beside a file of features."""
    file = _FEATURES.sub("labels/", name)
    try:
        found = npy_array(listing.storage.read(file))
    except FileNotFoundError:
        raise ValueError(f"{listing.storage.where(name)}: has no labels, {file} is missing") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{listing.storage.where(file)}: not a .npy file ({error})") from None
    if found.dtype.kind not in "iu" or found.ndim > 1:
        raise ValueError(
            f"{listing.storage.where(file)}: holds {found.dtype} {found.shape}, expected integers (B,)"
        )
    return np.atleast_1d(found).tolist()
