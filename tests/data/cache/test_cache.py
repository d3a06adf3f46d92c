"""Shard sets on S3 through a node's cache: right, in order, once, within the budget, whoever is killed meanwhile."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cached_sets import (
    INDEX_BYTES,
    RANK,
    TAR_BYTES,
    eventually,
    flip_bit,
    watch,
    what_should_be_read,
    what_was_read,
    write_job,
)
from faulty_proxy import Fault, Kind
from hypothesis import given
from hypothesis import strategies as st
from small_disk import on_small_disk

from drwkv.data.cache import NodeCache, node, session
from drwkv.data.cache.folder import CacheFolder
from drwkv.data.cache.life import LifeSign
from drwkv.data.cache.locks import open_shared
from drwkv.data.cache.space import GIB, Space, farthest
from drwkv.data.loader import DataConfig, open_data
from drwkv.data.order import NEVER
from drwkv.data.shards import CorruptSampleError, ShardSet
from drwkv.storage import StorageError, open_storage


def cached_shards(cache: NodeCache) -> set[int]:
    return {number for held in cache.folder.held() for number in held.numbers.tolist()}


# The rule.


@given(
    held=st.lists(st.tuples(st.integers(-1, 20), st.integers(1, 9)), max_size=7),
    nearer_than=st.integers(-1, 20),
    needed=st.integers(1, 30),
)
def test_the_farthest_leave_and_only_for_what_is_nearer_and_as_few_as_do(held, nearer_than, needed):
    distances, sizes = np.array([h[0] for h in held], np.int64), np.array([h[1] for h in held], np.int64)
    chosen = farthest(distances, sizes, nearer_than, needed)
    later = distances > nearer_than
    if chosen is None:
        assert sizes[later].sum() < needed
        return
    assert later[chosen].all() and sizes[chosen].sum() >= needed
    assert sizes[chosen[:-1]].sum() < needed
    staying = np.setdiff1d(np.flatnonzero(later), chosen)
    assert not staying.size or distances[staying].max() <= distances[chosen].min()


def test_belady_misses_no_more_than_any_choice_of_what_to_evict():
    """On a short order, against all that could have been done."""
    order, room = [0, 1, 2, 0, 3, 1, 0, 2, 3, 0, 1, 2], 2

    def best(at: int, held: frozenset[int]) -> int:
        if at == len(order):
            return 0
        wanted = order[at]
        if wanted in held:
            return best(at + 1, held)
        choices = [held] if len(held) < room else [held - {x} for x in held]
        return 1 + min(best(at + 1, rest | {wanted}) for rest in choices)

    def next_use(shard: int, at: int) -> int:
        return order.index(shard, at) - at if shard in order[at:] else NEVER

    misses, held = 0, list[int]()
    for at, wanted in enumerate(order):
        if wanted not in held:
            misses += 1
            if len(held) == room:
                distances = np.array([next_use(shard, at) for shard in held])
                chosen = farthest(distances, np.ones(room, np.int64), 0, 1)
                assert chosen is not None
                held.pop(int(chosen[0]))
            held.append(wanted)
    assert misses == best(0, frozenset())


def test_a_set_that_nobody_has_open_leaves_before_what_is_never_needed_again(tmp_path):
    folder = CacheFolder(tmp_path / "cache")
    life = LifeSign(folder.ranks)
    for opened, key in enumerate(("older", "newer", "living")):
        for name in ("index", "shards"):
            (folder.set_folder(key) / name).mkdir(parents=True)
        (folder.set_folder(key) / "source.json").write_text("")
        os.utime(folder.set_folder(key) / "source.json", (opened, opened))
        folder.shard_file(key, 0).write_bytes(bytes(100))
    life.publish({"living": np.array([NEVER])})
    space, gone = Space(folder, life.id, 300), []
    for _ in range(3):
        incoming = space.reserve(folder.demand(folder.living()), 100, 5)
        assert incoming is not None
        gone.append({key for key in ("older", "newer", "living") if not folder.shard_file(key, 0).exists()})
    assert gone == [{"older"}, {"older", "newer"}, {"older", "newer", "living"}]
    assert space.reserve(folder.demand(folder.living()), 100, 5) is None  # what is on its way keeps its room
    life.end()


def test_what_is_evicted_keeps_its_room_until_its_last_reader_has_closed_it(tmp_path):
    folder = CacheFolder(tmp_path / "cache")
    life = LifeSign(folder.ranks)
    (folder.set_folder("set") / "shards").mkdir(parents=True)
    folder.shard_file("set", 0).write_bytes(bytes(100))
    space, reader = Space(folder, life.id, 100), open_shared(folder.shard_file("set", 0))
    assert space.reserve({}, 100, 5) is None
    assert not folder.shard_file("set", 0).exists() and folder.used_bytes() == 100
    assert os.pread(reader, 200, 0) == bytes(100)
    os.close(reader)
    assert space.reserve({}, 100, 5) is not None
    assert folder.used_bytes() == 100
    life.end()


# Reading.


def test_a_set_on_s3_reads_as_the_local_one_and_comes_once(
    write_pixels, on_s3, faulty_s3, use_s3, open_cache
):
    path = write_pixels()
    url = on_s3(path)
    server, proxy = faulty_s3
    use_s3(server)
    local, ids = ShardSet.open(path), np.arange(103)
    for folder_is_new in (True, False):
        before = len(proxy.requests)
        cache = open_cache()
        shards = ShardSet.open(url, cache=cache)
        for _ in range(2):
            x, y = shards.read(ids)
            np.testing.assert_array_equal(x, local.read(ids)[0])
            np.testing.assert_array_equal(y, local.read(ids)[1])
        assert shards.index_hash == local.index_hash and (shards.labels == local.labels).all()
        original = (Path(path) / "shard-000003.tar").read_bytes()
        with shards.open_shard(3) as one, shards.open_shard(3) as other:
            assert one.read() == other.read() == original
        gets = [line.rpartition("/")[2] for line in proxy.requests[before:] if line.startswith("GET")]
        expected = ["manifest.json", "shard-000000.tar"]  # of this the first sample alone
        if folder_is_new:
            expected += ["shards.json", "samples.npy", *shards.shard_names]
        assert sorted(gets) == sorted(expected)
        cache.close()


def test_a_local_set_is_read_in_place(write_pixels, open_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DRWKV_CACHE", str(tmp_path / "default"))
    data = open_data(DataConfig(paths=[write_pixels()], cache=str(tmp_path / "named"), streams=2), seed=0)
    next(data.batches(8, 0))
    assert not (tmp_path / "default").exists() and not (tmp_path / "named").exists()


def test_a_cache_smaller_than_the_data_holds_what_is_needed_next(
    write_pixels, on_s3, open_cache, monkeypatch
):
    """Sequential use, with a follower that tells the truth: each shard is there before it is asked for."""
    monkeypatch.setattr(session, "PUBLISH_SEC", 0.05)
    url, cache = on_s3(write_pixels()), open_cache(2)
    shards = ShardSet.open(url, cache=cache)
    at = 0
    with cache.follow(lambda: {shards.files: (np.arange(11) - at) % 11}):
        for at in [*range(11), *range(11)]:
            soon = {at, (at + 1) % 11}
            eventually(lambda soon=soon: soon <= cached_shards(cache))
            assert cache.folder.used_bytes() <= cache.budget_bytes
            first = int(shards.shard_sizes[:at].sum())
            assert len(shards.read(np.arange(first, first + int(shards.shard_sizes[at])))[0])


def test_two_processes_read_three_epochs_right_in_order_and_once_from_a_cache_smaller_than_the_data(
    write_pixels, on_s3, faulty_s3, use_s3, applications, tmp_path
):
    """About one request in ten meets a fault, those for manifest and index among them, and each kind three times."""
    num_batches = 3 * 320 // 16
    path = write_pixels(num_samples=320)
    url = on_s3(path)
    server, proxy = faulty_s3
    use_s3(server)
    proxy.faults = (
        *(Fault(1.0, (kind,), match=r"GET .*(manifest\.json|index)", at_most=1) for kind in Kind),
        *(Fault(0.5, (kind,), match=r"GET .*\.tar", at_most=2) for kind in Kind),
        Fault(0.2, (Kind.TRUNCATED, Kind.FLIPPED_DOWN), match=r"GET .*\.tar"),
        Fault(0.04),
    )
    job = write_job(tmp_path, url, shards=12, num_batches=num_batches)
    group = applications.start(RANK, str(job), world_size=2)
    finished, most_bytes = watch(group, tmp_path / "cache")
    assert finished.codes == [0, 0], finished.output
    assert what_was_read(tmp_path, range(2)) == what_should_be_read(path, num_batches, 2)
    assert all(proxy.counts[kind] >= 3 for kind in Kind if kind != Kind.FLIPPED_UP), proxy.counts
    assert most_bytes <= 12 * TAR_BYTES + INDEX_BYTES
    assert sum(line.startswith("GET") and ".tar" in line for line in proxy.requests) > 80  # of 32 shards


# Death.


def test_killed_ranks_lose_nothing_and_another_takes_the_fetching_over(
    write_pixels, on_s3, applications, tmp_path
):
    """Three processes of one node; whichever fetches is killed, twice, in the middle of its downloads."""
    num_batches = 40
    path = write_pixels(num_samples=400)
    job = write_job(tmp_path, on_s3(path), shards=16, num_batches=num_batches)
    groups = {}
    for rank in range(3):
        own = tmp_path / f"job-{rank}.json"
        own.write_text(json.dumps(json.loads(job.read_text()) | {"out": str(tmp_path / f"read-{rank}")}))
        groups[rank] = applications.start(RANK, str(own))
    killed = []
    for _ in range(2):
        eventually(lambda: fetching_process(tmp_path / "cache", killed), timeout_sec=60)
        killed.append(fetching_process(tmp_path / "cache", killed))
        os.kill(killed[-1], signal.SIGKILL)
    survivor = next(rank for rank, group in groups.items() if group.processes[0].pid not in killed)
    finished = groups[survivor].wait()
    assert finished.codes == [0], finished.output
    assert what_was_read(tmp_path, range(survivor, survivor + 1)) == what_should_be_read(path, num_batches, 1)
    folder = CacheFolder(tmp_path / "cache")
    folder.clear_incoming(folder.living())
    assert folder.living() == [] and folder.bytes_incoming() == 0
    for held in folder.held():
        for number in held.numbers.tolist():
            original = Path(path) / f"shard-{number:06d}.tar"
            assert folder.shard_file(held.key, number).read_bytes() == original.read_bytes()


def fetching_process(cache: Path, but_not: list[int]) -> int:
    """Its id, while it has a file on its way; 0 for none."""
    for file in os.listdir(cache / "incoming") if (cache / "incoming").exists() else ():
        process = int(file.split("-")[0])
        if process not in but_not:
            return process
    return 0


def test_the_demand_of_the_dead_is_forgotten(write_pixels, on_s3, open_cache, tmp_path):
    folder = CacheFolder(tmp_path / "cache")
    ready = multiprocessing.get_context("spawn").Event()

    process = multiprocessing.get_context("spawn").Process(
        target=live_and_demand, args=(str(folder.path), ready)
    )
    process.start()
    assert ready.wait(30)
    assert list(folder.demand(folder.living())) == ["theirs"]
    process.kill()
    process.join()
    assert folder.demand(folder.living()) == {} and not list(folder.ranks.iterdir())


def live_and_demand(path: str, ready: threading.Event) -> None:
    life = LifeSign(CacheFolder(path).ranks)
    life.publish({"theirs": np.array([1, 2, 3])})
    ready.set()
    time.sleep(60)


def test_a_forked_child_reads_for_itself_and_holds_no_lock_of_its_parents(write_pixels, on_s3, open_cache):
    """As DataLoader's workers are forked."""
    path = write_pixels()
    cache = open_cache()
    shards = ShardSet.open(on_s3(path), cache=cache)
    shards.read(np.arange(30))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            right = (shards.read(np.arange(103))[0] == ShardSet.open(path).read(np.arange(103))[0]).all()
            os.write(writer, b"1" if right else b"0")
            time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert os.read(reader, 1) == b"1"
        assert len(cache.folder.living()) == 2
        cache.close()
        assert len(cache.folder.living()) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert cache.folder.living() == []


# Damage.


def test_a_sample_damaged_in_the_cache_is_fetched_again_and_mended_and_told_once(
    write_pixels, on_s3, open_cache, place_of, caplog
):
    path = write_pixels()
    local, cache = ShardSet.open(path), open_cache()
    shards = ShardSet.open(on_s3(path), cache=cache)
    shards.read(np.array([42]))
    tar, offset, size = place_of(local, 42)
    cached = cache.folder.shard_file(shards.files.key, local.shard_names.index(tar.name))
    shards.files.forget_all()
    flip_bit(cached, offset + size - 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(shards.read(np.arange(103))[0], local.read(np.arange(103))[0])
    assert cached.read_bytes() == tar.read_bytes()
    assert [record.message.count("sample 42") for record in caplog.records] == [1]


@pytest.fixture
def corrupt(write_pixels, place_of) -> tuple[str, int, list[int]]:
    """A set, a corrupt sample of it, and the others of its class in its shard, in row order, round from it."""
    path = write_pixels(num_samples=100, samples_per_shard=50)
    shards = ShardSet.open(path)
    labels = shards.labels[:50]
    bad = int(np.flatnonzero(labels == labels[7])[-1])  # so that the round goes over the shard's end
    tar, offset, size = place_of(shards, bad)
    tar.chmod(0o644)
    flip_bit(tar, offset + size - 1)
    return path, bad, [int(i) for i in np.flatnonzero(labels == labels[7])[:-1]]


@pytest.mark.parametrize("remote", [False, True])
def test_a_sample_that_stays_corrupt_raises_or_is_replaced_by_the_next_of_its_class(
    corrupt, remote, request, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(node, "BACKOFF_SEC", 0.01)
    path, bad, others = corrupt
    where = request.getfixturevalue("on_s3")(path) if remote else path
    options = {"cache": str(tmp_path / "cache"), "cache_gib": 0.01, "streams": 2, "window": 8, "workers": 0}
    data = open_data(DataConfig(paths=[where], **options), seed=0)
    with pytest.raises(CorruptSampleError, match=f"sample {bad} in .* is corrupt: crc32c"):
        data.sets[0].read(np.arange(100))

    expected = ShardSet.open(path).read(np.array(others[:1]))[0][0]
    ns = [n for n in range(200) if data.order.locate(np.array([n]))[1][0] == bad]
    for batch_size in (20, 40):
        data = open_data(DataConfig(paths=[where], on_corrupt="replace", **options), seed=0)
        caplog.clear()
        found = []
        for [batch] in itertools.islice(data.batches(batch_size, 0), 200 // batch_size):
            found += [
                (n, x.numpy())
                for n, i, x in zip(batch.n.tolist(), batch.sample_id.tolist(), batch.x, strict=True)
                if i == bad
            ]
        assert [n for n, _ in found] == ns
        assert all((x == expected).all() for _, x in found)
        assert data.sets[0].replaced == {(bad, 0): others[0]}
        assert [f"n = {n}" for n in ns] == [
            r.message.split(":")[0] for r in caplog.records if "n = " in r.message
        ]


def test_a_class_whose_samples_are_all_corrupt_raises_even_if_others_may_be_replaced(corrupt, place_of):
    path, bad, others = corrupt
    shards = ShardSet.open(path)
    for other in others:
        tar, offset, size = place_of(shards, other)
        flip_bit(tar, offset + size - 1)
    with pytest.raises(CorruptSampleError, match=f"none of the {len(others)} next of its class"):
        ShardSet.open(path, on_corrupt="replace").read(np.array([bad]))
    with pytest.raises(ValueError, match="'data.on_corrupt' is 'skip', give one of"):
        ShardSet.open(path, on_corrupt="skip")


# What people can mend.


def test_a_shard_deleted_on_s3_is_one_line_that_names_it(write_pixels, on_s3, open_cache, s3):
    url = on_s3(write_pixels())
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    shards = ShardSet.open(url, cache=open_cache())
    body = s3.client().get_object(Bucket=bucket, Key=f"{prefix}/shard-000003.tar")["Body"].read()
    s3.client().delete_object(Bucket=bucket, Key=f"{prefix}/shard-000003.tar")
    with pytest.raises(
        StorageError, match=f"{url}/shard-000003.tar is missing, though the index lists it"
    ) as caught:
        shards.read(np.arange(103))
    assert "\n" not in str(caught.value)
    # The cause gone, it goes on.
    s3.client().put_object(Bucket=bucket, Key=f"{prefix}/shard-000003.tar", Body=body)
    eventually_reads(shards)


def eventually_reads(shards: ShardSet) -> None:
    def reads() -> bool:
        try:
            return len(shards.read(np.arange(shards.num_samples))[0]) == shards.num_samples
        except StorageError:
            return False

    eventually(reads)


def test_an_index_older_than_the_tar_is_one_line_that_says_what_to_do(write_pixels, on_s3, open_cache, s3):
    url = on_s3(write_pixels())
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3.client().put_object(Bucket=bucket, Key=f"{prefix}/shard-000003.tar", Body=bytes(10240))
    shards = ShardSet.open(url, cache=open_cache())
    with pytest.raises(
        StorageError,
        match="has 10240 bytes, expected 20480: the index is older than the tar; restore it, or delete",
    ):
        shards.read(np.arange(103))


def test_a_set_replaced_under_its_name_is_another_set(write_pixels, on_s3, open_cache):
    first, second = write_pixels("first"), write_pixels("second", seed=4)
    url, cache = on_s3(first), open_cache()
    before = ShardSet.open(url, cache=cache)
    x = before.read(np.arange(103))[0]
    for name in open_storage(second).names():
        open_storage(url).write(name, open_storage(second).read(name))
    after = ShardSet.open(url, cache=cache)
    np.testing.assert_array_equal(
        after.read(np.arange(103))[0], ShardSet.open(second).read(np.arange(103))[0]
    )
    np.testing.assert_array_equal(before.read(np.arange(103))[0], x)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index/shards.json", b"{}", "shards.json: sha256 .* of different sets"),
        ("index/shards.json", None, "shards.json is not there, though there is a manifest"),
        ("index/samples.npy", None, "samples.npy is not there, though there is a manifest"),
        ("index/samples.npy", b"\x93NUMPY", "samples.npy cannot be mapped"),
        ("manifest.json", None, "not a committed shard set.*manifest.json is missing"),
    ],
)
def test_a_damaged_index_on_s3_is_refused_in_one_line_and_nothing_is_kept(
    write_pixels, on_s3, open_cache, name, content, message
):
    url, cache = on_s3(write_pixels()), open_cache()
    if content is None:
        open_storage(url).remove(name)
    else:
        open_storage(url).write(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(url, cache=cache)
    assert "\n" not in str(caught.value) and url in str(caught.value)
    assert cache.folder.used_bytes() == 0


def test_index_rows_of_another_hash_are_refused_whole_at_the_download(write_pixels, on_s3, open_cache):
    path = Path(write_pixels())
    rows = path / "index/samples.npy"
    flip_bit(rows, rows.stat().st_size - 3)  # of the last shard
    url = on_s3(str(path))
    with pytest.raises(ValueError, match="rows of shard-000010.tar do not have the hash"):
        ShardSet.open(url, cache=open_cache())


def test_a_budget_below_index_and_one_shard_is_refused_and_one_below_what_is_read_at_once_is_told(
    write_pixels, on_s3, open_cache, tmp_path, caplog
):
    url = on_s3(write_pixels())
    with pytest.raises(
        ValueError, match=r"'data.cache_gib' is .*, but the index and the largest shard .* raise it"
    ):
        ShardSet.open(url, cache=NodeCache(str(tmp_path / "tiny"), 20000 / GIB))
    with pytest.raises(ValueError, match="'data.cache_gib' is 0, give more than 0"):
        NodeCache(str(tmp_path / "none"), 0)
    config = DataConfig(
        paths=[url],
        cache=str(tmp_path / "small"),
        cache_gib=(2 * TAR_BYTES + 4096) / GIB,
        streams=8,
        workers=0,
    )
    data = open_data(config, seed=0)
    with caplog.at_level(logging.WARNING):
        read = [batch for [batch] in itertools.islice(data.batches(8, 0), 6)]
        eventually(lambda: "raise data.cache_gib" in caplog.text)
    assert len({i for batch in read for i in batch.sample_id.tolist()}) == 48  # it crawls, but it goes


def test_what_cannot_be_a_cache_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be the cache folder: .*data.cache"):
        NodeCache(str(tmp_path / "file"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StorageError, match="others may write here"):
        NodeCache(str(tmp_path / "open"))


def test_a_store_that_does_not_answer_in_time_is_an_error_and_not_a_hang(
    write_pixels, on_s3, faulty_s3, use_s3, open_cache
):
    url = on_s3(write_pixels())
    server, proxy = faulty_s3
    use_s3(server)
    shards = ShardSet.open(url, cache=open_cache(timeout_sec=1.0))
    proxy.faults = (Fault(1.0, (Kind.ERROR,)),)
    started = time.monotonic()
    with pytest.raises(StorageError, match="shard-000010.tar did not come into the cache .* within 1 s"):
        shards.read(np.array([102]))
    assert time.monotonic() - started < 10


def test_an_outage_that_outlasts_every_attempt_of_a_request_is_waited_out(
    write_pixels, on_s3, faulty_s3, use_s3, open_cache, source_images, monkeypatch, caplog
):
    path = write_pixels()
    url = on_s3(path)
    server, proxy = faulty_s3
    use_s3(server)
    monkeypatch.setattr("drwkv.s3.ATTEMPTS", 1)
    shards = ShardSet.open(url, cache=open_cache())
    proxy.faults = (Fault(1.0, (Kind.RESET,)),)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(shards.read, np.array([102]))
        eventually(lambda: "trying again" in caplog.text)
        assert not reading.done()
        proxy.faults = ()
        x, _ = reading.result(timeout=30)
    np.testing.assert_array_equal(x[0], source_images(path)[102])


def test_a_loader_is_closed_at_once_though_its_threads_wait_for_a_store_that_does_not_answer(
    write_pixels, on_s3, faulty_s3, use_s3, tmp_path
):
    url = on_s3(write_pixels())
    server, proxy = faulty_s3
    use_s3(server)
    config = DataConfig(
        paths=[url], cache=str(tmp_path / "cache"), streams=4, window=8, workers=2, prefetch=4
    )
    data = open_data(config, seed=0)
    (first,) = np.searchsorted(
        np.cumsum(data.sets[0].shard_sizes), data.order.sample_ids(np.array([0])), "right"
    )
    proxy.faults = (Fault(1.0, (Kind.ERROR,), match=f"shard-(?!{first:06d})"),)
    batches = data.batches(1, 0)
    next(batches)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 5


def test_no_such_bucket_and_access_denied_end_a_run_with_one_line_and_code_2(
    write_pixels, on_s3, use_s3, s3_as_stranger, applications, tmp_path
):
    url = on_s3(write_pixels())
    job = write_job(tmp_path, "s3://no-such-bucket-here/set", shards=20, num_batches=1)
    assert "s3://no-such-bucket-here: there is no such bucket" in applications.refused(RANK, str(job))
    use_s3(s3_as_stranger)
    job = write_job(tmp_path, url, shards=20, num_batches=1)
    assert "access denied" in applications.refused(RANK, str(job))


@pytest.mark.needs("unshare")
def test_a_full_disk_under_the_cache_evicts_first_and_then_ends_with_one_line(
    write_pixels, on_s3, applications, tmp_path
):
    """The budget allows 20 shards, the disk about 6 besides what is left free."""
    path = write_pixels()
    url = on_s3(path)
    disk = tmp_path / "disk"
    job = write_job(tmp_path, url, shards=20, num_batches=12, streams=1, cache=str(disk / "cache"))
    enough = on_small_disk(disk, sys.executable, RANK, str(job), size="1200k")
    finished = applications.start("-c", f"import os; os.execvp({enough[0]!r}, {enough!r})").wait()
    assert finished.codes == [0], finished.output
    too_little = on_small_disk(disk, sys.executable, RANK, str(job), size="1064k")
    error = applications.refused("-c", f"import os; os.execvp({too_little[0]!r}, {too_little!r})")
    assert f"{disk}/cache: no space left on its disk" in error
