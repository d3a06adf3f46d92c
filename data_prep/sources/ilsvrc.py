"""ImageNet as ILSVRC 2012 hands it out, read in place: the tar of 1,000 class tars, and the validation tar.

    ILSVRC2012_img_train.tar       nXXXXXXXX.tar ..., each with nXXXXXXXX_N.JPEG ...
    ILSVRC2012_img_val.tar         ILSVRC2012_val_0000000N.JPEG ...
    ILSVRC2012_devkit_t12.tar.gz   beside the validation tar: its labels

Classes are the synsets in sorted order, as torchvision has them; names and order are those of the ImageFolder tree
that unpacking would give, so that both are one and the same source.
"""

from __future__ import annotations

import io
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.io import loadmat

from data_prep.sources import Source
from data_prep.sources.encoded import Places, ranges_as_items
from data_prep.sources.folder import is_image
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import packed
from data_prep.tar_reader import open_range, tar_members
from drwkv.storage import is_remote

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
NUM_REQUESTS = 16  # class tars scanned at once on S3
_SYNSET = re.compile(r"n\d{8}")

Place = tuple[str, int, int]  # name, first byte in the outer tar, bytes


def open_ilsvrc(listing: Listing) -> Source:
    """The training or the validation images, whichever of the two tars is there or is asked for."""
    tars = {split: name for split, name in (("train", TRAIN), ("val", VAL)) if name in listing.names}
    if not tars:
        raise ValueError(f"{listing.spec}: holds neither {TRAIN} nor {VAL}")
    return _open_train(listing) if listing.pick(set(tars)) == "train" else _open_val(listing)


def _open_train(listing: Listing) -> Source:
    where = listing.storage.where(TRAIN)
    with open_range(listing.storage, TRAIN) as reader:
        classes = sorted(
            (member.name.removesuffix(".tar"), member.offset_data, member.size)
            for member in tar_members(reader, where=where)
        )
    if not classes:
        raise ValueError(f"{where}: holds no class tars")

    def scan(place: Place) -> list[Place]:
        synset, start, size = place
        if not _SYNSET.fullmatch(synset):
            raise ValueError(f"{where}: member {synset!r} is no class tar nXXXXXXXX.tar")
        with open_range(listing.storage, TRAIN, start=start, size=size) as reader:
            images = sorted(
                (f"{synset}/{member.name}", start + member.offset_data, member.size)
                for member in tar_members(reader, where=f"{where}!{synset}.tar")
                if is_image(member.name)
            )
        if not images:
            raise ValueError(f"{where}: class tar {synset}.tar holds no images")
        return images

    with ThreadPoolExecutor(NUM_REQUESTS if is_remote(listing.storage.path) else 1) as pool:
        found = list(pool.map(scan, classes))
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(images) for images in found])
    return _source(
        listing, TRAIN, [place for images in found for place in images], labels, [c[0] for c in classes]
    )


def _open_val(listing: Listing) -> Source:
    where = listing.storage.where(VAL)
    with open_range(listing.storage, VAL) as reader:
        places = sorted(
            (member.name, member.offset_data, member.size)
            for member in tar_members(reader, where=where)
            if is_image(member.name)
        )
    if not places:
        raise ValueError(f"{where}: holds no images")
    if not listing.storage.exists(DEVKIT):
        return _source(listing, VAL, places, np.zeros(len(places), np.int64), [])
    synsets, truth = _read_devkit(listing)
    if len(truth) != len(places):
        raise ValueError(f"{where}: holds {len(places)} images, but {DEVKIT} has {len(truth)} labels")
    class_names = sorted(synsets.values())
    label_of = {number: class_names.index(synset) for number, synset in synsets.items()}
    return _source(
        listing, VAL, places, np.array([label_of[number] for number in truth], np.int64), class_names
    )


def _read_devkit(listing: Listing) -> tuple[dict[int, str], list[int]]:
    """ILSVRC's own class numbers -> synset, of the 1,000 leaves; the number of each validation image, in order."""
    where = listing.storage.where(DEVKIT)
    try:
        with tarfile.open(fileobj=io.BytesIO(listing.storage.read(DEVKIT)), mode="r:gz") as tar:
            files = {member.name.rpartition("/")[2]: member for member in tar if member.isfile()}
            meta = io.BytesIO(_content(tar, files["meta.mat"]))
            text = _content(tar, files["ILSVRC2012_validation_ground_truth.txt"])
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        truth = [int(line) for line in text.split()]
        names = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        if unknown := set(truth) - names.keys():
            raise ValueError(f"class number {min(unknown)} is not in meta.mat")
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: not the development kit of 2012 ({error}); fetch it again") from None
    return names, truth


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, f"{member.name} is a regular file"
    return file.read()


def _source(
    listing: Listing, tar: str, places: list[Place], labels: np.ndarray, class_names: list[str]
) -> Source:
    names = packed(name for name, _, _ in places)
    ranges = Places(
        container=np.zeros(len(places), np.int32),
        offset=np.array([offset for _, offset, _ in places], np.int64),
        size=np.array([size for _, _, size in places], np.int64),
    )
    items = ranges_as_items(listing.storage.path, [tar], names, ranges)
    return Source(items=items, names=names, labels=labels, class_names=class_names)
