"""The order law: each sample once an epoch, from n alone, whatever the layout, the batch and the world."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from drwkv.data.order import NEVER, Mixture, Order, cut, permute, streams_of_rank

few = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
layouts = st.lists(st.integers(1, 60), min_size=1, max_size=12)
stream_counts = st.integers(1, 90)
windows = st.one_of(st.integers(1, 40), st.just(8192))

small_layouts = st.lists(st.integers(1, 25), min_size=1, max_size=7)

IMAGENET = 1_281_167
IMAGENET_SHARDS = np.full(1252, IMAGENET // 1252)
IMAGENET_SHARDS[: IMAGENET % 1252] += 1


def epoch_of(order, epoch):
    return order.sample_ids(np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples))


def is_bijection(ids, size):
    return len(ids) == size and bool((np.bincount(ids, minlength=size) == 1).all())


def in_use(order, sizes, num, streams=None):
    """(num, shards) bool: at each n, the shards that the n of its window read; by reading every sample."""
    n = np.arange(num)
    epoch, p = np.divmod(n, order.num_samples)
    stream, q = p % order.streams, p // order.streams
    _, window = np.unique(np.stack([epoch, stream, q // order.window]), axis=1, return_inverse=True)
    used = np.zeros((window.max() + 1, len(sizes)), bool)
    used[window, np.repeat(np.arange(len(sizes)), sizes)[order.sample_ids(n)]] = True
    return used[window] if streams is None else used[window] & np.isin(stream, streams)[:, None]


def first_uses(used):
    """Of in_use, for each n: the first n' >= n at which each shard is in use."""
    uses = np.where(used, np.arange(len(used))[:, None], NEVER)
    return np.minimum.accumulate(uses[::-1])[::-1]


@pytest.fixture(scope="module")
def imagenet():
    return Order(IMAGENET_SHARDS, seed=1)


@few
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_any_size_and_key(size, key):
    assert is_bijection(permute(np.arange(size), size, key), size)


@pytest.mark.parametrize("size", [2**32 - 1, 2**31 + 11, 99_999_989])
def test_permute_of_a_large_domain_stays_inside_and_never_collides(size):
    image = permute(np.arange(size - 20_000, size), size, 12345)
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == 20_000
    assert stats.kstest(image / size, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [*range(2, 17), 63, 64, 100])
def test_permute_sends_each_pair_of_a_small_domain_everywhere_alike(size):
    keys = np.random.default_rng(size).integers(0, 2**64, 60_000, dtype=np.uint64)
    first, last = (permute(np.full(len(keys), i), size, keys) for i in (0, size - 1))
    counts = np.bincount(first * size + last, minlength=size * size).reshape(size, size)
    assert counts.trace() == 0
    assert stats.chisquare(counts[~np.eye(size, dtype=bool)]).pvalue > 1e-4


def test_permute_takes_a_size_and_a_key_for_each_index():
    index, size, key = np.array([0, 1, 7, 5000, 2]), np.array([1, 2, 8, 8192, 70]), np.arange(5)
    alone = [int(permute(index[i : i + 1], int(size[i]), int(key[i]))[0]) for i in range(5)]
    assert permute(index, size, key).tolist() == alone


@few
@given(sizes=layouts, seed=seeds, streams=stream_counts, window=windows, epoch=st.integers(0, 2000))
def test_every_epoch_is_a_bijection_for_any_layout(sizes, seed, streams, window, epoch):
    order = Order(sizes, seed=seed, streams=streams, window=window)
    assert order.num_samples == sum(sizes)
    assert is_bijection(epoch_of(order, epoch), sum(sizes))


@few
@given(sizes=layouts, seed=seeds, streams=stream_counts, window=windows, data=st.data())
def test_the_nth_sample_is_the_same_in_any_batch_and_order(sizes, seed, streams, window, data):
    order = Order(sizes, seed=seed, streams=streams, window=window)
    n = np.array(data.draw(st.lists(st.integers(0, 5 * sum(sizes)), min_size=1, max_size=40)))
    fresh = Order(sizes, seed=seed, streams=streams, window=window)
    alone = [int(fresh.sample_ids(np.array([i]))[0]) for i in n]
    assert order.sample_ids(n).tolist() == alone
    assert order.sample_ids(n[::-1]).tolist() == alone[::-1]


@few
@given(sizes=layouts, seed=seeds, streams=stream_counts, window=windows)
def test_a_stream_holds_the_same_samples_every_epoch_and_is_one_run_of_the_permuted_shards(
    sizes, seed, streams, window
):
    order = Order(sizes, seed=seed, streams=streams, window=window)
    num = sum(sizes)
    n = np.arange(num)
    stream = order.streams_of(n)
    assert np.array_equal(stream, n % streams)
    shard = np.repeat(np.arange(len(sizes)), sizes)
    ids = [epoch_of(order, epoch) for epoch in (0, 1, 7)]
    holders = np.zeros(len(sizes), int)
    for c in np.unique(stream):
        samples = [np.sort(i[stream == c]) for i in ids]
        assert np.array_equal(samples[0], samples[1]) and np.array_equal(samples[0], samples[2])
        held, counts = np.unique(shard[samples[0]], return_counts=True)
        holders[held] += 1
        # All shards of a stream are whole but the first and the last of its run.
        assert (counts < np.array(sizes)[held]).sum() <= 2
        for s in held:  # and what it holds of one shard is contiguous
            of_shard = samples[0][shard[samples[0]] == s]
            assert of_shard[-1] - of_shard[0] == len(of_shard) - 1
    assert holders.sum() <= len(sizes) + min(streams, num) - 1


def test_three_imagenet_epochs_are_bijections_and_differ(imagenet):
    epochs = [epoch_of(imagenet, epoch) for epoch in range(3)]
    assert all(is_bijection(ids, IMAGENET) for ids in epochs)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (epochs[i] == epochs[j]).mean() < 1e-3


def test_positions_of_a_window_are_shuffled_like_a_random_permutation(imagenet):
    n = np.arange(0, 8192 * 64, 64)  # the first window of stream 0
    ids = imagenet.sample_ids(n)
    shards = np.unique(np.searchsorted(IMAGENET_SHARDS.cumsum(), ids, "right"))
    assert 8 <= len(shards) <= 12, "a window of 8192 must span about 8 shards of 1023"
    rank = np.argsort(np.argsort(ids))
    assert abs(stats.spearmanr(np.arange(8192), rank).statistic) < 4 / 8192**0.5
    assert abs(stats.spearmanr(rank[:-1], rank[1:]).statistic) < 4 / 8192**0.5


def test_a_window_of_one_reads_each_span_straight_through():
    order = Order([50, 70, 90], seed=3, streams=2, window=1)
    ids = epoch_of(order, 4)
    for c in (0, 1):
        jumps = np.flatnonzero(np.diff(ids[c::2]) != 1)
        assert len(jumps) <= 3  # 4 spans at most: 3 shards and the cut
    assert not np.array_equal(ids, epoch_of(order, 5))


def test_each_window_of_each_stream_and_epoch_has_a_permutation_of_its_own():
    order = Order([1024], seed=3, streams=4, window=32)
    by_stream = np.stack([epoch_of(order, epoch).reshape(256, 4).T for epoch in (0, 1, 2)])
    inside = by_stream.reshape(-1, 32) % 32
    assert (np.sort(inside) == np.arange(32)).all()
    assert len(np.unique(inside, axis=0)) == 3 * 4 * 8


def test_a_window_only_changes_the_order_inside_itself():
    one, many = (Order([1000, 500], seed=3, streams=4, window=w) for w in (1, 25))
    straight, shuffled = epoch_of(one, 0), epoch_of(many, 0)
    assert not np.array_equal(straight, shuffled)
    for c in range(4):
        for start in range(0, 375, 25):
            piece = slice(start, start + 25)
            assert set(straight[c::4][piece]) == set(shuffled[c::4][piece])


def test_spans_and_shards_come_in_every_order():
    first = [
        int(Order([1, 1, 1, 1, 1], seed=seed, streams=1, window=1).sample_ids(np.array([seed % 7]))[0])
        for seed in range(800)
    ]
    assert stats.chisquare(np.bincount(first, minlength=5)).pvalue > 1e-3


def test_seeds_give_different_orders():
    orders = [epoch_of(Order(IMAGENET_SHARDS[:20], seed=seed, streams=8), 0) for seed in range(4)]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.01
            assert set(orders[i][::8]) != set(orders[j][::8]), "the shards are permuted before the cut"


def test_the_order_keeps_its_values():
    """Changing any of these changes every run: resumed runs would repeat and lose samples."""
    order = Order([30, 20, 50, 11], seed=42, streams=3, window=16)
    assert order.sample_ids(np.arange(12)).tolist() == [9, 68, 110, 5, 67, 108, 10, 63, 100, 6, 65, 109]
    assert order.sample_ids(10**12 + np.arange(6)).tolist() == [62, 107, 7, 58, 106, 6]
    which, counters = Mixture([order, order], [3, 1], seed=42, block=16).counters(10**12 + np.arange(6))
    assert which.tolist() == [0, 0, 1, 0, 0, 0]
    assert (counters % 10**9).tolist() == [2, 4, 3, 0, 3, 1]


@pytest.mark.parametrize("sizes, streams", [([1], 1), ([1], 64), ([3, 1, 2], 64), ([1] * 7, 3)])
def test_sets_smaller_than_the_streams_work(sizes, streams):
    order = Order(sizes, seed=0, streams=streams)
    for epoch in (0, 1, 2**40):
        assert is_bijection(epoch_of(order, epoch), sum(sizes))
    n = np.arange(512)  # many epochs in one batch
    assert np.array_equal(order.sample_ids(n), np.concatenate([order.sample_ids(n[i : i + 1]) for i in n]))


def test_no_counters_give_no_samples():
    nothing = np.arange(0)
    order = Order([5], seed=0)
    assert order.sample_ids(nothing).shape == order.streams_of(nothing).shape == (0,)
    assert [len(a) for a in Mixture([order], [1], seed=0).locate(nothing)] == [0, 0]


def test_a_set_answers_locate_as_a_mixture_of_one(imagenet):
    n = np.arange(1000, 1200)
    k, ids = imagenet.locate(n)
    assert np.array_equal(ids, imagenet.sample_ids(n)) and not k.any()


def test_a_cold_start_at_epoch_1399_takes_under_half_a_second():
    start_sec = time.perf_counter()
    ids = Order(IMAGENET_SHARDS, seed=5).sample_ids(1399 * IMAGENET + np.arange(512))
    assert time.perf_counter() - start_sec < 0.5
    assert len(np.unique(ids)) == 512


def test_a_hundred_million_samples_in_closed_form():
    sizes = np.full(100_000, 1000)
    tracemalloc.start()
    start_sec = time.perf_counter()
    order = Order(sizes, seed=5)
    built_sec = time.perf_counter() - start_sec
    for epoch in range(12):
        ids = order.sample_ids(epoch * 10**8 + 777 + np.arange(4096))
        assert len(np.unique(ids)) == 4096 and ids.min() >= 0 and ids.max() < 10**8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert built_sec < 1
    assert peak < 200e6
    n = np.arange(3, 10**8, 64 * 5)  # every fifth of stream 3: no two may meet
    assert len(np.unique(order.sample_ids(n))) == len(n)


def test_a_batch_of_512_is_found_at_a_million_samples_a_second(imagenet):
    seconds = []
    for i in range(200):
        n = np.arange(i * 512, (i + 1) * 512)
        start_sec = time.perf_counter()
        imagenet.sample_ids(n)
        seconds.append(time.perf_counter() - start_sec)
    assert 512 / min(seconds) > 1e6


def test_sixteen_nodes_fetch_about_83_of_1252_shards_each_in_an_epoch(imagenet):
    node = np.empty(IMAGENET, np.int64)
    for n0 in range(0, IMAGENET, 512):
        batch_size = min(512, IMAGENET - n0)
        streams = imagenet.streams_of(np.arange(n0, n0 + batch_size))
        for rank in range(16):
            (n,) = cut(n0, batch_size, streams, 16, rank, 1)
            node[n] = rank
    shard = np.searchsorted(IMAGENET_SHARDS.cumsum(), epoch_of(imagenet, 0), "right")
    fetched = [len(np.unique(shard[node == rank])) for rank in range(16)]
    assert min(fetched) >= 79 and max(fetched) < 120
    assert 80 <= np.mean(fetched) <= 90


@few
@given(
    n0=st.integers(0, 2**50), world=st.integers(1, 9), accumulate=st.integers(1, 5), extra=st.integers(0, 99),
    streams=st.integers(1, 70),
)  # fmt: skip
def test_the_ranks_pieces_are_the_batch_sorted_by_stream_and_even(n0, world, accumulate, extra, streams):
    batch_size = world * accumulate + extra
    stream = np.random.default_rng(n0).integers(0, streams, batch_size)
    ranks = [cut(n0, batch_size, stream, world, rank, accumulate) for rank in range(world)]
    assert all(len(pieces) == accumulate for pieces in ranks)
    expected = sorted(range(n0, n0 + batch_size), key=lambda n: (stream[n - n0], n))
    assert np.concatenate([piece for pieces in ranks for piece in pieces]).tolist() == expected
    sizes = [[len(piece) for piece in pieces] for pieces in ranks]
    assert min(map(min, sizes)) >= 1 and max(map(max, sizes)) - min(map(min, sizes)) <= 1
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1


@few
@given(world=st.integers(1, 8), accumulate=st.integers(1, 8), n0=st.integers(0, 10**6))
def test_accumulation_does_not_change_what_a_rank_reads(world, accumulate, n0):
    streams = Order(IMAGENET_SHARDS[:8], seed=1).streams_of(np.arange(n0, n0 + 100))
    for rank in range(world):
        whole = cut(n0, 100, streams, world, rank, 1)[0]
        assert np.array_equal(np.concatenate(cut(n0, 100, streams, world, rank, accumulate)), whole)


@few
@given(sizes=small_layouts, seed=seeds, streams=st.integers(1, 30), window=windows, data=st.data())
def test_the_next_use_of_each_shard_is_the_first_counter_of_a_window_that_reads_it(
    sizes, seed, streams, window, data
):
    order = Order(sizes, seed=seed, streams=streams, window=window)
    some = data.draw(st.none() | st.lists(st.integers(0, streams - 1), max_size=4))
    some = None if some is None else np.array(some, int)
    expected = first_uses(in_use(order, sizes, 4 * order.num_samples, some))
    for n in range(2 * order.num_samples + 1):
        assert np.array_equal(order.next_uses(n, some), expected[n])


@few
@given(
    layouts=st.lists(small_layouts, min_size=1, max_size=3), seed=seeds, block=st.integers(12, 40), data=st.data()
)  # fmt: skip
def test_the_next_uses_of_a_mixture_are_those_of_its_sets_by_whole_blocks(layouts, seed, block, data):
    orders = [Order(sizes, seed=seed, streams=4 + i, window=5) for i, sizes in enumerate(layouts)]
    mixture = Mixture(orders, [1 + i for i in range(len(orders))], seed=seed, block=block)
    all_streams = sum(order.streams for order in orders)
    some = np.array(data.draw(st.lists(st.integers(0, all_streams - 1), min_size=1)))
    num_blocks = 2 + max(
        3 * o.num_samples // count for o, count in zip(orders, mixture.counts.tolist(), strict=True)
    )
    of_block, first_stream = [], 0
    for order, sizes, count in zip(orders, layouts, mixture.counts, strict=True):
        used = in_use(order, sizes, num_blocks * count, some - first_stream)
        of_block.append(used.reshape(num_blocks, count, -1).any(axis=1))
        first_stream += order.streams
    used = np.repeat(np.concatenate(of_block, axis=1), block, axis=0)
    assert mixture.num_shards == used.shape[1]
    expected = first_uses(used)
    for n in np.random.default_rng(seed).integers(0, (num_blocks // 3 + 1) * block, 50).tolist():
        assert np.array_equal(mixture.next_uses(n, some), expected[n])


@few
@given(
    seed=seeds, n=st.integers(0, 10**6), world=st.integers(1, 5), extra=st.integers(0, 40), mixed=st.booleans(),
)  # fmt: skip
def test_a_rank_reads_only_its_streams_and_no_shard_before_its_next_use(seed, n, world, extra, mixed):
    layouts = [[11, 30, 25], [40, 9]] if mixed else [[11, 30, 25]]
    orders = [Order(sizes, seed=seed, streams=8, window=6) for sizes in layouts]
    order = Mixture(orders, [2, 1], seed=seed, block=30) if mixed else orders[0]
    batch_size, num_batches = world + extra, 12
    counters = np.arange(n, n + num_batches * batch_size)
    streams, (which, ids) = order.streams_of(counters).tolist(), order.locate(counters)
    first_row, first_shard = np.array([0, 66])[which], np.cumsum([0, *itertools.chain(*layouts)])
    shards = np.searchsorted(first_shard, ids + first_row, "right") - 1
    for rank in range(world):
        mine = streams_of_rank(order, n, batch_size, world, rank, num_batches=num_batches)
        uses = order.next_uses(n, mine)
        seen = set()
        for start in range(0, len(counters), batch_size):
            by_stream = sorted(range(start, start + batch_size), key=lambda i: (streams[i], i))
            for i in by_stream[rank * batch_size // world : (rank + 1) * batch_size // world]:
                seen.add(streams[i])
                assert n <= uses[shards[i]] <= counters[i]
        assert mine.tolist() == sorted(seen)


def test_the_streams_of_a_node_are_those_of_its_ranks(imagenet):
    for n in (0, IMAGENET - 3000):
        ranks = [streams_of_rank(imagenet, n, 500, 16, rank, num_batches=9) for rank in range(16)]
        for node in range(4):
            together = np.unique(np.concatenate(ranks[4 * node : 4 * node + 4]))
            assert streams_of_rank(imagenet, n, 500, 4, node, num_batches=9).tolist() == together.tolist()
    assert streams_of_rank(imagenet, 0, 512, 16, 3, num_batches=256).tolist() == [12, 13, 14, 15]


def test_a_cache_that_keeps_what_is_needed_soonest_fetches_each_shard_once_an_epoch():
    """16 shards of 100 a rank, of which two windows hold 8: room for 10 is enough, and the rule finds it."""
    sizes = np.full(64, 100)
    order = Order(sizes, seed=2, streams=8, window=200)
    cached, fetched = set(), []
    for n0 in range(0, 6400, 32):
        mine = streams_of_rank(order, n0, 32, 4, 1, num_batches=8)
        (n,) = cut(n0, 32, order.streams_of(np.arange(n0, n0 + 32)), 4, 1, 1)
        uses = order.next_uses(n0, mine)
        for shard in np.unique(order.sample_ids(n) // 100).tolist():
            if shard not in cached:
                fetched.append(shard)
                cached.add(shard)
            if len(cached) > 10:
                cached.remove(max(cached, key=lambda s: uses[s]))
    assert len(fetched) == len(set(fetched)) and 16 <= len(fetched) <= 18


@pytest.mark.parametrize("num_shards, limit_sec", [(1252, 0.010), (12_000, 0.1)])
def test_the_next_uses_of_all_shards_are_found_in_milliseconds(num_shards, limit_sec):
    order = Order(np.full(num_shards, 1023), seed=1)
    seconds = []
    for epoch in range(5):
        start_sec = time.perf_counter()
        order.next_uses(epoch * 2 * order.num_samples + 12345)  # two epochs that were not planned before
        seconds.append(time.perf_counter() - start_sec)
    assert min(seconds) < limit_sec


@few
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=4), seed=seeds, block=st.integers(80, 200),
    first=st.integers(0, 10**9),
)  # fmt: skip
def test_every_block_holds_the_same_count_of_each_set_by_largest_remainder(weights, seed, block, first):
    orders = [Order([7 + i, 11], seed=seed) for i in range(len(weights))]
    mixture = Mixture(orders, weights, seed=seed, block=block)
    exact = np.array(weights) / sum(weights) * block
    assert mixture.counts.sum() == block and np.abs(mixture.counts - exact).max() < 1
    raised, kept = (exact - np.floor(exact))[mixture.counts > exact], exact[mixture.counts <= exact] % 1
    assert not len(raised) or not len(kept) or raised.min() >= kept.max() - 1e-9
    n = np.arange(first * block, (first + 3) * block)
    k, counters = mixture.counters(n)
    for b in range(3):
        counts = np.bincount(k[b * block : (b + 1) * block], minlength=len(weights))
        assert np.array_equal(counts, mixture.counts)
    for i, count in enumerate(mixture.counts):
        assert np.array_equal(np.sort(counters[k == i]), np.arange(first * count, (first + 3) * count))


def test_each_set_of_a_mixture_goes_through_its_own_epochs():
    orders = [Order([10, 20], seed=1, streams=4), Order([5, 5, 6], seed=2, streams=3)]
    mixture = Mixture(orders, [2, 1], seed=3, block=48)
    assert mixture.counts.tolist() == [32, 16]
    n = np.arange(48 * 15)
    k, ids = mixture.locate(n)
    assert (np.bincount(ids[k == 0]) == 16).all() and np.bincount(ids[k == 0]).size == 30
    assert (np.bincount(ids[k == 1]) == 15).all() and np.bincount(ids[k == 1]).size == 16
    which, counters = mixture.counters(n)
    assert np.array_equal(which, k)
    assert np.array_equal(ids[k == 1], orders[1].sample_ids(counters[k == 1]))
    streams = mixture.streams_of(n)
    assert set(streams[k == 0]) == {0, 1, 2, 3} and set(streams[k == 1]) == {4, 5, 6}
    alone = [[int(a[0]) for a in mixture.locate(n[i : i + 1])] for i in (0, 100, 700)]
    assert alone == [[k[i], ids[i]] for i in (0, 100, 700)]


def test_blocks_and_seeds_of_a_mixture_are_permuted_differently():
    orders = [Order([100], seed=1), Order([100], seed=2)]
    k = [Mixture(orders, [1, 1], seed=seed, block=64).locate(np.arange(64 * 50))[0] for seed in (0, 1)]
    assert len(np.unique(k[0].reshape(50, 64), axis=0)) == 50
    assert 0.4 < (k[0] == k[1]).mean() < 0.6
    assert stats.chisquare(k[0].reshape(50, 64).sum(0)).pvalue > 1e-3


def test_equal_remainders_go_to_the_first_sets():
    orders = [Order([9], seed=0)] * 3
    assert Mixture(orders, [1, 1, 1], seed=0, block=1024).counts.tolist() == [342, 341, 341]


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: Order([], seed=0), r"shape \(0,\)"),
        (lambda: Order([3, 0], seed=0), "a shard of 0 samples"),
        (lambda: Order([3, -4], seed=0), "a shard of -4 samples"),
        (lambda: Order([3.5], seed=0), "3.5 samples"),  # type: ignore[list-item]
        (lambda: Order([3], seed=-1), "seed is -1"),
        (lambda: Order([3], seed=0, streams=0), "streams is 0"),
        (lambda: Order([3], seed=0, window=0), "window 0"),
        (lambda: Order([3], seed=0).sample_ids(np.array([4, -2])), "-2"),
        (lambda: Order([3], seed=0).sample_ids(np.array([0.5])), "float64"),
        (lambda: Order([3], seed=0).streams_of(np.array([[1]])), r"\(1, 1\)"),
        (lambda: Order([3], seed=0).next_uses(-1), "-1"),
        (lambda: streams_of_rank(Order([3], seed=0), 0, 8, 4, 4, num_batches=1), "rank 4 of 4"),
        (lambda: Mixture([], [], seed=0), "0 sets"),
        (lambda: Mixture([Order([3], seed=0)], [1, 2], seed=0), "1 sets"),
        (lambda: Mixture([Order([3], seed=0)], [0.0], seed=0), r"\[0.0\]"),
        (lambda: Mixture([Order([3], seed=0)], [float("nan")], seed=0), "nan"),
        (lambda: Mixture([Order([3], seed=0)], [1], seed=0, block=0), "block is 0"),
        (lambda: Mixture([Order([3], seed=0)] * 2, [1, 1e-6], seed=0), "set 1, weight 1e-06"),
        (lambda: cut(0, 7, np.zeros(7, int), 4, 0, 2), "7 samples for 4 x 2"),
        (lambda: cut(0, 8, np.zeros(7, int), 4, 0, 2), "7 streams for 8"),
        (lambda: cut(-8, 8, np.zeros(8, int), 4, 0, 2), "n0 is -8"),
        (lambda: cut(0, 8, np.zeros(8, int), 4, 4, 2), "rank 4 of 4"),
        (lambda: cut(0, 8, np.zeros(8, int), 4, 0, 0), "accumulate 0"),
    ],
)
def test_what_cannot_be_ordered_raises_a_value_error_with_the_number(call, named):
    with pytest.raises(ValueError, match=named) as error:
        call()
    assert "\n" not in str(error.value)
