"""Parquet shards as Hugging Face's datasets are kept: an image column {bytes, path}, and a label column.

Class names come from the `huggingface` entry of the schema's metadata; without it they are numbers. Parquet is
read by row groups, and a process keeps the last one: read in file order, each is read once; in random order, one
for each image, some hundred times the image's own bytes. Needs pyarrow.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import MAX_PIXELS
from data_prep.sources import BadSampleError, Item, Source
from data_prep.sources.encoded import decoded
from data_prep.sources.labels import numbered
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import Lazy, packed
from data_prep.tar_reader import open_range
from data_prep.unvouched import open_unvouched
from drwkv.storage import Storage

READAHEAD = 1 << 20  # bytes
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class ParquetImage(Item):
    """One row of a row group."""

    root: str  # path of the storage
    file: str  # name in it
    column: str  # of the images
    row_group: int
    row: int  # inside the row group

    def load(self, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        try:
            cell = _column(self.root, self.file, self.column, self.row_group, os.getpid())[self.row].as_py()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise  # the storage's; Arrow's own have no number
            raise BadSampleError(
                f"{self.name}: row group {self.row_group} cannot be read ({error})"
            ) from None
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise BadSampleError(f"{self.name}: column {self.column!r} holds no bytes")
        return decoded(self.name, data, max_pixels=max_pixels)


@functools.lru_cache(maxsize=1)
def _column(root: str, file: str, column: str, row_group: int, process: int) -> Any:
    # Arrow's thread pools do not survive a fork, so it gets none.
    table = _open(open_unvouched(root), file).read_row_group(row_group, columns=[column], use_threads=False)
    return table[column]


def _open(storage: Storage, file: str) -> Any:
    return pq.ParquetFile(open_range(storage, file, readahead=READAHEAD), pre_buffer=False)


def open_parquet(listing: Listing) -> Source:
    """All shards of a folder or of one split of it, or one file."""
    files = listing.of_split([name for name in listing.names if name.lower().endswith(".parquet")])
    if not files:
        raise ValueError(f"{listing.spec}: holds no parquet files")
    first = _read(listing, files[0], lambda parquet: parquet.schema_arrow)
    features = _features(first)
    column, label_column = _image_column(first, features, listing), _label_column(first, features, listing)
    counts, labels = [], []
    for file in files:
        sizes, found = _read(listing, file, lambda parquet: _row_groups(parquet, column, label_column))
        counts.append(sizes)
        labels += found
    names = packed(
        f"{file}#{row}" for file, sizes in zip(files, counts, strict=True) for row in range(sum(sizes))
    )
    if not len(names):
        raise ValueError(f"{listing.spec}: {len(files)} parquet files without a row")
    array, class_names = numbered(labels, names, where=listing.spec)
    if class_names and (given := features.get(label_column, {}).get("names")):
        if len(class_names) > len(given):
            raise ValueError(
                f"{listing.spec}: labels up to {array.max()}, but the schema names {len(given)} classes"
            )
        class_names = list(given)
    return Source(
        items=_items(listing.storage.path, files, counts, column, names),
        names=names,
        labels=array,
        class_names=class_names,
    )


def _items(
    root: str, files: list[str], counts: list[list[int]], column: str, names: Lazy[str]
) -> Lazy[ParquetImage]:
    groups = [(file, group) for file, sizes in zip(files, counts, strict=True) for group in range(len(sizes))]
    ends = np.cumsum([size for sizes in counts for size in sizes])

    def make(i: int) -> ParquetImage:
        place = int(np.searchsorted(ends, i, side="right"))
        file, group = groups[place]
        first = int(ends[place - 1]) if place else 0
        return ParquetImage(names[i], root, file, column, group, i - first)

    return Lazy(len(names), make)


def _read(listing: Listing, file: str, what: Callable[[Any], Any]) -> Any:
    """`what` of the opened file; ValueError naming the file if it is no parquet file or lacks a column."""
    try:
        return what(_open(listing.storage, file))
    except (pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{listing.storage.where(file)}: cannot be read as the others ({reason})") from None


def _row_groups(parquet: Any, column: str, label_column: str) -> tuple[list[int], list[int | None]]:
    """Rows of each row group, and all labels; None where there is none, which Hugging Face writes as -1."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    for name in (column, label_column):
        if name and name not in parquet.schema_arrow.names:
            raise KeyError(f"no column {name!r}")
    if not label_column:
        return sizes, [None] * sum(sizes)
    labels = parquet.read(columns=[label_column], use_threads=False)[label_column].to_pylist()
    return sizes, [None if label == -1 else label for label in labels]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns; empty where there is none."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _image_column(schema: Any, features: dict[str, dict[str, Any]], listing: Listing) -> str:
    def holds_images(field: Any) -> bool:
        if pa.types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        is_image = features.get(field.name, {}).get("_type") == "Image"
        return is_image or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)

    found = [field.name for field in schema if holds_images(field)]
    if len(found) != 1:
        raise ValueError(f"{listing.spec}: expected one column of images, found {found} in {schema.names}")
    return found[0]


def _label_column(schema: Any, features: dict[str, dict[str, Any]], listing: Listing) -> str:
    """The column of labels; nothing where there is none."""
    found = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if LABEL_COLUMN in schema.names:
        if not pa.types.is_integer(schema.field(LABEL_COLUMN).type):
            raise ValueError(
                f"{listing.spec}: column {LABEL_COLUMN!r} holds {schema.field(LABEL_COLUMN).type}"
            )
        return LABEL_COLUMN
    if len(found) > 1:
        raise ValueError(
            f"{listing.spec}: several columns of labels, {found}; rename the one meant to 'label'"
        )
    return found[0] if found else ""
