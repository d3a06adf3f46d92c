"""How (B, T, C) tensors are cut for the `torch` backend of Bi-WKV, so that what is worked on stays in the cache.

A group is a few samples with all their tokens, or one sample; where its tokens are too many, they are cut into
segments. The tokens of a segment lie in its buffers by chunks. The arithmetic is in `one_maximum.py` and `scan.py`.
Shapes: S a pair, B batch, T tokens, C channels, L tokens of a chunk, N chunks, D the directions (past, future).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drwkv.kernels.wkv.scan import chunk_length

SEGMENT = 6 << 16  # elements (b, t, c) of a segment: few enough for the cache, enough to outweigh the calls
WIDEST = 4096  # channels of a segment, where there are more
KEPT_BYTES = 64 << 20  # the largest workspace that a thread keeps from call to call
KEPT_CUTS = 16  # shapes of which it keeps the views


class _Kept(threading.local):
    """What a thread keeps from call to call."""

    def __init__(self) -> None:
        self.workspace = torch.empty(0, dtype=torch.uint8)
        self.cuts: dict[tuple[object, ...], Sequence[Group]] = {}


_kept = _Kept()


class Pair(NamedTuple):
    """A buffer (L, S, B, N, C), whose places after the last token are empty, and its slices by L."""

    all: Tensor
    at: Sequence[Tensor]


class Segment(NamedTuple):
    """Some tokens of a group and the buffers for them."""

    at: tuple[slice, slice, slice]  # in (B, T, C)
    chunks: slice  # among the group's
    pairs: Sequence[Pair]

    def views(
        self, tensors_BTC: Sequence[Tensor], buffers_LBNC: Sequence[Tensor]
    ) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """The same tokens of all of them, shaped alike: the full chunks, then the last one if it is not full."""
        length, num_tokens = buffers_LBNC[0].shape[0], self.at[1].stop - self.at[1].start
        full = num_tokens // length
        whole = [x[self.at] for x in tensors_BTC]
        if full:
            chunks = [x[:, : full * length].unflatten(1, (full, length)).permute(2, 0, 1, 3) for x in whole]
            yield chunks, [buffer[:, :, :full] for buffer in buffers_LBNC]
        if rest := num_tokens % length:
            chunks = [x[:, full * length :].transpose(0, 1)[:, :, None] for x in whole]
            yield chunks, [buffer[:rest, :, full:] for buffer in buffers_LBNC]

    def empty_rest(self, pair: Pair) -> None:
        """Zero the places after the last token."""
        length = len(pair.at)
        if rest := (self.at[1].stop - self.at[1].start) % length:
            pair.all[rest:, :, :, -1].zero_()


class Group(NamedTuple):
    """Samples and channels with all their tokens, and buffers (D, S, B, N, C) for what chunks hand on and receive."""

    samples: slice
    channels: slice
    length: int  # L
    num_chunks: int
    segments: Sequence[Segment]
    sums: Sequence[Tensor]

    def whole(self, x_BTC: Tensor) -> Tensor:
        """The group's part of x."""
        return x_BTC[self.samples, :, self.channels]


class _Steps(NamedTuple):
    """How far a cut goes in each dimension: chunk length, samples, chunks, channels."""

    length: int
    samples: int
    chunks: int
    channels: int


def groups(k_BTC: Tensor, dtype: torch.dtype, num_pairs: int, num_sums: int) -> Sequence[Group]:
    """Cut k's shape. All groups share one workspace: it does not grow with B, and with T only by the sums.

    On a CPU the thread keeps the workspace and its views from call to call: new pages cost more than the sums.
    """
    if k_BTC.numel() == 0:
        return []
    batch, num_tokens, channels = k_BTC.shape
    length = chunk_length(num_tokens)
    num_chunks = -(-num_tokens // length)
    c_step = _even_step(channels, WIDEST)
    n_step = _even_step(num_chunks, max(1, SEGMENT // (length * c_step)))
    b_step = _even_step(batch, max(1, SEGMENT // (length * num_chunks * c_step)))
    steps = _Steps(length, b_step, n_step, c_step)

    sizes = [2 * length * b_step * n_step * c_step] * num_pairs + [
        4 * num_chunks * b_step * c_step
    ] * num_sums
    num_bytes = sum(sizes) * dtype.itemsize
    if k_BTC.device.type != "cpu" or num_bytes > KEPT_BYTES:
        spaces = torch.empty(sum(sizes), dtype=dtype, device=k_BTC.device).split(sizes)
        return _cut(k_BTC.shape, steps, spaces[:num_pairs], spaces[num_pairs:])
    if num_bytes > _kept.workspace.numel():
        _kept.cuts.clear()
        _kept.workspace = torch.empty(num_bytes, dtype=torch.uint8)
    key = (*k_BTC.shape, *steps, dtype, num_pairs, num_sums)
    if key not in _kept.cuts:
        if len(_kept.cuts) == KEPT_CUTS:
            _kept.cuts.clear()
        spaces = _kept.workspace[:num_bytes].view(dtype).split(sizes)
        _kept.cuts[key] = _cut(k_BTC.shape, steps, spaces[:num_pairs], spaces[num_pairs:])
    return _kept.cuts[key]


def _cut(
    shape: Sequence[int], steps: _Steps, pair_spaces: Sequence[Tensor], sum_spaces: Sequence[Tensor]
) -> Sequence[Group]:
    batch, num_tokens, channels = shape
    num_chunks = -(-num_tokens // steps.length)
    pairs: dict[tuple[int, ...], Sequence[Pair]] = {}

    def segment(b: slice, n: slice, c: slice) -> Segment:
        shape = (steps.length, 2, *(part.stop - part.start for part in (b, n, c)))
        if shape not in pairs:
            buffers = [space[: math.prod(shape)].view(shape) for space in pair_spaces]
            pairs[shape] = [Pair(buffer, buffer.unbind(0)) for buffer in buffers]
        tokens = slice(n.start * steps.length, min(n.stop * steps.length, num_tokens))
        return Segment((b, tokens, c), n, pairs[shape])

    found = []
    for c in _slices(channels, steps.channels):
        for b in _slices(batch, steps.samples):
            segments = [segment(b, n, c) for n in _slices(num_chunks, steps.chunks)]
            sums_shape = (2, 2, b.stop - b.start, num_chunks, c.stop - c.start)
            sums = [space[: math.prod(sums_shape)].view(sums_shape) for space in sum_spaces]
            found.append(Group(b, c, steps.length, num_chunks, segments, sums))
    return found


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _even_step(length: int, at_most: int) -> int:
    pieces = -(-length // at_most)
    return -(-length // pieces)
