"""A node's cache when things go wrong that it mends or gives up by itself: damaged files, full disks, dead waits."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cached_sets import TAR_BYTES, flip_bit, room_gib
from faulty_proxy import Fault, Kind

from drwkv.data.cache import fetcher
from drwkv.data.cache.fetcher import Source
from drwkv.data.loader import DataConfig, InterruptedRead, Loader, open_data
from drwkv.data.shards import ShardSet
from drwkv.data.stream import ShardStream
from drwkv.storage import StorageError, no_space_is_named


def test_a_damaged_index_in_the_cache_is_fetched_again(write_pixels, on_s3, open_cache, caplog):
    """However it is damaged, and also while the set is open, which maps the rows."""
    path = write_pixels()
    url, cache, local = on_s3(path), open_cache(), ShardSet.open(path)
    index = ShardSet.open(url, cache=cache).files.folder / "index"

    def cut_short(file: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)

    for damage, name in (
        (cut_short, "shards.json"),
        (cut_short, "samples.npy"),
        (Path.unlink, "samples.npy"),
    ):
        damage(index / name)
        caplog.clear()
        shards = ShardSet.open(url, cache=cache)
        assert "a damaged index in the cache is fetched again" in caplog.text
        np.testing.assert_array_equal(shards.labels, local.labels)

    # Of the last shard's rows, which are not looked at before they are needed
    flip_bit(index / "samples.npy", -3)
    shards = ShardSet.open(url, cache=cache)
    x, y = shards.read(np.arange(103))
    np.testing.assert_array_equal(x, local.read(np.arange(103))[0])
    np.testing.assert_array_equal(y, local.read(np.arange(103))[1])
    assert "was damaged in the cache: fetched again" in caplog.text
    assert (index / "samples.npy").read_bytes() == (Path(path) / "index/samples.npy").read_bytes()


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_manifest_and_index_come_right_though_every_other_request_for_them_fails(
    write_pixels, on_s3, faulty_s3, use_s3, open_cache
):
    """Opened by new clients into new caches, until each kind of fault has struck 20 times and each file."""
    path = write_pixels()
    url, local = on_s3(path), ShardSet.open(path)
    server, proxy = faulty_s3
    kinds = [
        kind for kind in Kind if kind is not Kind.FLIPPED_UP
    ]  # a request without a body cannot suffer that
    names = ("manifest.json", "index/shards.json", "index/samples.npy")
    proxy.faults = (Fault(0.5, tuple(kinds), match="^GET"),)
    for attempt in range(500):
        use_s3(server)  # an old client is slow to believe that the server's SlowDown is over
        cache = open_cache(folder=f"cache-{attempt}")
        shards = ShardSet.open(url, cache=cache)
        np.testing.assert_array_equal(shards.labels, local.labels)
        assert shards.index_hash == local.index_hash
        cache.close()
        struck = {(kind, name) for kind, line in proxy.struck for name in names if line.endswith(name)}
        if all(proxy.counts[kind] >= 20 for kind in kinds) and len(struck) == len(kinds) * len(names):
            return
    raise AssertionError(proxy.counts)


def test_a_disk_that_others_fill_during_a_fetch_is_waited_out_and_only_if_it_stays_full_told(
    write_pixels, on_s3, open_cache, monkeypatch, caplog
):
    monkeypatch.setattr(fetcher, "RETRY_SEC", 0.05)
    monkeypatch.setattr(fetcher, "LOOK_SEC", 0.05)
    path, real, full = write_pixels(), Source.fetch, [2]

    def fetch(source: Source, number: int, incoming: Path, target: Path) -> None:
        if full[0]:
            full[0] -= 1
            with no_space_is_named(str(incoming)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, number, incoming, target)

    monkeypatch.setattr(Source, "fetch", fetch)
    shards = ShardSet.open(on_s3(path), cache=open_cache())
    np.testing.assert_array_equal(
        shards.read(np.array([102]))[0], ShardSet.open(path).read(np.array([102]))[0]
    )
    assert caplog.text.count("trying again") == 2
    full[0] = 1000
    with pytest.raises(StorageError, match="No space left on device; free some"):
        shards.read(np.array([0]))


def test_an_object_that_is_never_what_its_checksum_says_is_told_at_once(
    write_pixels, on_s3, open_cache, s3, monkeypatch
):
    url = on_s3(write_pixels())
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    key = f"{prefix}/shard-000003.tar"
    s3.client().put_object(Bucket=bucket, Key=key, Body=bytes(TAR_BYTES), Metadata={"crc32c": "0badc0de"})
    monkeypatch.setattr("drwkv.s3.BACKOFF_SEC", 0.001)
    shards = ShardSet.open(url, cache=open_cache(timeout_sec=60.0))
    begin = time.monotonic()
    with pytest.raises(StorageError, match="crc32c is .*, expected 0badc0de"):
        shards.read(np.arange(103))
    assert time.monotonic() - begin < 20


def test_a_cache_folder_that_has_gone_is_not_taken_for_a_shard_missing_on_s3(write_pixels, tmp_path):
    path = write_pixels()
    source = Source(path, "restore it", ["shard-000000.tar"], np.array([TAR_BYTES]))
    with pytest.raises(FileNotFoundError):
        source.fetch(0, tmp_path / "incoming", tmp_path / "no-folder" / "0.tar")
    assert not (tmp_path / "incoming").exists()
    (Path(path) / "shard-000000.tar").unlink()
    with pytest.raises(StorageError, match="shard-000000.tar is missing, though the index lists it"):
        source.fetch(0, tmp_path / "incoming", tmp_path / "0.tar")


def test_a_cached_file_that_cannot_be_mended_is_told_and_the_sample_is_right(
    write_pixels, on_s3, open_cache, place_of, monkeypatch, caplog
):
    path = write_pixels()
    local, cache = ShardSet.open(path), open_cache()
    shards = ShardSet.open(on_s3(path), cache=cache)
    shards.read(np.array([42]))
    tar, offset, size = place_of(local, 42)
    cached = cache.folder.shard_file(shards.files.key, local.shard_names.index(tar.name))
    shards.files.forget_all()
    flip_bit(cached, offset + size - 1)

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    np.testing.assert_array_equal(shards.read(np.array([42]))[0], local.read(np.array([42]))[0])
    assert f"{cached}: cannot be mended: " in caplog.text


def test_what_one_batch_reads_is_in_use_at_once(write_pixels, on_s3, open_cache):
    shards = ShardSet.open(on_s3(write_pixels()), cache=open_cache())
    order = open_data(DataConfig(paths=[shards.path], streams=8, window=8), seed=0).order
    loader = Loader([shards], order, batch_size=32, seed=0)
    for n in (0, 64, 1000):
        distances = loader._distances(n)[shards.files]
        read = order.sample_ids(np.arange(n, n + 32))
        in_batch = np.unique(np.searchsorted(np.cumsum(shards.shard_sizes), read, "right"))
        assert (distances[in_batch] == 0).all()
        assert (distances == 0).sum() + (distances >= 32).sum() == len(distances)


def test_a_stream_reads_through_the_cache_that_it_is_given(corrupt_on_s3, tmp_path):
    url, bad = corrupt_on_s3
    stream = ShardStream(
        url, batch_size=20, streams=2, window=8, epochs=1, workers=0,
        cache=tmp_path / "mine", cache_gib=room_gib(50), timeout_sec=7.0, on_corrupt="replace",
    )  # fmt: skip
    assert bad in {i for batch in stream for i in batch["sample_id"].tolist()}
    assert (tmp_path / "mine/sets").is_dir()
    cache = stream._data.sets[0].files.cache
    assert (cache.timeout_sec, cache.budget_bytes) == (7.0, int(room_gib(50) * (1 << 30)))


@pytest.fixture
def corrupt_on_s3(write_pixels, place_of, on_s3, monkeypatch) -> tuple[str, int]:
    """The URL of a set, and a sample of it that is corrupt there."""
    monkeypatch.setattr("drwkv.data.cache.node.BACKOFF_SEC", 0.01)
    path = write_pixels(num_samples=100, samples_per_shard=50)
    tar, offset, size = place_of(ShardSet.open(path), 7)
    tar.chmod(0o644)
    flip_bit(tar, offset + size - 1)
    return on_s3(path), 7


def test_a_wait_for_data_ends_when_the_reader_is_told_to_end(
    write_pixels, on_s3, faulty_s3, use_s3, tmp_path
):
    url = on_s3(write_pixels())
    server, proxy = faulty_s3
    use_s3(server)
    config = DataConfig(paths=[url], cache=str(tmp_path / "cache"), streams=4, window=8, workers=2)
    data, told = open_data(config, seed=0), threading.Event()
    proxy.faults = (Fault(1.0, (Kind.ERROR,), match=r"\.tar"),)
    batches = data.batches(8, 0, interrupted=told.is_set)
    threading.Timer(0.5, told.set).start()
    begin = time.monotonic()
    with pytest.raises(InterruptedRead):
        next(batches)
    assert 0.4 < time.monotonic() - begin < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("drwkv-loader")]


def test_the_time_limit_for_a_shard_is_the_configs(write_pixels, on_s3, tmp_path):
    config = DataConfig(paths=[on_s3(write_pixels())], cache=str(tmp_path / "cache"), timeout_sec=3.0)
    assert open_data(config, seed=0).sets[0].files.cache.timeout_sec == 3.0
    config.timeout_sec = 0
    with pytest.raises(ValueError, match="'data.timeout_sec' is 0, give more than 0"):
        open_data(config, seed=0)
