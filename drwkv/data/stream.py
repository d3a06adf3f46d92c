"""Shard sets as a `torch.utils.data.IterableDataset`, for training loops that use nothing else of this project.

    stream = ShardStream("shards/train", batch_size=256, seed=1)
    for batch in torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2):
        ...
        save(stream.state_after(batch))   # later: stream.load_state_dict(...)

It also opens a `webdataset.DataPipeline(stream, webdataset.map(...))`. Here are ranks, DataLoader workers, epochs
and the state. The batches are those that the trainer would get, from loader.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from drwkv.data.cache import DEFAULT_GIB, DEFAULT_TIMEOUT_SEC
from drwkv.data.loader import Data, DataConfig, open_data
from drwkv.data.selection import SelectionConfig

StreamBatch = dict[str, Tensor]  # the fields of loader.Batch by name: n, sample_id, x, y


class ShardStream(IterableDataset[StreamBatch]):
    """This rank's batches, in the order of the law of (seed, n), whatever reads them.

    paths: one folder of a shard set or several. batch_size: samples of a global batch, over all ranks; a rank gets
    its piece, pieces differ by one at most. start: the counter n to begin at. epochs: end after so many epochs,
    counted from n = 0, with a last batch of what is left (of fewer samples than ranks, the last ranks get none);
    None: never end. rank, world_size: both or neither; None: those of torch.distributed where it is set up, else
    RANK and WORLD_SIZE of the environment, else 0 of 1. workers: reading threads of each process. For streams,
    window, weights, flip, prefetch, cache, cache_gib, timeout_sec and on_corrupt see loader.DataConfig, for select
    selection.SelectionConfig.

    Each batch is a dict of tensors: x (B, C, H, W) uint8 pixels or (B, 2C, h, w) float16 moments, y (B,) int64
    labels, n (B,) int64 counters, sample_id (B,) int64. Worker w of k in a DataLoader reads the batches w, w + k,
    ..., so that they come in the same order as without. Every `iter` begins at the start, or where load_state_dict
    put it; epochs differ by n, so to go into the next one load the state after the last.

    Raises ValueError in one line for what cannot be opened or does not go together.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int,
        seed: int = 0,
        streams: int = 64,
        window: int = 8192,
        weights: Sequence[float] | None = None,
        select: SelectionConfig | None = None,
        flip: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        start: int = 0,
        epochs: int | None = None,
        workers: int = 2,
        prefetch: int = 4,
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = DEFAULT_GIB,
        timeout_sec: float = DEFAULT_TIMEOUT_SEC,
        on_corrupt: str = "raise",
    ) -> None:
        super().__init__()
        folders = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self._config = DataConfig(
            paths=[os.fspath(folder) for folder in folders],
            weights=None if weights is None else list(weights),
            streams=streams,
            window=window,
            flip=flip,
            workers=workers,
            prefetch=prefetch,
            select=select or SelectionConfig(),
            cache=None if cache is None else os.fspath(cache),
            cache_gib=cache_gib,
            timeout_sec=timeout_sec,
            on_corrupt=on_corrupt,
        )
        if epochs is not None and epochs < 1:
            raise ValueError(f"ShardStream: epochs is {epochs}, give 1 or more, or None for no end")
        self._seed, self._batch_size, self._start, self._next_n = seed, batch_size, start, start
        self._place = _place(rank, world_size)
        data = open_data(self._config, seed=seed)
        data.batches(batch_size, start, world=self._place).close()  # refuses now what it would refuse later
        self._data: Data | None = data
        self._identity = data.identity()
        self._end = None if epochs is None else epochs * data.num_samples
        self._read_by_workers = torch.zeros((), dtype=torch.bool).share_memory_()

    def __iter__(self) -> Generator[StreamBatch, None, None]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        self._next_n = self._start
        self._read_by_workers.fill_(worker is not None)
        # Locks, threads and connections do not live through a fork: each worker opens the sets itself.
        data = open_data(self._config, seed=self._seed) if worker else self._opened()
        return self._batches(data, first, stride)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this process took from the stream; JSON holds it.

        ValueError where a DataLoader's workers read the stream: they are ahead of what the loop has had, and only
        a batch can tell how far that is. See state_after.
        """
        if self._read_by_workers:
            raise ValueError(
                "ShardStream.state_dict: DataLoader workers read ahead of the loop, so the stream does not know what "
                "was consumed: use state_after(batch) with the last batch that was"
            )
        return {"n": self._next_n, "data": self._identity}

    def state_after(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The state after `batch`, the last one consumed of this stream; right with any number of workers."""
        n = int(batch["n"][0])
        if n < self._start:
            raise ValueError(
                f"ShardStream.state_after: a batch of n = {n}, this stream began at {self._start}"
            )
        after = n + self._batch_size - (n - self._start) % self._batch_size
        return {"n": after if self._end is None else min(after, self._end), "data": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `iter` go on from a state, saved with any batch size, world size and number of workers.

        ValueError in one line when its data, seed, order or selection are not this stream's.
        """
        if state.keys() != {"n", "data"}:
            raise ValueError(f"ShardStream: a state has the keys n and data, this has {sorted(state)}")
        saved, now = state["data"], self._identity
        for key in sorted(saved.keys() | now.keys()):
            if saved.get(key) != now.get(key):
                raise ValueError(
                    f"ShardStream: the state is of another stream: {key} was {saved.get(key)!r} and is "
                    f"{now.get(key)!r} here; open the stream as it was, or begin a new one"
                )
        self._start = self._next_n = int(state["n"])
        self._read_by_workers.fill_(False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}  # open files stay behind

    def _opened(self) -> Data:
        if self._data is None:
            self._data = open_data(self._config, seed=self._seed)
        return self._data

    def _batches(self, data: Data, first: int, stride: int) -> Generator[StreamBatch, None, None]:
        """Every stride-th batch from the first-th on."""
        start, size, place = self._start, self._batch_size, self._place
        begin, step = start + first * size, stride * size
        counters: Iterable[int] = itertools.count(begin, step)
        num_whole, num_left = divmod(max(self._end - start, 0), size) if self._end is not None else (0, 0)
        if self._end is not None:
            counters = range(begin, start + num_whole * size, step)

        with closing(data.batches(size, begin, world=place, stride=stride)) as batches:
            for n0, [batch] in zip(counters, batches, strict=False):
                self._next_n = n0 + size
                yield vars(batch)

        # What is left is one batch of its own, for as many ranks as it has samples.
        if num_left and num_whole % stride == first:
            place = _Place(place.rank, min(place.size, num_left))
            self._next_n = start + num_whole * size + num_left
            if place.rank < place.size:
                with closing(data.batches(num_left, self._next_n - num_left, world=place)) as batches:
                    [batch] = next(batches)
                    yield vars(batch)


class _Place(NamedTuple):
    """A rank of so many, as loader.Place."""

    rank: int
    size: int


def _place(rank: int | None, world_size: int | None) -> _Place:
    if (rank is None) != (world_size is None):
        raise ValueError(f"ShardStream: rank is {rank} and world_size {world_size}: give both, or neither")
    if rank is None or world_size is None:
        if dist.is_available() and dist.is_initialized():
            return _Place(dist.get_rank(), dist.get_world_size())
        return _Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if not 0 <= rank < world_size:
        raise ValueError(f"ShardStream: rank {rank} of {world_size}: give 0 <= rank < world_size")
    return _Place(rank, world_size)
