"""WebDataset tars of images: KEY.jpg (.jpeg, .png, .webp ...) with KEY.cls, or KEY.json that has a "label".

Neighbouring members of one key are one sample, and the key ends at the first dot of the file name. Samples come
tar by tar in sorted order, inside a tar as they stand. Class names are not in such tars: they are numbers.
"""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_prep.sources import Source
from data_prep.sources.encoded import Places, ranges_as_items
from data_prep.sources.labels import numbered
from data_prep.sources.layouts import IMAGE_SUFFIXES, Listing
from data_prep.sources.lazy import packed
from data_prep.tar_reader import open_range, tar_members
from drwkv.storage import is_remote

NUM_REQUESTS = 16  # tars scanned at once on S3

Found = tuple[str, int, int, int | None]  # name, first byte, bytes, label


def open_tars(listing: Listing) -> Source:
    """All tars of a folder, or one."""
    tars = listing.of_split([name for name in listing.names if name.lower().endswith(".tar")])
    if not tars:
        raise ValueError(f"{listing.spec}: holds no tars")
    with ThreadPoolExecutor(NUM_REQUESTS if is_remote(listing.storage.path) else 1) as pool:
        found = list(pool.map(lambda tar: _scan(listing, tar), tars))
    samples = [sample for in_tar in found for sample in in_tar]
    if not samples:
        raise ValueError(f"{listing.spec}: {len(tars)} tars without an image")
    names = packed(name for name, _, _, _ in samples)
    places = Places(
        container=np.repeat(np.arange(len(tars), dtype=np.int32), [len(in_tar) for in_tar in found]),
        offset=np.array([offset for _, offset, _, _ in samples], np.int64),
        size=np.array([size for _, _, size, _ in samples], np.int64),
    )
    labels, class_names = numbered([label for _, _, _, label in samples], names, where=listing.spec)
    items = ranges_as_items(listing.storage.path, tars, names, places)
    return Source(items=items, names=names, labels=labels, class_names=class_names)


def _scan(listing: Listing, tar: str) -> list[Found]:
    """The samples of one tar, in file order."""
    where = listing.storage.where(tar)
    found: list[Found] = []
    key, image, label = "", None, None
    with open_range(listing.storage, tar) as reader:
        for member in tar_members(reader, where=where):
            folder, file = os.path.split(member.name)
            stem, dot, extension = file.partition(".")
            if os.path.join(folder, stem) != key:
                found += [(*image, label)] if image else []
                key, image, label = os.path.join(folder, stem), None, None
            if dot + extension.lower() in IMAGE_SUFFIXES:
                if image:
                    raise ValueError(f"{where}: sample {key} has two images, {image[0]} and {member.name}")
                image = (f"{tar}!{member.name}", member.offset_data, member.size)
            elif extension in ("cls", "json"):
                reader.seek(member.offset_data)
                label = _label(reader, member.size, extension, label, where=f"{where}: {member.name}")
    found += [(*image, label)] if image else []
    return found


def _label(
    reader: io.BufferedReader, size: int, extension: str, known: int | None, *, where: str
) -> int | None:
    """The label that a member gives, `known` if it gives none; .cls goes before .json."""
    text = reader.read(size)
    try:
        if extension == "cls":
            return int(text.decode("ascii"))
        value = json.loads(text)
        value = value.get("label") if isinstance(value, dict) else None
        return known if known is not None or value is None else int(value)
    except (ValueError, TypeError):
        raise ValueError(f"{where} gives the label {text[:40]!r}, expected a whole number") from None
