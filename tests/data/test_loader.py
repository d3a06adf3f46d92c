"""Batches are the order law's samples, whoever reads them; threads come and go with the generator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drwkv import rng
from drwkv.data import loader as loader_module
from drwkv.data.loader import Batch, DataConfig, Loader, flips, open_data
from drwkv.data.order import Order
from drwkv.data.shards import CorruptSampleError, ShardSet


@dataclass
class Place:
    rank: int
    size: int


def config_of(*paths: str, **options) -> DataConfig:
    return DataConfig(**({"paths": list(paths), "streams": 4, "window": 8, "workers": 0} | options))


def take(data, batch_size: int, start: int, num_batches: int, **options) -> list[list[Batch]]:
    stream = data.batches(batch_size, start, **options)
    batches = list(itertools.islice(stream, num_batches))
    stream.close()
    return batches


def by_n(batches: list[list[Batch]]) -> dict[int, tuple[int, int, bytes]]:
    """n -> (sample id, label, bytes of x), every n at most once."""
    found: dict[int, tuple[int, int, bytes]] = {}
    for batch in itertools.chain.from_iterable(batches):
        for n, sample_id, x, y in zip(
            batch.n.tolist(), batch.sample_id.tolist(), batch.x, batch.y.tolist(), strict=True
        ):
            assert n not in found
            found[n] = (sample_id, y, x.numpy().tobytes())
    return found


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("drwkv-loader")]


def test_a_batch_holds_the_samples_of_the_order_law(write_pixels, source_images):
    path = write_pixels()
    data = open_data(config_of(path), seed=5)
    order = Order(ShardSet.open(path).shard_sizes, seed=5, streams=4, window=8)
    found, images = by_n(take(data, 16, 0, 20)), source_images(path)
    assert sorted(found) == list(range(320))
    ids = order.sample_ids(np.arange(320))
    for n, (sample_id, y, x) in found.items():
        assert (
            sample_id == ids[n] and x == images[sample_id].tobytes() and y == data.sets[0].labels[sample_id]
        )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(12, 40),
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    workers=st.integers(0, 3),
    prefetch=st.integers(0, 3),
    start=st.integers(0, 10**12),
)
def test_samples_are_the_same_for_any_world_accumulation_workers_batch_and_start(
    write_pixels_once, batch_size, world_size, accumulate, workers, prefetch, start
):
    data = open_data(config_of(write_pixels_once, workers=workers, prefetch=prefetch, flip=True), seed=1)
    expected = by_n(
        take(open_data(config_of(write_pixels_once, flip=True), seed=1), 3 * batch_size, start, 1)
    )
    found: dict[int, tuple[int, int, bytes]] = {}
    for rank in range(world_size):
        mine = take(data, batch_size, start, 3, world=Place(rank, world_size), accumulate=accumulate)
        assert all(len(micro_batches) == accumulate for micro_batches in mine)
        assert all(len(batch) >= 1 for batch in itertools.chain.from_iterable(mine))
        assert not found.keys() & by_n(mine).keys()
        found |= by_n(mine)
    assert found == expected


@pytest.fixture(scope="module")
def write_pixels_once(written) -> str:
    return str(written(kind="pixels", num_samples=103, samples_per_shard=10, seed=0))


def test_a_batch_size_changed_in_mid_run_keeps_the_order(write_pixels_once):
    data = open_data(config_of(write_pixels_once), seed=1)
    unbroken = by_n(take(data, 12, 0, 20))
    changed = by_n(take(data, 12, 0, 10)) | by_n(take(data, 40, 120, 3))
    assert changed == unbroken


def test_micro_batches_are_sorted_by_stream(write_pixels_once):
    data = open_data(config_of(write_pixels_once), seed=1)
    [micro_batches] = take(data, 24, 0, 1, accumulate=2)
    n = torch.cat([batch.n for batch in micro_batches]).numpy()
    streams = data.order.streams_of(n)
    assert (np.diff(streams) >= 0).all() and len(set(streams.tolist())) == 4


def test_pixels_are_mirrored_exactly_when_the_flip_bit_of_seed_and_n_says_so(
    write_pixels_once, source_images
):
    images = source_images(write_pixels_once)
    plain = by_n(take(open_data(config_of(write_pixels_once), seed=9), 50, 1000, 4))
    mirrored = by_n(take(open_data(config_of(write_pixels_once, flip=True), seed=9), 50, 1000, 4))
    bits = rng.bits(9, rng.Purpose.FLIP, torch.arange(1000, 1200), 1)[:, 0] & 1
    assert 70 <= int(bits.sum()) <= 130
    for n, bit in zip(range(1000, 1200), bits.tolist(), strict=True):
        image = images[plain[n][0]]
        assert plain[n][2] == image.tobytes()
        assert mirrored[n][2] == (image[..., ::-1] if bit else image).tobytes()
    np.testing.assert_array_equal(flips(9, np.arange(1000, 1200)), bits.numpy().astype(bool))


def test_latents_take_the_mirrored_moments_by_the_same_bit_and_are_refused_without(write_moments):
    path = write_moments("both", flip=True)
    plain = by_n(take(open_data(config_of(path), seed=2), 40, 0, 1))
    mixed = by_n(take(open_data(config_of(path, flip=True), seed=2), 40, 0, 1))
    bits = flips(2, np.arange(40))
    assert 0 < bits.sum() < 40
    for n, bit in enumerate(bits.tolist()):
        x = np.frombuffer(plain[n][2], np.float16)
        np.testing.assert_array_equal(np.frombuffer(mixed[n][2], np.float16), -x if bit else x)
    [[batch]] = take(open_data(config_of(path), seed=2), 40, 0, 1)
    assert batch.x.dtype == torch.float16 and batch.x.shape == (40, 4, 2, 3) and batch.y.dtype == torch.int64

    single = write_moments("single", flip=False)
    with pytest.raises(ValueError, match="'data.flip' is true, but .*single holds no moments of mirrored"):
        open_data(config_of(single, flip=True), seed=2)


def test_mixed_sets_give_each_sample_by_its_place_in_the_concatenation(write_pixels, source_images):
    small, large = write_pixels("small", 50), write_pixels("large", 90, seed=4)
    data = open_data(config_of(small, large, weights=[3.0, 1.0]), seed=0)
    images = np.concatenate([source_images(small), source_images(large)])
    labels = np.concatenate([s.labels for s in data.sets])
    found = by_n(take(data, 64, 0, 16))
    assert all(x == images[i].tobytes() and y == labels[i] for i, y, x in found.values())
    assert sum(i < 50 for i, _, _ in found.values()) == 768  # of 1024, in every block
    by_size = open_data(config_of(small, large), seed=0)
    found = by_n(take(by_size, 64, 0, 16))
    assert sum(i < 50 for i, _, _ in found.values()) == round(1024 * 50 / 140)


def test_an_error_in_a_thread_arrives_with_its_own_type_at_its_own_batch(write_pixels, place_of):
    path = write_pixels()
    data = open_data(config_of(path, workers=3, prefetch=4), seed=1)
    bad_n = 37
    file, offset, size = place_of(data.sets[0], int(data.order.locate(np.array([bad_n]))[1][0]))
    file.chmod(0o644)
    with open(file, "r+b") as stream:
        stream.seek(offset + size - 2)
        stream.write(b"\x01\x02")
    batches = data.batches(10, 0)
    for _ in range(3):
        next(batches)
    with pytest.raises(CorruptSampleError, match=file.name):
        next(batches)
    assert not loader_threads()


def test_closing_the_generator_stops_its_threads_promptly(write_pixels_once):
    data = open_data(config_of(write_pixels_once, workers=4, prefetch=64), seed=1)
    batches = data.batches(64, 0)
    next(batches)
    assert loader_threads()
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 1.0
    assert not loader_threads()
    dropped = data.batches(64, 0)
    next(dropped)
    del dropped
    assert not loader_threads()


def test_reading_ahead_is_bounded(write_pixels_once, monkeypatch):
    data = open_data(config_of(write_pixels_once, workers=2, prefetch=3), seed=1)
    read: list[int] = []
    real = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, ids, *a, **k: read.append(len(ids)) or real(self, ids, *a, **k)
    )
    batches = data.batches(16, 0)
    for taken in range(1, 6):
        next(batches)
        time.sleep(0.02)
        assert len(read) <= taken + 3
    batches.close()


def test_identity_changes_with_whatever_decides_the_nth_sample_and_nothing_else(write_pixels):
    path, other = write_pixels("a"), write_pixels("b", 90)
    identity = open_data(config_of(path), seed=1).identity()
    same = open_data(config_of(path, workers=3, prefetch=9), seed=1).identity()
    assert identity == same and identity["index_hashes"] == [ShardSet.open(path).index_hash]
    moved = Path(path).rename(Path(path).parent / "moved")
    assert open_data(config_of(str(moved)), seed=1).identity() == identity
    for config, seed in (
        (config_of(str(moved)), 2),
        (config_of(str(moved), streams=5), 1),
        (config_of(str(moved), window=9), 1),
        (config_of(str(moved), flip=True), 1),
        (config_of(other), 1),
        (config_of(str(moved), other), 1),
    ):
        assert open_data(config, seed=seed).identity() != identity
    assert (
        open_data(config_of(str(moved), other, weights=[1.0, 2.0]), seed=1).identity()
        != open_data(config_of(str(moved), other, weights=[2.0, 1.0]), seed=1).identity()
    )


def test_what_does_not_go_together_is_refused_in_one_line(write_pixels, write_moments):
    path, latents = write_pixels(), write_moments(flip=False)
    other_scale = write_moments("other", flip=False, scale=0.18)
    for config, message in (
        (config_of(), "'data.paths' is empty"),
        (config_of(path, weights=[1.0, 2.0]), "'data.weights' has 2 numbers for 1 data.paths"),
        (config_of(path, latents), "do not mix: kind is 'pixels' in .*'moments' in"),
        (config_of(latents, other_scale), "do not mix: scale is 0.5 in .* 0.18 in"),
        (config_of(path + "-nowhere"), "not a committed shard set.*no such folder"),
        (config_of(path, streams=0), "streams is 0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_data(config, seed=0)
        assert "\n" not in str(caught.value)
    data = open_data(config_of(path), seed=0)
    with pytest.raises(ValueError, match="batch_size 5 is less than 2 ranks x accumulate 3"):
        data.batches(5, 0, world=Place(0, 2), accumulate=3)
    with pytest.raises(ValueError, match="start at n = -1"):
        data.batches(5, -1)
    with pytest.raises(ValueError, match="data.workers is -1"):
        Loader(data.sets, data.order, batch_size=4, seed=0, workers=-1)


def test_a_model_that_does_not_fit_the_data_is_refused(write_pixels):
    @dataclass
    class Model:
        input_size: object = (4, 6)
        in_channels: int = 1
        num_classes: int | None = 10

    data = open_data(config_of(write_pixels()), seed=0)
    data.check_fits(Model())
    data.check_fits(Model(input_size=[4, 6], num_classes=None))
    for change in ({"input_size": 4}, {"in_channels": 4}, {"num_classes": 1000}):
        with pytest.raises(ValueError, match=next(iter(change))):
            data.check_fits(dataclasses.replace(Model(), **change))


def test_what_is_there_is_handed_out_though_the_reader_is_told_to_end(write_pixels):
    data = open_data(config_of(write_pixels(), workers=2, prefetch=2), seed=0)
    batches = data.batches(8, 0, interrupted=lambda: True)
    [batch] = next(batches)
    assert len(batch) == 8
    batches.close()


def test_an_error_of_one_micro_batch_is_raised_though_others_are_waited_for():
    failed, never = Future[Batch](), Future[Batch]()
    failed.set_exception(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        loader_module._results([failed, never], lambda: False)


def test_sets_whose_labels_mean_other_classes_do_not_mix(write_pixels):
    paths = [write_pixels("first"), write_pixels("second"), write_pixels("third")]
    names = [[f"digit {i}" for i in range(10)], [f"digit {i}" for i in range(9)] + ["letter"], []]
    for path, class_names in zip(paths, names, strict=True):
        file = Path(path) / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": class_names}))
    with pytest.raises(ValueError, match="do not mix: class 9 is 'digit 9' in .*first, 'letter' in .*second"):
        open_data(config_of(*paths), seed=0)
    open_data(config_of(paths[0], paths[2]), seed=0)  # where one does not know, nothing speaks against it
