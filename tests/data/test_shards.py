"""A shard set read back: the right arrays from any thread, and every kind of damage found and named."""

from __future__ import annotations

import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from drwkv.data import shards as shards_module
from drwkv.data.manifest import Manifest, check_fits, npy_bytes, npy_header_size, read_manifest, sha256
from drwkv.data.open_files import LocalFiles
from drwkv.data.shards import CorruptSampleError, ShardSet


def flip_byte(file: Path, offset: int) -> None:
    os.chmod(file, 0o644)
    offset += file.stat().st_size if offset < 0 else 0
    with open(file, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def test_every_sample_reads_back_as_it_was_written(write_pixels, source_images):
    path = write_pixels()
    shards = ShardSet.open(path)
    ids = np.arange(shards.num_samples)
    for _ in range(2):  # the second reading takes the unchecked way
        x, y = shards.read(ids)
        np.testing.assert_array_equal(x, source_images(path))
    sources = x[:, 0, 0, 0].astype(np.int64) + 256 * x[:, 0, 0, 1].astype(np.int64)
    np.testing.assert_array_equal(y, sources % 10)
    np.testing.assert_array_equal(shards.labels, y)
    assert y.dtype == np.int64 and len(shards.shard_sizes) == 11 and shards.shard_sizes.sum() == 103
    assert shards.shard_sizes.max() - shards.shard_sizes.min() <= 1
    assert sorted(sources.tolist()) == list(range(103)) and sources.tolist() != list(range(103))


def test_ids_may_repeat_and_come_in_any_order_and_fill_a_given_array(write_pixels, source_images):
    path = write_pixels()
    shards = ShardSet.open(path)
    ids = np.array([102, 0, 55, 0, 7, 102])
    out = np.full((6, 1, 4, 6), 77, np.uint8)
    x, y = shards.read(ids, out=out)
    assert x is out
    np.testing.assert_array_equal(x, source_images(path)[ids])
    np.testing.assert_array_equal(y, shards.labels[ids])
    assert shards.read(np.array([], np.int64))[0].shape == (0, 1, 4, 6)


@pytest.mark.parametrize("ids", [[-1], [103], [0, 5, 1000]])
def test_a_sample_id_out_of_range_is_refused_with_the_range(write_pixels, ids):
    with pytest.raises(ValueError, match=r"it has 0\.\.102"):
        ShardSet.open(write_pixels()).read(np.array(ids))


def test_pixels_are_mirrored_exactly_where_flip_says(write_pixels, source_images):
    path = write_pixels()
    ids, flip = np.arange(20), np.arange(20) % 3 == 0
    x, _ = ShardSet.open(path).read(ids, flip)
    images = source_images(path)[:20]
    np.testing.assert_array_equal(x[flip], images[flip][..., ::-1])
    np.testing.assert_array_equal(x[~flip], images[~flip])


def test_flip_takes_the_mirrored_moments_and_is_refused_without_them(write_moments):
    shards = ShardSet.open(write_moments("both", flip=True))
    ids, flip = np.arange(40), np.arange(40) % 2 == 0
    plain, _ = shards.read(ids)
    for _ in range(2):
        mixed, _ = shards.read(ids, flip)
        np.testing.assert_array_equal(mixed[flip], -plain[flip])
        np.testing.assert_array_equal(mixed[~flip], plain[~flip])
    assert plain.dtype == np.float16 and plain.shape == (40, 4, 2, 3)

    single = ShardSet.open(write_moments("single", flip=False))
    np.testing.assert_array_equal(single.read(ids, np.zeros(40, bool))[0], plain)
    with pytest.raises(ValueError, match="a latent is never flipped"):
        single.read(ids, flip)


def test_many_threads_with_few_open_files_read_the_same(write_pixels, source_images):
    path = write_pixels(num_samples=300, samples_per_shard=10)
    shards = ShardSet.open(path)
    shards._files = LocalFiles([os.path.join(path, n) for n in shards.shard_names], limit=2)
    images = source_images(path)
    before = len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(0, 300, 64)
        return bool((shards.read(ids)[0] == images[ids]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_flipped_byte_is_corruption_that_names_set_shard_sample_and_checksums(write_pixels, place_of):
    path = write_pixels()
    shards = ShardSet.open(path)
    file, offset, size = place_of(shards, 42)
    flip_byte(file, offset + size - 1)
    shards.read(np.array([41, 43]))
    with pytest.raises(CorruptSampleError) as caught:
        shards.read(np.array([41, 42, 43]))
    message = str(caught.value)
    assert "\n" not in message and path in message and file.name in message and "sample 42" in message
    assert re.search(r"crc32c [0-9a-f]{8}, expected [0-9a-f]{8}", message)
    assert isinstance(caught.value, ValueError)


def test_a_sample_that_reads_well_the_second_time_is_no_error(write_pixels, source_images, monkeypatch):
    path = write_pixels()
    shards, real, failures = ShardSet.open(path), os.pread, []

    def fails_once(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        if not failures:
            failures.append(offset)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    monkeypatch.setattr(os, "pread", fails_once)
    np.testing.assert_array_equal(shards.read(np.arange(50))[0], source_images(path)[:50])
    assert failures


def test_a_shard_cut_short_or_deleted_after_opening_is_corruption_of_the_sample(write_pixels):
    path = write_pixels()
    cut, deleted = ShardSet.open(path), ShardSet.open(path)
    all_ids = np.arange(103)
    cut.read(all_ids)  # also samples that were good before
    last = Path(path) / cut.shard_names[-1]
    os.chmod(last, 0o644)
    os.truncate(last, 600)
    with pytest.raises(CorruptSampleError, match=r"cut short: \d+ bytes, expected"):
        cut.read(all_ids)
    last.unlink()
    with pytest.raises(CorruptSampleError, match="cannot be read .No such file"):
        deleted.read(all_ids)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "not a committed shard set.*again"),
        (lambda p: (p / "shard-000003.tar").unlink(), "shard-000003.tar is missing; restore it"),
        (lambda p: os.truncate(p / "shard-000003.tar", 10240), "has 10240 bytes, expected 20480"),
        (lambda p: (p / "index/shards.json").write_text("{}"), "shards.json: sha256 .* of different sets"),
        (lambda p: (p / "index/shards.json").unlink(), "shards.json is missing"),
        (lambda p: (p / "index/samples.npy").unlink(), "samples.npy is missing"),
        (lambda p: os.truncate(p / "index/samples.npy", 500), "samples.npy cannot be mapped"),
        (lambda p: np.save(p / "index/samples.npy", np.zeros(7)), r"samples.npy: \(7,\) rows of 8 bytes"),
        (
            lambda p: flip_byte(p / "index/samples.npy", -103 * 24),
            "rows of shard-000000.tar do not have the hash",
        ),
    ],
)
def test_a_damaged_set_is_refused_at_opening_in_one_line(write_pixels, damage, message):
    path = Path(write_pixels())
    for file in path.glob("*.tar"):
        file.chmod(0o644)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_index_rows_of_a_later_shard_are_checked_before_its_first_sample_is_read(write_pixels):
    path = write_pixels()
    rows_file = Path(path) / "index/samples.npy"
    flip_byte(rows_file, rows_file.stat().st_size - 3)
    shards = ShardSet.open(path)
    shards.read(np.arange(50))
    with pytest.raises(ValueError, match="rows of shard-000010.tar do not have the hash"):
        shards.read(np.array([102]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1, this program reads 2"),
        ({"kind": "images"}, "kind is 'images'"),
        ({"num_samples": "many"}, "num_samples is 'many', expected int"),
        ({"num_samples": True}, "num_samples is True, expected int"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"dtype": "float16"}, "dtype is 'float16', but a set of pixels holds 'uint8'"),
        ({"height": 5}, "npy array of uint8 .1, 4, 6., expected uint8 .1, 5, 6."),
        ({"num_samples": 102}, "but manifest.json says .102,"),
        ({"num_classes": 3}, r"has label \d, but the manifest allows 0..2"),
        ({"index_hash": "0" * 64}, "but manifest.json says 000000000000"),
    ],
)
def test_a_wrong_manifest_is_refused_naming_key_and_value(write_pixels, change, message):
    file = Path(write_pixels()) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(file.parent)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_a_key_or_not_json_is_refused(write_pixels):
    file = Path(write_pixels()) / "manifest.json"
    values = json.loads(file.read_text())
    del values["seed"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="key 'seed' is missing"):
        read_manifest(file.parent)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(file.parent)


def test_a_model_that_does_not_fit_is_refused_naming_key_value_file_and_the_fix(write_pixels):
    path = write_pixels()
    manifest = read_manifest(path)
    fits = {"path": path, "input_size": (4, 6), "in_channels": 1, "num_classes": 10}
    check_fits(manifest, **fits)
    check_fits(manifest, **(fits | {"num_classes": None}))
    for change, message in (
        ({"input_size": 4}, "input_size is 4x4, but .*manifest.json holds pixels of 4x6"),
        ({"in_channels": 3}, "in_channels is 3, but .*manifest.json.*set in_channels=1"),
        ({"num_classes": 11}, "num_classes is 11, but .*manifest.json has 10 classes: set num_classes=10"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(manifest, **(fits | change))


def test_a_pickled_array_is_never_opened():
    array = np.array([{"a": 1}], dtype=object)
    stream = io.BytesIO()
    np.save(stream, array)  # an array of objects is pickled
    with pytest.raises(ValueError, match="npy array of object"):
        npy_header_size(stream.getvalue(), shape=(1,), dtype=np.dtype("uint8"))
    with pytest.raises(ValueError):
        npy_bytes(array)


def test_opening_costs_no_reading_of_the_rows(write_pixels, monkeypatch):
    """The rows of all but the first shard are untouched, so that a set of any size opens at once."""
    path, hashed = write_pixels(), []
    monkeypatch.setattr(shards_module.layout, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    shards = ShardSet.open(path)
    rows_per_shard = max(shards.shard_sizes) * shards.manifest.row_dtype.itemsize
    assert hashed and sum(hashed) <= rows_per_shard + (Path(shards.path) / "index/shards.json").stat().st_size


def test_the_manifest_goes_through_json_unchanged(write_moments):
    manifest = read_manifest(write_moments(flip=True))
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    assert (manifest.sample_shape, manifest.members) == ((4, 2, 3), ("moments.npy", "moments_flip.npy"))
    assert (manifest.scale, manifest.shift, manifest.num_samples) == (0.5, 0.25, 40)
