"""Images decoded and cropped ahead of the VAE, in worker processes, in batches of one fixed shape.

torch's DataLoader does the work: processes, order, shared and pinned memory. What is decoded is decided lazily, by
whoever makes the requests; a source that cannot be decoded comes back as its reason, and what to do about it is
encode.py's.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.images import BadImageError, center_crop_arr
from data_prep.sources import BadSampleError, Item

PREFETCHED_BATCHES = 2  # of each worker


@dataclass(frozen=True)
class Request:
    """One batch to decode: some items of one shard, in the shard's order."""

    shard: int
    items: Sequence[Item]


@dataclass
class Decoded:
    """A request's answer."""

    shard: int
    x: Tensor  # (batch, C, H, W) uint8, or stored arrays as they are; zeros behind the items and where one is bad
    problems: list[str | None]  # one for each item: why it cannot be decoded
    error: Exception | None = None  # the source's own trouble, such as a store that denies access

    def pin_memory(self) -> Decoded:
        """Called by DataLoader's thread where a GPU is to get the batch."""
        self.x = self.x.pin_memory()
        return self


class Decoder(Dataset[Decoded]):
    """Requests -> Decoded of `batch` samples of (3, resolution, resolution) uint8, cropped as ADM does."""

    def __init__(self, *, batch: int, resolution: int, max_pixels: int) -> None:
        self.batch, self.resolution, self.max_pixels = batch, resolution, max_pixels

    def __getitem__(self, request: Request) -> Decoded:
        return _decode_all(
            request, np.zeros((self.batch, 3, self.resolution, self.resolution), np.uint8), self._one
        )

    def _one(self, item: Item) -> np.ndarray:
        image = item.load(max_pixels=self.max_pixels)
        try:
            return center_crop_arr(image, self.resolution, max_pixels=self.max_pixels).transpose(2, 0, 1)
        except BadImageError as error:
            raise BadSampleError(f"{item.name}: {error}") from None


class LatentReader(Dataset[Decoded]):
    """Requests -> Decoded of `batch` moments that others made, (copies, 2C, h, w) float16; two copies with `flip`."""

    def __init__(self, *, batch: int, shape: tuple[int, int, int], flip: bool) -> None:
        self.batch, self.shape, self.flip = batch, shape, flip

    def __getitem__(self, request: Request) -> Decoded:
        copies = 2 if self.flip else 1
        return _decode_all(request, np.zeros((self.batch, copies, *self.shape), np.float16), self._one)

    def _one(self, item: Item) -> np.ndarray:
        moments = np.stack(
            [item.load_latents(flip=flip) for flip in ((False, True) if self.flip else (False,))]
        )
        if moments.shape[1:] != self.shape:
            raise BadSampleError(f"{item.name}: moments of {moments.shape[1:]}, others have {self.shape}")
        return moments


def _decode_all(request: Request, x: np.ndarray, decode: Callable[[Item], np.ndarray]) -> Decoded:
    """Each item of the request in its place in `x`. No error leaves a worker: a traceback would be all of it."""
    problems: list[str | None] = []
    for place, item in zip(x, request.items, strict=False):
        try:
            place[...] = decode(item)
        except BadSampleError as error:
            problems.append(str(error))
        except (OSError, ValueError) as error:
            return Decoded(request.shard, torch.from_numpy(x), problems, error)
        else:
            problems.append(None)
    return Decoded(request.shard, torch.from_numpy(x), problems)


def _end_without(parent: int, worker: int) -> None:
    """DataLoader's workers watch for their parent's death from here on; it may have come while they were starting."""
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start here do not see Ctrl-C, at which each would print a traceback."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Requests:
    """The sampler that DataLoader asks for what to decode next; each round of asking may differ."""

    def __init__(self) -> None:
        self.current: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.current)


class DecodingPool:
    """Decodes requests in `workers` processes (0: in this one), and hands the batches out in order.

    Requests are drawn as the batches are, a few batches ahead. `pin`: batches come in pinned memory, for a GPU.
    """

    def __init__(self, decoder: Dataset[Decoded], *, workers: int, pin: bool = False) -> None:
        self._requests = _Requests()
        # Forked, workers would have copies of this process's locks and leases; behind a fork server they would not
        # notice when this process is killed, and stay for ever.
        context = multiprocessing.get_context("spawn") if workers else None
        self._loader: DataLoader[Decoded] = DataLoader(
            decoder,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin,
            multiprocessing_context=context,
            worker_init_fn=functools.partial(_end_without, os.getpid()),
        )
        if workers:
            with _interrupts_ignored():  # which the workers inherit: to end them is this process's business
                for _ in self._loader:  # nothing yet, but the workers start now, and nobody waits for them
                    raise AssertionError("there are no requests yet")

    def decode(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        """The answers, in the order of the requests. Raises what kept a source from being read."""
        self._requests.current = requests
        for decoded in self._loader:
            if decoded.error is not None:
                raise decoded.error
            yield decoded
