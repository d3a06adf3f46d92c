"""Image data sets for tests, written for real: a tree of JPEGs, and the same images in ILSVRC's tars.

And how a source that cannot be opened says so. What reads them, data_prep.sources, is what the tests prove.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import open_source

SIZES = (40, 160)  # least and most pixels of a side


def random_image(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth coloured noise: compresses as photographs do, and no two crops of it are alike."""
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGB" else image.convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_image_folder(
    root: Path, num_images: int, *, num_classes: int, seed: int, sizes: tuple[int, int] = SIZES
) -> list[str]:
    """`root`/nXXXXXXXX/nXXXXXXXX_I.JPEG, image I in class I mod num_classes, sides drawn from `sizes`.

    One in eight is gray, as some of ImageNet are. Returns the images' relative paths, sorted.
    """
    rng = np.random.default_rng(seed)
    names = []
    for i in range(num_images):
        synset = f"n{10_000_000 + 17 * (i % num_classes)}"
        width, height = rng.integers(sizes[0], sizes[1] + 1, 2).tolist()
        image = random_image(rng, width, height, "L" if rng.random() < 1 / 8 else "RGB")
        names.append(f"{synset}/{synset}_{i}.JPEG")
        (root / synset).mkdir(parents=True, exist_ok=True)
        (root / names[-1]).write_bytes(encoded(image, quality=85))
    return sorted(names)


def write_ilsvrc_tars(tree: Path, out: Path) -> Path:
    """The images of an ImageFolder `tree` as `out`/ILSVRC2012_img_train.tar, a tar of one tar a class.

    Neither classes nor images stand in sorted order, for in the real one the images do not. Returns its path.
    """
    out.mkdir(parents=True, exist_ok=True)
    classes = {}
    for folder in sorted((path for path in tree.iterdir() if path.is_dir()), reverse=True):
        images = {
            path.name: path.read_bytes() for path in sorted(folder.iterdir(), key=lambda p: p.name[::-1])
        }
        classes[f"{folder.name}.tar"] = tar_bytes(images)
    path = out / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes(classes))
    return path


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    """A tar of the members in their order, with fixed times and owners."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def assert_refused(spec: object, message: str, **options: Any) -> None:
    """Opening the source raises a ValueError of one line that holds `message`."""
    with pytest.raises(ValueError) as caught:
        open_source(str(spec), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
