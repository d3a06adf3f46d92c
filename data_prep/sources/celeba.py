"""CelebA's aligned images: img_align_celeba/000001.jpg ..., and list_eval_partition.txt for its split.

Without a split all 202,599 images are the source. CelebA has attributes and no classes: unlabelled.
"""

from __future__ import annotations

import numpy as np

from data_prep.sources import Source
from data_prep.sources.encoded import files_as_items
from data_prep.sources.folder import is_image
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import packed

IMAGES, PARTITION = "img_align_celeba/", "list_eval_partition.txt"
_SPLITS = {"0": "train", "1": "val", "2": "test"}


def open_celeba(listing: Listing) -> Source:
    """The images below img_align_celeba/, of one split or all."""
    images = [name for name in listing.names if name.startswith(IMAGES) and is_image(name)]
    if listing.split:
        split_of = _read_partition(listing)
        names_in_list = {name: name.rpartition("/")[2] for name in images}
        if unlisted := [name for name, listed in names_in_list.items() if listed not in split_of]:
            raise ValueError(
                f"{listing.spec}: {unlisted[0]} and {len(unlisted) - 1} more are not in {PARTITION}"
            )
        images = [name for name in images if split_of[names_in_list[name]] == listing.split]
    if not images:
        raise ValueError(f"{listing.spec}: no images in {listing.storage.where(IMAGES)}")
    names = packed(images)
    return Source(
        items=files_as_items(listing.storage.path, names),
        names=names,
        labels=np.zeros(len(names), np.int64),
        class_names=[],
    )


def _read_partition(listing: Listing) -> dict[str, str]:
    """File name -> split."""
    if PARTITION not in listing.names:
        raise ValueError(
            f"{listing.spec}: the split {listing.split} needs {listing.storage.where(PARTITION)}"
        )
    split_of = {}
    for number, line in enumerate(listing.storage.read(PARTITION).decode().splitlines(), start=1):
        name, _, split = line.partition(" ")
        if split.strip() not in _SPLITS:
            where = listing.storage.where(PARTITION)
            raise ValueError(f"{where}:{number}: {line!r}, expected a file name and 0, 1 or 2")
        split_of[name] = _SPLITS[split.strip()]
    return split_of
