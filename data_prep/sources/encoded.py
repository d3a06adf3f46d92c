"""Items that are image files, whole ones or ranges of a container; decoding them is data_prep.images'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.images import MAX_PIXELS, BadImageError, decode_image
from data_prep.sources import BadSampleError, Item
from data_prep.sources.lazy import Lazy
from data_prep.unvouched import open_unvouched


@dataclass(frozen=True)
class EncodedImage(Item):
    """An image file, or the bytes of one inside a container."""

    root: str  # path of the storage
    file: str  # name in the storage
    offset: int = 0  # first byte
    size: int | None = None  # bytes; None: the whole file

    def read(self) -> bytes:
        """The bytes of the image file. Raises BadSampleError when the container ends before."""
        storage = open_unvouched(self.root)
        if self.size is None:
            return storage.read(self.file)
        data = storage.read_range(self.file, self.offset, self.size)
        if len(data) != self.size:
            raise BadSampleError(f"{self.name}: is cut short: {len(data)} bytes, expected {self.size}")
        return data

    def load(self, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        return decoded(self.name, self.read(), max_pixels=max_pixels)


def decoded(name: str, data: bytes, *, max_pixels: int) -> np.ndarray:
    """An image file's bytes -> uint8 (H, W, 3). Raises BadSampleError with the sample's name."""
    try:
        return np.asarray(decode_image(data, max_pixels=max_pixels))
    except BadImageError as error:
        raise BadSampleError(f"{name}: {error}") from None


def files_as_items(root: str, names: Sequence[str], files: Sequence[str] | None = None) -> Lazy[EncodedImage]:
    """Whole files as items; `files` are their names in the storage where these differ from `names`."""
    places = names if files is None else files
    return Lazy(len(names), lambda i: EncodedImage(names[i], root, places[i]))


@dataclass(frozen=True)
class Places:
    """Where many images lie inside containers, as arrays."""

    container: np.ndarray  # (M,) int32: which of the containers
    offset: np.ndarray  # (M,) int64: first byte in it
    size: np.ndarray  # (M,) int64: bytes


def ranges_as_items(
    root: str, containers: Sequence[str], names: Sequence[str], places: Places
) -> Lazy[EncodedImage]:
    """Ranges of containers as items."""

    def make(i: int) -> EncodedImage:
        container = containers[int(places.container[i])]
        return EncodedImage(names[i], root, container, int(places.offset[i]), int(places.size[i]))

    return Lazy(len(names), make)
