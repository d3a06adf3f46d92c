"""Small shard sets for the tests of drwkv.data, written by the real writer, and what they are read through."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cached_sets import room_gib
from s3_server import S3Server

from data_prep.writer import ShardSetWriter
from drwkv.data.cache import NodeCache
from drwkv.data.manifest import Manifest, read_manifest
from drwkv.data.shards import ShardSet
from drwkv.storage import open_storage

WriteSet = Callable[..., str]
OpenCache = Callable[..., NodeCache]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes each set once (syncing files takes its time) and hands out where it lies."""
    cache: dict[str, Path] = {}

    def write(**options: object) -> Path:
        key = repr(sorted(options.items()))
        if key not in cache:
            cache[key] = tmp_path_factory.mktemp("set") / "set"
            kind = options.pop("kind")
            (_write_pixels if kind == "pixels" else _write_moments)(cache[key], **options)  # type: ignore[operator]
        return cache[key]

    return write


@pytest.fixture
def write_pixels(tmp_path: Path, written: Callable[..., Path]) -> WriteSet:
    """write_pixels(name, num_samples) -> path; source i is an image whose bytes spell i, labelled i % 10."""

    def write(
        name: str = "pixels", num_samples: int = 103, *, samples_per_shard: int = 10, seed: int = 0
    ) -> str:
        options = {"num_samples": num_samples, "samples_per_shard": samples_per_shard, "seed": seed}
        return str(shutil.copytree(written(kind="pixels", **options), tmp_path / name))

    return write


@pytest.fixture
def write_moments(tmp_path: Path, written: Callable[..., Path]) -> WriteSet:
    """write_moments(name, flip=...) -> path; the mirrored moments are the negative of the others."""

    def write(name: str = "moments", *, flip: bool, scale: float = 0.5) -> str:
        return str(shutil.copytree(written(kind="moments", flip=flip, scale=scale), tmp_path / name))

    return write


def pixels_of(num_samples: int, seed: int) -> np.ndarray:
    """The images that `write_pixels` writes, in source order; their first two pixels spell the source."""
    images = np.random.default_rng(seed).integers(0, 256, (num_samples, 1, 4, 6)).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(num_samples) % 256, np.arange(num_samples) // 256
    return images


def _write_pixels(out: Path, *, num_samples: int, samples_per_shard: int, seed: int) -> None:
    manifest = Manifest(
        kind="pixels",
        num_classes=10,
        channels=1,
        height=4,
        width=6,
        resolution=4,
        crop="none",
        dtype="uint8",
        seed=seed,
        samples_per_shard=samples_per_shard,
    )
    names = [f"image-{i}" for i in range(num_samples)]
    writer = ShardSetWriter(out, names=names, labels=np.arange(num_samples) % 10, manifest=manifest)
    writer.write_arrays({"img.npy": pixels_of(num_samples, seed)})


def _write_moments(out: Path, *, flip: bool, scale: float, num_samples: int = 40) -> None:
    manifest = Manifest(
        kind="moments",
        num_classes=0,
        channels=2,
        height=2,
        width=3,
        resolution=16,
        crop="adm-center",
        dtype="float16",
        seed=3,
        samples_per_shard=16,
        has_flip=flip,
        vae_id="test/vae",
        vae_hash="0" * 64,
        scale=scale,
        shift=0.25,
    )
    moments = np.random.default_rng(1).standard_normal((num_samples, 4, 2, 3)).astype(np.float16)
    moments[:, 0, 0, 0] = np.arange(num_samples) + 1
    arrays = {"moments.npy": moments} | ({"moments_flip.npy": -moments} if flip else {})
    names = [f"latent-{i}" for i in range(num_samples)]
    labels = np.zeros(num_samples, np.int64)
    ShardSetWriter(out, names=names, labels=labels, manifest=manifest).write_arrays(arrays)


@pytest.fixture
def source_images() -> Callable[[str], np.ndarray]:
    """source_images(path) -> the images that write_pixels made `path` of, in the set's row order."""

    def images(path: str) -> np.ndarray:
        sources = [int(line.split("-")[1]) for line in (Path(path) / "index/sources.txt").read_text().split()]
        manifest = read_manifest(path)
        return pixels_of(manifest.num_samples, manifest.seed)[sources]

    return images


@pytest.fixture
def place_of() -> Callable[[ShardSet, int], tuple[Path, int, int]]:
    """place_of(set, sample id) -> tar, offset and size of the sample's main member."""

    def place(shards: ShardSet, sample_id: int) -> tuple[Path, int, int]:
        row = np.load(Path(shards.path) / "index/samples.npy")[sample_id]
        return Path(shards.path) / shards.shard_names[row["shard"]], int(row["offset"]), int(row["size"])

    return place


@pytest.fixture
def on_s3(s3: S3Server, use_s3: Callable[[S3Server], None]) -> Callable[[str], str]:
    """on_s3(folder) -> the URL of a copy of the shard set in that folder."""

    def upload(folder: str) -> str:
        use_s3(s3)
        url = f"s3://{s3.bucket()}/sets/one"
        local, remote = open_storage(folder), open_storage(url)
        for name in local.names():
            remote.write(name, local.read(name))
        return url

    return upload


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[OpenCache]:
    """open_cache(shards=...) -> a NodeCache with room for so many shards of 10 samples and the index."""
    opened: list[NodeCache] = []

    def make(shards: float = 1000, *, folder: str = "cache", timeout_sec: float = 60.0) -> NodeCache:
        opened.append(NodeCache(str(tmp_path / folder), room_gib(shards), timeout_sec=timeout_sec))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()
