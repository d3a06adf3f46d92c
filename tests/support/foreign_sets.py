"""WebDataset tars as others write them: members in another order, more members, folders, long names, hidden files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.foreign_tars import Told

NUM_SAMPLES, NUM_CLASSES = 40, 5
_RNG = np.random.default_rng(3)
MOMENTS = _RNG.standard_normal((NUM_SAMPLES, 4, 4, 6)).astype(np.float32)
MIRRORED = MOMENTS[..., ::-1].copy()
LABELS = _RNG.integers(0, NUM_CLASSES, NUM_SAMPLES)
LABELS[0] = NUM_CLASSES - 1
# Folders, dots in them, a name too long for a plain header, letters beyond ASCII.
KEYS = [
    f"train.v1/{'long' * 30 if i % 7 == 0 else 'été' if i % 7 == 1 else 'x'}/{i:05d}"
    for i in range(NUM_SAMPLES)
]

# What data_prep.index must be told of them.
TOLD = Told(
    scale=0.5,
    shift=0.1,
    resolution=32,
    member="vae.mean_std.npy",
    flip_member="flipped.npy",
    label_member="class",
)


def npy(array: np.ndarray) -> bytes:
    """The bytes of np.save."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def members_of(i: int) -> list[tuple[str, bytes]]:
    """Those of sample i, the label last, and one that is no business of ours."""
    return [
        (f"{KEYS[i]}.vae.mean_std.npy", npy(MOMENTS[i])),
        (f"{KEYS[i]}.json", b'{"caption": "x"}'),
        (f"{KEYS[i]}.flipped.npy", npy(MIRRORED[i])),
        (f"{KEYS[i]}.class", b"%d\n" % LABELS[i]),
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A pax tar of the members, and of things that are of no sample: a folder, a link, a hidden file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder, link = tarfile.TarInfo("train.v1"), tarfile.TarInfo("train.v1/latest.npy")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "00000.npy"
        tar.addfile(folder)
        tar.addfile(link)
        for name, data in [("train.v1/._00000.npy", b"finder"), ("__info__.json", b"{}"), *members]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_foreign_tars(folder: Path, *, per_tar: int = 15) -> Path:
    """All samples in three tars, `b-2.tar` the smallest; returns `folder`."""
    for first in range(0, NUM_SAMPLES, per_tar):
        samples = range(first, min(first + per_tar, NUM_SAMPLES))
        write_tar(folder / f"b-{first // per_tar}.tar", (member for i in samples for member in members_of(i)))
    return folder
