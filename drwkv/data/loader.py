"""From the run's counter n to batches on this rank: which samples, read ahead by threads, as torch tensors.

Batches are a pure function of (seed, n): rank, world size, batch size, threads and restarts decide only
who reads what and when. The order of samples is order.py's law; reading them is shards.py's; making floats
or latents of them is drwkv.latents'.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from drwkv import rng
from drwkv.data.cache import (
    DEFAULT_GIB,
    DEFAULT_TIMEOUT_SEC,
    CachedSet,
    default_folder,
    give_up_when,
    open_cache,
)
from drwkv.data.manifest import Manifest, check_fits
from drwkv.data.order import NEVER, Mixture, Order, cut, streams_of_rank
from drwkv.data.selection import SelectedOrder, SelectionConfig, select
from drwkv.data.shards import ShardSet
from drwkv.storage import is_remote

log = logging.getLogger("drwkv")

INTERRUPT_SEC = 0.2  # how often who waits for a batch looks whether to go on
ANNOUNCED_BATCHES = 64  # by whose streams the cache learns what this rank reads; they repeat within C batches


@dataclass
class DataConfig:
    """Which shard sets a run reads, in what order, and how far ahead."""

    paths: list[str] = field(default_factory=list)  # committed shard sets: folders, or s3://bucket/prefix
    weights: list[float] | None = None  # share of each set, of any sum; None: in proportion to its samples
    streams: int = 64  # streams that the order is cut into; part of the run's identity, not of the hardware
    window: int = 8192  # samples of a stream that are shuffled together; part of the run's identity
    flip: bool = False  # mirror every second image, by (seed, n); moments need moments_flip in the set
    workers: int = 2  # reading threads of a process; 0: read in the training loop itself
    prefetch: int = 4  # global batches read ahead; no less than workers, or some of them wait
    # The samples that are taken of each set; by default all
    select: SelectionConfig = field(default_factory=SelectionConfig)
    cache: str | None = None  # folder on the node's disk for sets on S3; None: see drwkv.data.cache
    cache_gib: float = DEFAULT_GIB  # most GiB in that folder, all ranks and sets together
    # Longest wait for a shard from S3; less than parallel.timeout_sec
    timeout_sec: float = DEFAULT_TIMEOUT_SEC
    on_corrupt: str = "raise"  # what to do about a sample that stays corrupt: "raise" or "replace" it


class InterruptedRead(RuntimeError):
    """Waiting for data was given up, for whoever asked for it wants to end."""


@dataclass
class Batch:
    """One micro-batch of one rank. Where several sets are mixed, sample ids count on from set to set."""

    n: Tensor  # (B,) int64: the run's counter
    sample_id: Tensor  # (B,) int64: row of the set's index
    x: Tensor  # (B, C, H, W) uint8 pixels, or (B, 2C, h, w) float16 moments
    y: Tensor  # (B,) int64: labels

    def __len__(self) -> int:
        return len(self.n)


def flips(seed: int, n: np.ndarray) -> np.ndarray:
    """n (B,) int64 -> (B,) bool: whether the n-th sample is mirrored."""
    return (rng.bits(seed, rng.Purpose.FLIP, torch.from_numpy(n), 1)[:, 0] & 1).numpy().astype(bool)


class Loader:
    """This rank's micro-batches of the global batches, from any counter on.

    Example: `for micro_batches in loader.batches(start=0): ...`, each a list of `accumulate` Batch.
    Raises ValueError when the sets differ in shape, or flips are asked of moments stored without them.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        order: Order | Mixture,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int,
        flip: bool = False,
        workers: int = 0,
        prefetch: int = 4,
    ):
        check_alike(sets)
        if flip:
            check_flips(sets)
        if batch_size < world_size * accumulate:
            raise ValueError(
                f"batch_size {batch_size} is less than {world_size} ranks x accumulate {accumulate}: "
                "some would have no sample; raise batch_size or lower accumulate"
            )
        if workers < 0 or prefetch < 0:
            raise ValueError(f"data.workers is {workers} and data.prefetch {prefetch}: give 0 or more")
        self._sets, self._order, self._seed, self._flip = list(sets), order, seed, flip
        self._batch_size, self._workers, self._prefetch = batch_size, workers, prefetch
        self._place = (world_size, rank, accumulate)
        self._first_ids = np.cumsum([0] + [s.num_samples for s in sets])
        self._shape, self._dtype = sets[0].sample_shape, getattr(torch, sets[0].manifest.dtype)
        # A forked DataLoader worker cannot use CUDA, not even to pin memory.
        self._pin = torch.cuda.is_available() and torch.utils.data.get_worker_info() is None

    def batches(
        self, start: int, stride: int = 1, *, interrupted: Callable[[], bool] | None = None
    ) -> Generator[list[Batch], None, None]:
        """Micro-batches of [start, start + batch_size), then of every stride-th batch from there, for ever.

        What a thread raises is raised here, at the batch that it belongs to. Closing the generator ends its
        threads. `interrupted` is asked while a batch is waited for, if threads read it: once it says yes,
        InterruptedRead is raised, which ends the generator; a batch that is there is handed out before.
        """
        if start < 0:
            raise ValueError(f"the loader was to start at n = {start}, it must be 0 or more")
        first_counters = itertools.count(start, stride * self._batch_size)
        batches = (
            self._read_ahead(first_counters, interrupted)
            if self._workers
            else self._read_here(first_counters)
        )
        cached = [s.files for s in self._sets if isinstance(s.files, CachedSet)]
        return self._announced(cached, batches, start, stride * self._batch_size) if cached else batches

    def _announced(
        self, cached: Sequence[CachedSet], batches: Generator[list[Batch], None, None], n: int, step: int
    ) -> Generator[list[Batch], None, None]:
        """The same batches; meanwhile the node's cache knows what those that are not yet handed out need."""
        with contextlib.ExitStack() as while_reading, contextlib.closing(batches):
            for cache in {files.cache for files in cached}:
                while_reading.enter_context(cache.follow(lambda: self._distances(n)))
            for micro_batches in batches:
                n += step
                yield micro_batches

    def _distances(self, n: int) -> dict[CachedSet, np.ndarray]:
        """How many counters after `n` this rank may need each shard of the sets that are cached."""
        world_size, rank, _ = self._place
        streams = streams_of_rank(
            self._order, n, self._batch_size, world_size, rank, num_batches=ANNOUNCED_BATCHES
        )
        uses = self._order.next_uses(n, streams)
        distances = np.where(uses == NEVER, NEVER, uses - n)
        distances[uses < n + self._batch_size] = 0  # in use at once: one batch takes them in any order
        bounds = np.cumsum([len(s.shard_sizes) for s in self._sets])
        by_set = zip(self._sets, np.split(distances, bounds[:-1]), strict=True)
        return {s.files: distances for s, distances in by_set if isinstance(s.files, CachedSet)}

    def _read_here(self, first_counters: Iterable[int]) -> Generator[list[Batch], None, None]:
        for n0 in first_counters:
            yield [self._load(n) for n in self._pieces(n0)]

    def _read_ahead(
        self, first_counters: Iterable[int], interrupted: Callable[[], bool] | None
    ) -> Generator[list[Batch], None, None]:
        ended = threading.Event()
        pool = ThreadPoolExecutor(self._workers, "drwkv-loader", give_up_when, (ended,))
        waiting: deque[list[Future[Batch]]] = deque()
        try:
            for n0 in first_counters:
                waiting.append([pool.submit(self._load, n) for n in self._pieces(n0)])
                if len(waiting) > self._prefetch:
                    yield _results(waiting.popleft(), interrupted)
        finally:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _pieces(self, n0: int) -> list[np.ndarray]:
        n = np.arange(n0, n0 + self._batch_size, dtype=np.int64)
        return cut(n0, self._batch_size, self._order.streams_of(n), *self._place)

    def _load(self, n: np.ndarray) -> Batch:
        which, ids = self._order.locate(n)
        flip = flips(self._seed, n) if self._flip else None
        x = torch.empty((len(n), *self._shape), dtype=self._dtype, pin_memory=self._pin)
        if len(self._sets) == 1:
            _, y = self._sets[0].read(ids, flip, out=x.numpy())
        else:
            y = np.empty(len(n), np.int64)
            for k, shard_set in enumerate(self._sets):
                mine = np.flatnonzero(which == k)
                x.numpy()[mine], y[mine] = shard_set.read(ids[mine], None if flip is None else flip[mine])
        self._tell_replaced(n, which, ids, flip)
        sample_id = torch.from_numpy(ids + self._first_ids[which])
        counters, labels = torch.from_numpy(n), torch.from_numpy(y)
        if (
            self._pin
        ):  # a copy from memory that is not pinned may wait for all that the GPU has been given to do
            counters, labels = counters.pin_memory(), labels.pin_memory()
        return Batch(counters, sample_id, x, labels)

    def _tell_replaced(
        self, n: np.ndarray, which: np.ndarray, ids: np.ndarray, flip: np.ndarray | None
    ) -> None:
        for k, shard_set in enumerate(self._sets):
            for (sample_id, copy), other in list(shard_set.replaced.items()):
                mine = (which == k) & (ids == sample_id)
                if flip is not None and shard_set.manifest.kind == "moments":
                    mine &= flip == copy
                for at in n[mine].tolist():
                    log.warning("n = %d: sample %d stands in for %d, which is corrupt", at, other, sample_id)


def _results(futures: Sequence[Future[Batch]], interrupted: Callable[[], bool] | None) -> list[Batch]:
    """What the threads have read; InterruptedRead when it is not there yet and `interrupted` says yes."""
    while interrupted:
        done, missing = wait(futures, INTERRUPT_SEC, FIRST_EXCEPTION)
        if not missing or any(future.exception() for future in done):
            break
        if interrupted():
            raise InterruptedRead("reading was interrupted while a batch was waited for")
    return [future.result() for future in futures]


class ModelInput(Protocol):
    """What of a model's config decides which data fits it."""

    input_size: Any  # H, or (H, W)
    in_channels: int  # C
    num_classes: int | None  # None: unconditional


class Place(Protocol):
    """Which of how many processes this one is."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass
class Data:
    """What `open_data` opened and checked: the run's data, from which every rank takes its batches."""

    config: DataConfig
    seed: int  # of the run
    sets: list[ShardSet]  # in the config's order
    order: Order | Mixture  # the law of all n

    @property
    def manifest(self) -> Manifest:
        """Of the first set; all others have its kind, shape, classes, scale and shift."""
        return self.sets[0].manifest

    @property
    def num_samples(self) -> int:
        """Samples of one epoch of all sets: those that are selected."""
        return self.order.num_samples

    def check_fits(self, model: ModelInput) -> None:
        """ValueError in one line when a model of this config cannot be trained on these sets."""
        size = model.input_size
        for shard_set in self.sets:
            check_fits(
                shard_set.manifest,
                path=shard_set.path,
                input_size=size if isinstance(size, int) else (size[0], size[1]),
                in_channels=model.in_channels,
                num_classes=model.num_classes,
            )

    def batches(
        self,
        batch_size: int,
        start: int,
        *,
        world: Place | None = None,
        accumulate: int = 1,
        stride: int = 1,
        interrupted: Callable[[], bool] | None = None,
    ) -> Generator[list[Batch], None, None]:
        """The micro-batches of one rank of `world` from counter `start` on, as `Loader.batches`."""
        return Loader(
            self.sets,
            self.order,
            batch_size=batch_size,
            rank=world.rank if world else 0,
            world_size=world.size if world else 1,
            accumulate=accumulate,
            seed=self.seed,
            flip=self.config.flip,
            workers=self.config.workers,
            prefetch=self.config.prefetch,
        ).batches(start, stride, interrupted=interrupted)

    def identity(self) -> dict[str, Any]:
        """All that decides what the n-th sample is, as JSON holds it; a checkpoint keeps it beside n."""
        return {
            "seed": self.seed,
            "streams": self.config.streams,
            "window": self.config.window,
            "flip": self.config.flip,
            "select": asdict(self.config.select) if not self.config.select.takes_all else None,
            "index_hashes": [s.index_hash for s in self.sets],
            "mixture": self.order.counts.tolist() if isinstance(self.order, Mixture) else [1],
        }


def open_data(config: DataConfig, *, seed: int) -> Data:
    """Open the sets, refuse what does not go together (ValueError in one line), and build the order."""
    if not config.paths:
        raise ValueError("config key 'data.paths' is empty: name one shard set or more, data.paths=[FOLDER]")
    if config.weights is not None and len(config.weights) != len(config.paths):
        raise ValueError(
            f"config key 'data.weights' has {len(config.weights)} numbers for {len(config.paths)} "
            "data.paths: give one for each, or null"
        )
    config.select.check()
    cache = None
    if any(map(is_remote, config.paths)):
        cache = open_cache(config.cache or default_folder(), config.cache_gib, config.timeout_sec)
    sets = [ShardSet.open(path, cache=cache, on_corrupt=config.on_corrupt) for path in config.paths]
    check_alike(sets)
    if config.flip:
        check_flips(sets)
    orders = [_order_of(s, config, seed) for s in sets]
    order: Order | Mixture = orders[0]
    if len(sets) > 1:
        order = Mixture(orders, config.weights or [float(o.num_samples) for o in orders], seed=seed)
    return Data(config, seed, sets, order)


def _order_of(shard_set: ShardSet, config: DataConfig, seed: int) -> Order:
    """The order of those samples of one set that config.select takes."""
    if config.select.takes_all:
        return Order(shard_set.shard_sizes, seed=seed, streams=config.streams, window=config.window)
    # rows_of checks their hash: a label that is not what it was would change the selection silently.
    shards = range(len(shard_set.shard_sizes))
    labels = np.concatenate([shard_set.rows_of(shard)["label"] for shard in shards])
    selection = select(labels, shard_set.shard_sizes, config.select, where=shard_set.path)
    return SelectedOrder(selection, seed=seed, streams=config.streams, window=config.window)


def check_alike(sets: Sequence[ShardSet], *, key: str = "data.paths") -> None:
    """ValueError unless all sets, named by config key `key`, hold the same kind of thing."""
    first = sets[0].manifest
    for other in sets[1:]:
        for name in ("kind", "sample_shape", "num_classes", "dtype", "scale", "shift", "vae_hash"):
            if getattr(other.manifest, name) != getattr(first, name):
                raise ValueError(
                    f"shard sets that do not mix: {name} is {getattr(first, name)!r} in {sets[0].path}, "
                    f"{getattr(other.manifest, name)!r} in {other.path}; take one of them out of {key}"
                )
        names, others = first.class_names, other.manifest.class_names
        if names and others and names != others:
            label = next(label for label, (a, b) in enumerate(zip(names, others, strict=True)) if a != b)
            raise ValueError(
                f"shard sets that do not mix: class {label} is {names[label]!r} in {sets[0].path}, "
                f"{others[label]!r} in {other.path}; take one of them out of {key}"
            )


def check_flips(sets: Sequence[ShardSet]) -> None:
    """ValueError when a set cannot give mirrored samples."""
    for shard_set in sets:
        if shard_set.manifest.kind == "moments" and not shard_set.manifest.has_flip:
            raise ValueError(
                f"config key 'data.flip' is true, but {shard_set.path} holds no moments of mirrored images "
                "(has_flip is false), and a latent is never flipped: set data.flip=false, or encode those too"
            )
