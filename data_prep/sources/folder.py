"""ImageFolder trees: one folder a class, in sorted order as torchvision has it, images at any depth below.

A folder with images and no folders is a source without labels. Class folders without a single image are an error:
labels would shift. Files of other kinds and hidden files are not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from data_prep.sources import Source
from data_prep.sources.encoded import files_as_items
from data_prep.sources.layouts import IMAGE_SUFFIXES, SPLITS, Listing
from data_prep.sources.lazy import packed
from drwkv.storage import is_remote


def open_folder(listing: Listing) -> Source:
    """Class folders of images, under train/, val/ or test/ where the root holds these, or one flat folder."""
    prefix = split_folder(listing)
    images = [name for name in listing.names if name.startswith(prefix) and is_image(name)]
    if not images:
        raise ValueError(f"{listing.spec}: no images in {listing.storage.where(prefix) or listing.spec}")
    # By class, then by path in it: "/" sorts before all else that a name may hold.
    images.sort(key=lambda name: name.replace("/", "\0"))
    files = packed(images)
    names = packed(name[len(prefix) :] for name in images) if prefix else files
    labels, class_names = labels_by_folder(listing, prefix, names, "images")
    return Source(
        items=files_as_items(listing.storage.path, names, files),
        names=names,
        labels=labels,
        class_names=class_names,
    )


def labels_by_folder(
    listing: Listing, prefix: str, names: Iterable[str], what: str
) -> tuple[np.ndarray, list[str]]:
    """(labels (M,) int64, class names) of files below `prefix`; zeros and no names where they lie in no folders.

    `what` the files are, for the ValueError: some lie in folders and some do not, or a folder has none.
    """
    classes = [name.partition("/")[0] if "/" in name else "" for name in names]
    class_names = sorted(set(classes))
    if class_names == [""]:
        return np.zeros(len(classes), np.int64), []
    _check_classes(listing, prefix, class_names, what)
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.fromiter((label_of[name] for name in classes), np.int64, len(classes)), class_names


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def split_folder(listing: Listing) -> str:
    """The folder, with a slash, that the split picks; nothing where the folders are classes."""
    folders = {name.partition("/")[0] for name in listing.names if "/" in name}
    are_splits = bool(folders) and all(folder.lower() in SPLITS for folder in folders)
    splits = {SPLITS[folder.lower()]: f"{folder}/" for folder in sorted(folders)} if are_splits else {}
    split = listing.pick(set(splits))
    return splits[split] if split else ""


def _check_classes(listing: Listing, prefix: str, class_names: list[str], what: str) -> None:
    """All files lie in class folders, and no class folder is without any."""
    where = listing.storage.where(prefix) if prefix else listing.spec
    if "" in class_names:
        raise ValueError(
            f"{where}: holds {what} beside folders of {what}; move or delete the ones or the others"
        )
    folders = {name[len(prefix) :].partition("/")[0] for name in listing.names if "/" in name[len(prefix) :]}
    if not is_remote(where):  # folders without a file exist on file systems alone
        folders = {
            entry.name for entry in os.scandir(where) if entry.is_dir() and not entry.name.startswith(".")
        }
    if empty := sorted(folders - set(class_names)):
        raise ValueError(
            f"{where}: class folder {empty[0]!r} holds no {what}, and {len(empty) - 1} more; "
            "fill or delete it, for labels follow the order of the folders"
        )
