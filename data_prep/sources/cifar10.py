"""CIFAR-10's binary batches: records of one label byte and 3 x 32 x 32 bytes, colour plane by colour plane.

data_batch_1.bin to data_batch_5.bin are the split "train", test_batch.bin is "test"; batches.meta.txt names the
classes, one a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from data_prep.images import MAX_PIXELS
from data_prep.sources import BadSampleError, Item, Source
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import Lazy, packed
from data_prep.unvouched import open_unvouched

NUM_CLASSES, SIDE = 10, 32
RECORD = 1 + 3 * SIDE * SIDE  # bytes
NAMES = "batches.meta.txt"


@dataclass(frozen=True)
class CifarImage(Item):
    """One record of a batch."""

    root: str  # path of the storage
    file: str  # name of the batch in it
    row: int  # which record

    def load(self, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        data = open_unvouched(self.root).read_range(self.file, self.row * RECORD + 1, RECORD - 1)
        if len(data) != RECORD - 1:
            raise BadSampleError(f"{self.name}: is cut short: {len(data)} bytes, expected {RECORD - 1}")
        return np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def open_cifar10(listing: Listing) -> Source:
    """The batches of one split, in the order of their numbers."""
    batches = [name for name in listing.names if re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name)]
    if not batches:
        raise ValueError(f"{listing.spec}: holds neither data_batch_1.bin nor test_batch.bin")
    split = listing.pick({_split(name) for name in batches})
    batches = sorted((name for name in batches if _split(name) == split), key=lambda name: (len(name), name))
    labels = np.concatenate([_read_labels(listing, name) for name in batches])
    counts = [listing.storage.size(name) // RECORD for name in batches]
    places = [(name, row) for name, count in zip(batches, counts, strict=True) for row in range(count)]
    names = packed(f"{name}#{row}" for name, row in places)
    return Source(
        items=Lazy(len(places), lambda i: CifarImage(names[i], listing.storage.path, *places[i])),
        names=names,
        labels=labels,
        class_names=_read_class_names(listing),
    )


def _split(name: str) -> str:
    return "train" if name.startswith("data_batch_") else "test"


def _read_labels(listing: Listing, name: str) -> np.ndarray:
    """The labels of a whole batch, (N,) int64."""
    where = listing.storage.where(name)
    data = listing.storage.read(name)
    if not data or len(data) % RECORD:
        raise ValueError(f"{where}: {len(data)} bytes are not whole records of {RECORD}; fetch it again")
    labels = np.frombuffer(data, np.uint8).reshape(-1, RECORD)[:, 0].astype(np.int64)
    if labels.max() >= NUM_CLASSES:
        row = int(np.argmax(labels >= NUM_CLASSES))
        raise ValueError(f"{where}: record {row} has label {labels[row]}, expected 0..{NUM_CLASSES - 1}")
    return labels


def _read_class_names(listing: Listing) -> list[str]:
    if not listing.storage.exists(NAMES):
        return [str(i) for i in range(NUM_CLASSES)]
    found = listing.storage.read(NAMES).decode().split()
    if len(found) != NUM_CLASSES:
        raise ValueError(
            f"{listing.storage.where(NAMES)}: names {len(found)} classes, expected {NUM_CLASSES}"
        )
    return found
