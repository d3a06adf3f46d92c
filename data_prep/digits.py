"""The digits that scikit-learn bundles, as two shard sets: real images, no download, a run of minutes.

    python -m data_prep.digits OUT [--seed N] [--samples-per-shard N] [--test-fraction F]

1,797 images of 8x8, 10 classes, gray values 0..16. Value v is stored as uint8 (255 v + 8) // 16, the nearest
of 0..255; `from_uint8` takes it back exactly. OUT/train and OUT/test hold a stratified split: in each class
the images are ordered by a key of (seed, position in scikit-learn's list), and the first round(F * count) are
the test's.

How shards are written is writer.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from data_prep.writer import ShardSetWriter
from drwkv import command, rng
from drwkv.data.manifest import Manifest

NUM_CLASSES = 10
_SPLIT_STEP = 1  # step 0 of this purpose deals the samples out to shards


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Gray values 0..16 -> uint8 0..255, the nearest."""
    return ((values.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """The exact inverse of `to_uint8` on its values; others go to the nearest gray value 0..16. int64."""
    return (pixels.astype(np.int64) * 16 + 127) // 255


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 1, 8, 8) uint8 and labels (1797,) int64, in scikit-learn's order."""
    bundle = load_digits()
    return to_uint8(bundle.images)[:, None], bundle.target.astype(np.int64)


def split(labels: np.ndarray, *, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the test images, each rising: a pure function of its arguments."""
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"--test-fraction is {test_fraction}, give a number between 0 and 1, such as 0.2")
    n = torch.arange(len(labels))
    words = rng.bits(seed, rng.Purpose.SHARD_PLAN, n, 1, step=_SPLIT_STEP)[:, 0].numpy()
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        num_test = int(test_fraction * len(members) + 0.5)
        if not 0 < num_test < len(members):
            raise ValueError(
                f"--test-fraction {test_fraction} takes {num_test} of the {len(members)} images of class "
                f"{label} for the test split; give a fraction that leaves both splits some"
            )
        is_test[members[np.argsort(words[members], kind="stable")[:num_test]]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def write_split(
    out: Path,
    images: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    *,
    seed: int,
    samples_per_shard: int,
) -> str:
    """Write the images at `positions` as the shard set `out`, or what of it is missing; says so in a line."""
    _, channels, height, width = images.shape
    manifest = Manifest(
        kind="pixels",
        num_classes=NUM_CLASSES,
        channels=channels,
        height=height,
        width=width,
        resolution=height,
        crop="none",
        dtype="uint8",
        seed=seed,
        samples_per_shard=samples_per_shard,
    )
    names = [f"sklearn-digits/{i:04d}" for i in positions.tolist()]
    writer = ShardSetWriter(out, names=names, labels=labels[positions], manifest=manifest)
    done = "written" if writer.missing() else "finished already"
    writer.write_arrays({"img.npy": images[positions]})
    what = f"{len(names)} images of {height}x{width}, {NUM_CLASSES} classes, {writer.num_shards} shards"
    return f"{out}: {done}: {what}"


def main(arguments: Sequence[str]) -> None:
    """The command line: write both splits, or say that they are there."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.digits", description="scikit-learn's digits as shards"
    )
    parser.add_argument("out", type=Path, help="folder for OUT/train and OUT/test")
    parser.add_argument("--seed", type=int, default=0, help="key of the split and of the order in shards")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="most images in one shard")
    parser.add_argument("--test-fraction", type=float, default=0.2, help="held-out part of each class")
    options = parser.parse_args(arguments)
    images, labels = load_images()
    train, test = split(labels, test_fraction=options.test_fraction, seed=options.seed)
    for name, positions in (("train", train), ("test", test)):
        print(
            write_split(
                options.out / name,
                images,
                labels,
                positions,
                seed=options.seed,
                samples_per_shard=options.samples_per_shard,
            )
        )


if __name__ == "__main__":
    command.run(main)
