"""From a tar to its samples: members grouped as WebDataset groups them, their places, labels and index rows.

What a row means is drwkv.data.manifest's; who writes rows to disk is writer.py, and index.py for tars that others
wrote.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import google_crc32c
import numpy as np

from data_prep.tar_reader import tar_members
from drwkv.data.manifest import FLIP_INDEX_ROW, INDEX_ROW, LABEL_MEMBER, Manifest

NPY_HEAD_BYTES = 256  # hold the header of any array that a set can hold


class Place(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class SampleLayout:
    """Which members make a sample."""

    arrays: tuple[str, ...]  # extensions, the main one first and the mirrored one, if any, second
    label: str = LABEL_MEMBER  # extension; "": there is none, and each label is 0
    strict: bool = True  # whether any other member is an error; tars of others may hold more

    @classmethod
    def of(cls, manifest: Manifest) -> SampleLayout:
        """That of a committed set."""
        return cls(manifest.members, manifest.label_member, strict=not manifest.member_names)

    @property
    def wanted(self) -> set[str]:
        return {*self.arrays, *([self.label] if self.label else [])}

    @property
    def row_dtype(self) -> np.dtype:
        return FLIP_INDEX_ROW if len(self.arrays) == 2 else INDEX_ROW

    def check(self, sample: Sample, where: str) -> None:
        """ValueError unless the sample has the members that it needs, and no other if strict."""
        found = sample.places.keys()
        if (found != self.wanted) if self.strict else not (self.wanted <= found):
            raise ValueError(
                f"{where}: sample {sample.key} has {sorted(found)}, expected {sorted(self.wanted)}"
            )


@dataclass
class Sample:
    """One sample of a tar."""

    key: str  # folders in the tar included
    places: dict[str, Place] = field(default_factory=dict)  # of all its members, by extension
    data: dict[str, bytes] = field(default_factory=dict)  # bodies of those that are wanted, or how they begin


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member: the key ends at the file name's first dot. None: the file is of no sample.

    As WebDataset and DALI have it: files without an extension, hidden ones and `__meta__` files are of none.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
        return None
    return folder + slash + stem, extension


def read_samples(
    reader: io.BufferedReader,
    layout: SampleLayout,
    *,
    where: str,
    label_bytes: int = 64,
    array_bytes: int | None = None,
) -> Iterator[Sample]:
    """The samples of a tar in file order, neighbouring members of one key together, in one pass.

    Of an array's body the first `array_bytes` are read, None: all. Raises ValueError naming `where` and the key: not
    a whole tar, a member missing or unknown.
    """
    sample = Sample("")
    for member in tar_members(reader, where=where):
        if (name := split_name(member.name)) is None:
            continue
        key, extension = name
        if key != sample.key:
            if sample.places:
                layout.check(sample, where)
                yield sample
            sample = Sample(key)
        if extension in sample.places:
            raise ValueError(f"{where}: sample {key} has member {extension} twice")
        sample.places[extension] = Place(member.offset_data, member.size)
        if extension in layout.wanted:
            limit = label_bytes if extension == layout.label else array_bytes
            size = member.size if limit is None else min(limit, member.size)
            reader.seek(member.offset_data)
            sample.data[extension] = data = reader.read(size)
            if len(data) != size:
                raise ValueError(
                    f"{where}: not a whole tar (it ends in sample {key}); fetch or write it again"
                )
    if sample.places:
        layout.check(sample, where)
        yield sample


def label_of(sample: Sample, layout: SampleLayout, *, where: str) -> int:
    """The sample's label; ValueError when it is none."""
    if not layout.label:
        return 0
    text = sample.data[layout.label]
    try:
        label = int(text.decode("ascii"))
    except ValueError:
        label = -1
    if not 0 <= label < 1 << 31:
        raise ValueError(
            f"{where}: sample {sample.key} has label {text[:40]!r}, expected a whole number from 0 on"
        )
    return label


def row_of(
    sample: Sample, layout: SampleLayout, *, shard: int, where: str, checksums: bool = True
) -> tuple[int, ...]:
    """The sample's index row, as values of `layout.row_dtype`; crc32c 0 without checksums."""
    label = label_of(sample, layout, where=where)
    (offset, size, crc), *flip = (
        (*sample.places[name], google_crc32c.value(sample.data[name]) if checksums else 0)
        for name in layout.arrays
    )
    return (offset, size, crc, shard, label, *(value for place in flip for value in place))


def index_tar(
    path: str | os.PathLike[str], *, shard: int, members: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Keys and index rows of all samples in one local tar of our own writing, in file order.

    `members` names the extensions of the arrays, the main one first and the mirrored one, if any, second.
    Raises ValueError naming tar and key: not a whole tar, a member missing or unknown, a label that is none.
    """
    layout, where = SampleLayout(tuple(members)), os.fspath(path)
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    with open(path, "rb") as reader:
        for sample in read_samples(reader, layout, where=where):
            keys.append(sample.key)
            rows.append(row_of(sample, layout, shard=shard, where=where))
    return keys, np.array(rows, layout.row_dtype)
