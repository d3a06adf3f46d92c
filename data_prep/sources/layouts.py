"""Which layout a path holds, told by the names of its files, and who opens it.

The split, #train, #val or #test behind a path, picks among files or folders whose names say a split. Where the
names say more than one and the path says none, that is an error: no layout has a default.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.sources import Source, StoredLatents
from data_prep.unvouched import open_unvouched
from drwkv.storage import Storage, is_remote, split_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_FILE_FORMATS = {".tar": "tars", ".parquet": "parquet", ".npy": "npy", ".safetensors": "safetensors"}
_FILE_FORMATS |= dict.fromkeys(IMAGE_SUFFIXES, "folder")
# Format -> its module and function; a module is imported when it is first asked for.
_OPENERS = {
    "folder": ("folder", "open_folder"),
    "ilsvrc": ("ilsvrc", "open_ilsvrc"),
    "tars": ("tars", "open_tars"),
    "parquet": ("parquet", "open_parquet"),
    "cifar10": ("cifar10", "open_cifar10"),
    "celeba": ("celeba", "open_celeba"),
    "npy": ("npy", "open_npy"),
    "safetensors": ("safetensors", "open_safetensors"),
}
FORMATS = ("auto", *_OPENERS)


@dataclass(frozen=True)
class Listing:
    """What an opener gets: the files of a path, and what the user said of them."""

    spec: str  # as the user gave it, for messages
    storage: Storage
    names: list[str]  # of all files but hidden ones, sorted
    split: str | None  # "train", "val", "test" or None
    latents: StoredLatents

    def of_split(self, names: list[str]) -> list[str]:
        """Those of `names` whose own file name says the split; all, if the user asks for none."""
        said = {name: split_in(PurePosixPath(name).name) for name in names}
        wanted = self.pick({split for split in said.values() if split})
        return names if self.split is None else [name for name in names if said[name] == wanted]

    def pick(self, splits: set[str]) -> str | None:
        """Which of the splits that are there is meant; None if names say no split and the user says none."""
        if self.split is None and len(splits) > 1:
            raise ValueError(
                f"{self.spec}: holds {' and '.join(sorted(splits))}; "
                f"say which, such as {self.spec}#{min(splits, key=list(SPLITS).index)}"
            )
        if self.split is not None and self.split not in splits:
            raise ValueError(
                f"{self.spec}: holds no {self.split} split, only {sorted(splits) or 'files without one'}"
            )
        return self.split or next(iter(splits), None)


def open_layout(spec: str, format: str, latents: StoredLatents) -> Source:
    """What `open_source` does."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    listing = _list(spec, latents)
    if format == "auto":
        format = _detect(listing)
    module, function = _OPENERS[format]
    try:
        opener = getattr(importlib.import_module(f"data_prep.sources.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ValueError(f"{spec}: reading {format} needs {error.name}: pip install {error.name}") from None
    return opener(listing)


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name says as a word of its own: train-00000-of-00294.parquet."""
    words = [SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS]
    return words[0] if words else None


def _list(spec: str, latents: StoredLatents) -> Listing:
    path, _, split = spec.rpartition("#")
    if split not in SPLITS:
        path, split = spec, ""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (*_FILE_FORMATS, ".bin") and not os.path.isdir(path):
        folder, name = split_path(path)
        storage, names = open_unvouched(folder), [name]
        if not storage.exists(name):
            raise ValueError(f"{spec}: no such file")
    else:
        storage = open_unvouched(path)
        if not is_remote(path) and not os.path.isdir(path):
            raise ValueError(f"{spec}: {'not a folder' if os.path.exists(path) else 'no such folder'}")
        names = [name for name in storage.names() if not _is_hidden(name)]
        if not names:
            raise ValueError(f"{spec}: holds no files")
    return Listing(spec, storage, names, SPLITS.get(split), latents)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _detect(listing: Listing) -> str:
    top = {name for name in listing.names if "/" not in name}
    folders = {name.partition("/")[0] for name in listing.names if "/" in name}
    if any(re.fullmatch(r"ILSVRC2012_img_(train|val)\.tar", name) for name in top):
        return "ilsvrc"
    if any(re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name) for name in top):
        return "cifar10"
    if "img_align_celeba" in folders:
        return "celeba"
    found = {_FILE_FORMATS.get(os.path.splitext(name)[1].lower()) for name in listing.names} - {None}
    if len(found) > 1:
        raise ValueError(
            f"{listing.spec}: holds more than one kind of files ({', '.join(sorted(map(str, found)))}); "
            "say which with the format, or give the folder of one"
        )
    if not found:
        raise ValueError(
            f"{listing.spec}: no images and no known container among its {len(listing.names)} files "
            f"(first: {listing.names[0]!r})"
        )
    return str(found.pop())
