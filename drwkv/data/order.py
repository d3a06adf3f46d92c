"""Which sample is the n-th of a run: pure integer arithmetic on numpy arrays of n, started anywhere in O(1).

The law. With M samples an epoch, epoch = n div M and p = n mod M. Shards are permuted by a keyed
permutation, laid end to end and cut by sample position into C streams; the streams are the same every
epoch. The p-th sample comes from stream p mod C, at its position p div C. Inside (epoch, stream) the spans
of shards are permuted, and the samples inside windows of W positions by a keyed Feistel permutation, so a
batch that is sorted by stream reads few shards and every sample comes up once an epoch.

Here: the order of one set, of a mixture of sets, when each shard is needed next, and the cut of a global
batch into the ranks' pieces. Not here: which samples a set has (selection.py), reading one (shards.py), and
batches, threads and flips (loader.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drwkv.rng import Purpose, key64

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_SHARDS, _SPANS, _WINDOWS, _BLOCKS = range(4)  # first word of a key: what is permuted
_GOLDEN = 0x9E3779B97F4A7C15
_CACHED_EPOCHS = 4
NEVER = np.iinfo(np.int64).max  # the next use of a shard that has none
_SMALL_DOMAIN, _SMALL_ROUNDS, _ROUNDS = 64, 24, 8  # a round on digits of few values mixes little


def permute(index: npt.NDArray[np.integer], size: npt.ArrayLike, key: npt.ArrayLike) -> Ints:
    """A keyed permutation of range(size), applied to each index: closed form, no table.

    index (N,) int64 in [0, size); size, 1 to 2**32 - 1, and key, 64 bits, are numbers or (N,), one for each
    index. Returns (N,) int64.

    A Feistel network on the two digits of the index in mixed radix (a, b), where a b is size or slightly
    more, with addition mod a and mod b in place of xor (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002). What lands beyond size walks its cycle until it is back inside.
    """
    position = np.array(index, np.uint64)
    sizes = np.broadcast_to(np.asarray(size, np.uint64), position.shape)
    keys = np.broadcast_to(np.asarray(key, np.uint64), position.shape)
    small = sizes < _SMALL_DOMAIN
    if not small.any():
        return _walk(position, sizes, keys, _ROUNDS).view(np.int64)
    for chosen, rounds in ((small, _SMALL_ROUNDS), (~small, _ROUNDS)):
        position[chosen] = _walk(position[chosen], sizes[chosen], keys[chosen], rounds)
    return position.view(np.int64)


class Order:
    """The order of one set: n -> row of the set's index, where rows are numbered shard after shard.

    shard_sizes: samples in each shard, all >= 1. streams (C) is the finest cut of a batch that keeps I/O
    local; window (W) is how many positions of a stream are shuffled together. Both belong to the run's
    identity, and so do seed and shard_sizes. Memory: a few words for each shard and each recent epoch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | npt.NDArray[np.integer],
        *,
        seed: int,
        streams: int = 64,
        window: int = 8192,
    ) -> None:
        sizes = np.asarray(shard_sizes)
        if sizes.ndim != 1 or not len(sizes):
            raise ValueError(f"Order: shard_sizes has shape {sizes.shape}, give sizes of 1 or more shards")
        if not np.issubdtype(sizes.dtype, np.integer) or sizes.min() < 1:
            raise ValueError(f"Order: a shard of {sizes.min()} samples ({sizes.dtype}), give integers >= 1")
        if not (1 <= streams < 1 << 31 and 1 <= window < 1 << 32):
            raise ValueError(f"Order: streams is {streams} and window {window}, give 1 or more for both")
        self.seed, self.streams, self.window = seed, streams, window
        self.num_samples, self.num_shards = int(sizes.sum(dtype=np.int64)), len(sizes)

        # Cut the permuted shards at the bounds of streams: C + 1 bounds, of which many meet if C > M.
        shard_first = starts(sizes)
        shards = _shuffled(len(sizes), key64(seed, Purpose.ORDER, _SHARDS))
        shard_at = starts(sizes[shards])
        c = np.arange(streams + 1, dtype=np.int64)
        self._stream_at = c * (self.num_samples // streams) + np.minimum(c, self.num_samples % streams)
        self._span_at = np.unique(np.concatenate([shard_at, self._stream_at[:-1]]))
        self._span_at = self._span_at[self._span_at < self.num_samples]
        holder = np.searchsorted(shard_at, self._span_at, "right") - 1
        self._span_shard = shards[holder]
        self._span_first = shard_first[self._span_shard] + self._span_at - shard_at[holder]
        self._span_size = np.diff(self._span_at, append=self.num_samples)
        self._span_stream = np.searchsorted(self._stream_at, self._span_at, "right") - 1
        self._plan = functools.lru_cache(_CACHED_EPOCHS)(self._plan_epoch)

    def sample_ids(self, n: npt.NDArray[np.integer]) -> Ints:
        """n (N,) int64 >= 0, in any order and of any epochs -> (N,) rows of the set's index."""
        n = _counters(n)
        if not n.size:
            return n.copy()
        first, last = int(n.min()) // self.num_samples, int(n.max()) // self.num_samples
        if first == last:
            return self._ids_in_epoch(first, n - first * self.num_samples)
        ids = np.empty_like(n)
        epochs, p = np.divmod(n, self.num_samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._ids_in_epoch(int(epoch), p[chosen])
        return ids

    def streams_of(self, n: npt.NDArray[np.integer]) -> Ints:
        """n (N,) int64 >= 0 -> (N,) the stream, 0 to C - 1, that each comes from."""
        return _counters(n) % self.num_samples % self.streams

    def next_uses(self, n: int, streams: npt.NDArray[np.integer] | None = None) -> Ints:
        """When each shard may be touched next: (num_shards,) the least counter >= n, NEVER where there is none.

        Exact to the window: inside one any sample may come at any place, so its shards count as in use from its
        first counter to its last. `streams`, such as streams_of_rank gives, restricts this to what they read;
        None: all. The shard to let go of, where room is short, is the one with the greatest.
        """
        _counters(np.array([n]))
        uses = np.full(self._span_shard.max() + 1, NEVER)
        stream = self._span_stream  # spans are permuted inside their stream, so this holds in every epoch
        wanted = np.ones(len(stream), bool) if streams is None else np.isin(stream, streams)
        # A stream touches each of its shards in every epoch, so none waits longer than into the next.
        epoch = n // self.num_samples
        for e in (epoch, epoch + 1):
            _, spans, span_at, _ = self._plan(e)
            first_q = span_at - self._stream_at[stream]
            last_q = first_q + self._span_size[spans] - 1
            opens_q = first_q // self.window * self.window
            closes_q = np.minimum((last_q // self.window + 1) * self.window, np.diff(self._stream_at)[stream])
            at_0 = e * self.num_samples + stream  # the counter of the stream's position 0
            q = np.maximum(opens_q, -((at_0 - n) // self.streams))
            usable = wanted & (q < closes_q)
            np.minimum.at(uses, self._span_shard[spans[usable]], (at_0 + q * self.streams)[usable])
        return uses

    def locate(self, n: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
        """As Mixture.locate, for a mixture of this set alone: zeros, and the sample ids."""
        ids = self.sample_ids(n)
        return np.zeros_like(ids), ids

    def _ids_in_epoch(self, epoch: int, p: Ints) -> Ints:
        epoch_key, _, span_at, span_shift = self._plan(epoch)
        q = p // self.streams
        stream = p - q * self.streams
        w = q // self.window
        window_at = w * self.window
        start = self._stream_at[stream]
        size = np.minimum(self._stream_at[stream + 1] - start - window_at, self.window)
        key = _mix((stream << 32 ^ w).view(np.uint64) * np.uint64(_GOLDEN) + epoch_key)
        at = start + window_at + permute(q - window_at, size, key)
        return at + span_shift[np.searchsorted(span_at, at, "right") - 1]

    def _plan_epoch(self, epoch: int) -> tuple[np.uint64, Ints, Ints, Ints]:
        """The epoch's window key, its spans as they come, their starts, and what makes a position a sample id."""
        span_keys = sort_keys(len(self._span_at), key64(self.seed, Purpose.ORDER, _SPANS, epoch))
        spans = np.lexsort((span_keys, self._span_stream))
        span_at = starts(self._span_size[spans])
        window_key = np.uint64(key64(self.seed, Purpose.ORDER, _WINDOWS, epoch))
        return window_key, spans, span_at, self._span_first[spans] - span_at


class Mixture:
    """Sets mixed by weight, each in its own order and for as many epochs of its own as its share asks.

    Every block of `block` counters holds a fixed count of each set: block * weight / sum(weights), rounded
    by largest remainder (the lower set first among equals); `counts` are the numbers as they are. A keyed
    permutation of each block's slots says which n are whose. In block b the counters of set k are
    b counts[k] up to (b + 1) counts[k], each once, so none needs the history.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], *, seed: int, block: int = 1024
    ) -> None:
        shares = np.asarray(weights, np.float64)
        if not orders or shares.shape != (len(orders),):
            raise ValueError(f"Mixture: {len(orders)} sets, weights {list(weights)}: give one weight a set")
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise ValueError(f"Mixture: the weights are {list(weights)}, give positive numbers")
        if not 1 <= block < 1 << 32:
            raise ValueError(f"Mixture: block is {block}, give 1 to 2**32 - 1")
        exact = shares / shares.sum() * block
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
        if counts.min() < 1:
            k = int(counts.argmin())
            raise ValueError(f"Mixture: set {k}, weight {weights[k]}, has no slot of {block}, raise block")
        self.orders, self.block, self.counts = tuple(orders), block, counts
        self.num_samples = sum(order.num_samples for order in orders)
        self.num_shards = sum(order.num_shards for order in orders)
        self._slot_at = starts(counts)
        self._stream_at = starts(np.array([order.streams for order in orders]))
        self._key = np.uint64(key64(seed, Purpose.ORDER, _BLOCKS))

    def counters(self, n: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
        """n (N,) int64 >= 0 -> (N,) which set, and (N,) that set's own n."""
        n = _counters(n)
        b = n // self.block
        key = _mix(b.view(np.uint64) * np.uint64(_GOLDEN) + self._key)
        slot = permute(n - b * self.block, self.block, key)
        k = np.searchsorted(self._slot_at, slot, "right") - 1
        return k, b * self.counts[k] + slot - self._slot_at[k]

    def locate(self, n: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
        """n (N,) int64 >= 0 -> (N,) which set, and (N,) rows of that set's index."""
        k, own_n = self.counters(n)
        ids = np.empty_like(own_n)
        for i, order in enumerate(self.orders):
            ids[k == i] = order.sample_ids(own_n[k == i])
        return k, ids

    def streams_of(self, n: npt.NDArray[np.integer]) -> Ints:
        """n (N,) int64 >= 0 -> (N,) streams, numbered set after set so that those of two sets differ."""
        k, own_n = self.counters(n)
        streams = self._stream_at[k]
        for i, order in enumerate(self.orders):
            streams[k == i] += order.streams_of(own_n[k == i])
        return streams

    def next_uses(self, n: int, streams: npt.NDArray[np.integer] | None = None) -> Ints:
        """As Order.next_uses, where shards, like streams, are numbered set after set; exact to the block, too."""
        b = n // self.block
        uses = []
        for order, count, stream_at in zip(self.orders, self.counts.tolist(), self._stream_at, strict=True):
            own_n = order.next_uses(b * count, None if streams is None else streams - stream_at)
            uses.append(np.where(own_n == NEVER, NEVER, np.maximum(n, own_n // count * self.block)))
        return np.concatenate(uses)


def cut(
    n0: int, batch_size: int, streams: npt.NDArray[np.integer], world_size: int, rank: int, accumulate: int
) -> list[Ints]:
    """A rank's micro-batches of the global batch [n0, n0 + batch_size): `accumulate` arrays of n.

    streams (batch_size,) are those of the batch, in order of n. The batch is sorted by stream (by n within
    one) and cut into world_size * accumulate contiguous pieces whose sizes differ by one at most, as do the
    ranks' sums; a rank's pieces are neighbours, so what it reads does not depend on `accumulate`.
    """
    pieces = world_size * accumulate
    if accumulate < 1 or not 0 <= rank < world_size:
        raise ValueError(f"cut: rank {rank} of {world_size}, accumulate {accumulate}: give a rank it has")
    if batch_size < pieces:
        raise ValueError(f"cut: {batch_size} samples for {world_size} x {accumulate} pieces: raise the batch")
    if n0 < 0 or len(streams) != batch_size:
        raise ValueError(f"cut: n0 is {n0}, {len(streams)} streams for {batch_size} samples: give one each")
    n = n0 + np.argsort(streams, kind="stable")
    bounds = [i * batch_size // pieces for i in range(rank * accumulate, (rank + 1) * accumulate + 1)]
    return [n[start:end] for start, end in itertools.pairwise(bounds)]


def streams_of_rank(
    order: Order | Mixture, n: int, batch_size: int, world_size: int, rank: int, *, num_batches: int
) -> Ints:
    """The streams, rising, that `cut` gives a rank in the next `num_batches` global batches from `n` on.

    Exact, by looking at each batch, about 20 us for one of 512 (of a mixture, 200). A node of L ranks is
    rank `node` of world_size / L. A set's boundaries between ranks repeat within C batches, and stand still
    where C divides the batch; only a batch over the end of an epoch differs.
    """
    seen = []
    for n0 in range(n, n + num_batches * batch_size, batch_size):
        streams = order.streams_of(np.arange(n0, n0 + batch_size))
        (mine,) = cut(n0, batch_size, streams, world_size, rank, accumulate=1)
        seen.append(np.unique(streams[mine - n0]))
    return np.unique(np.concatenate(seen))


def _walk(position: Words, size: Words, key: Words, rounds: int) -> Words:
    a = np.ceil(np.sqrt(size)).astype(np.uint64)  # any a >= 1 is right, the root walks least
    b = (size + a - np.uint64(1)) // a
    position = _feistel(position, a, b, key, rounds)
    outside = np.flatnonzero(position >= size)
    while outside.size:
        position[outside] = _feistel(position[outside], a[outside], b[outside], key[outside], rounds)
        outside = outside[position[outside] >= size[outside]]
    return position


def _feistel(position: Words, a: Words, b: Words, key: Words, rounds: int) -> Words:
    """One pass over range(a b): position = high b + low, and the digits take turns to move."""
    high = position // b
    low = position - high * b
    for i in range(0, rounds, 2):
        high = (high + (_mix(low + (key + _round_key(i))) >> np.uint64(32))) % a
        low = (low + (_mix(high + (key + _round_key(i + 1))) >> np.uint64(32))) % b
    return high * b + low


@functools.cache
def _round_key(i: int) -> np.uint64:
    return np.uint64((i + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF)


def _mix(x: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def sort_keys(size: int, key: int) -> Words:
    """(size,) keys to sort by, all different, each a function of its place and the 64-bit `key`."""
    return _mix(np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def _shuffled(size: int, key: int) -> Ints:
    """A keyed permutation of range(size) as a table, for what has a table anyway."""
    return np.argsort(sort_keys(size, key))


def starts(sizes: npt.NDArray[np.integer]) -> Ints:
    """Where each of several runs laid end to end begins: the sums of the sizes before it."""
    return np.cumsum(sizes, dtype=np.int64) - sizes


def _counters(n: npt.NDArray[np.integer]) -> Ints:
    n = np.asarray(n)
    if not np.issubdtype(n.dtype, np.integer) or (n.size and n.min() < 0):
        raise ValueError(f"order: n holds {n.min() if n.size else n.dtype}, of {n.dtype}: give integers >= 0")
    if n.ndim != 1:
        raise ValueError(f"order: n has shape {n.shape}, give (N,)")
    return n.astype(np.int64, copy=False)
