"""Bi-WKV under one maximum per (batch, channel): two plain linear scans (`scan.py`) and the diagonal.

Valid for channels with |w| T + |u| <= REACH; the others take `carried_maximum.py`. `torch.py` chooses.
The derivation is in `README.md`, the cutting into groups and segments in `segments.py`.
Shapes: S the pair (numerator, denominator), B batch, T tokens, C channels, L tokens of a chunk, N chunks,
D the directions (past, future).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drwkv.kernels.wkv.scan import carry_through, scan_chunks, sum_chunks
from drwkv.kernels.wkv.segments import Group, Pair, Segment, groups

REACH = 25.0  # y holds to 60 in float32; from about 30 on the gradient of a negative decay loses digits
LOG2_E = 1 / math.log(2)
TINY = 1e-30  # the least sum of weights that is divided by


def forward(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, *, y_BTC: Tensor, dtype: torch.dtype
) -> None:
    """Write y, computing in `dtype`."""
    decay = _Decay.of(w_C, u_C, dtype)
    for group in groups(k_BTC, dtype, num_pairs=3, num_sums=2):
        sources = _Sources(group, decay, k_BTC, v_BTC)
        sums, entering = group.sums
        for segment in group.segments:
            sources.weigh(segment)
            sources.sum_chunks(segment, segment.pairs[0], sums)
        sources.scan_chunks(sums, entering)
        for segment in reversed(group.segments):
            sources.weigh(segment)
            x, past, future = segment.pairs
            sources.carry_past(segment, x, entering, past)
            sources.carry_future(segment, x, entering, future)
            num, den = past.all.add_(future.all).addcmul_(x.all, sources.bonus_C).unbind(1)
            for (y,), (num_part, den_part) in segment.views((y_BTC,), (num, den)):
                torch.div(num_part, den_part, out=y)


def backward(
    w_C: Tensor,
    u_C: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    gy_BTC: Tensor,
    *,
    gk_BTC: Tensor,
    gv_BTC: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of k and v and return those of w and u (C,), computing in `dtype`."""
    decay = _Decay.of(w_C, u_C, dtype)
    gw_C, gu_C = torch.zeros_like(w_C, dtype=dtype), torch.zeros_like(u_C, dtype=dtype)
    for group in groups(k_BTC, dtype, num_pairs=5, num_sums=3):
        sources = _Sources(group, decay, k_BTC, v_BTC)
        readers = _Readers(sources, gy_BTC)
        sums, _, entering = group.sums
        for segment in reversed(group.segments):
            readers.weigh(segment)
            sources.sum_chunks(segment, segment.pairs[3], sums)
        sources.scan_chunks(sums, entering)
        for segment in group.segments:
            readers.weigh(segment)
            x, x_past, x_future, g, g_past = segment.pairs
            torch.mul(g.all, x.all, out=g_past.all)
            gu_C[group.channels] += _difference(g_past).mul_(sources.bonus_C)

            # Each token strictly between a source and its reader adds one to their distance.
            sources.carry_past(segment, g, entering, g_past)
            x_future.all.mul_(g_past.all)
            between_C = _difference(x_future)
            g_future = x_future
            sources.carry_future(segment, g, entering, g_future)
            x_past.all.mul_(g_future.all)
            between_C += _difference(x_past)
            gw_C[group.channels] -= between_C.mul_(sources.decay_C)

            total_g, total_h = g_past.all.add_(g_future.all).addcmul_(g.all, sources.bonus_C).unbind(1)
            weighted, e = x.all.unbind(1)
            weighted.mul_(total_g)
            for (gk, gv), parts in segment.views((gk_BTC, gv_BTC), (weighted, e, total_g, total_h)):
                torch.addcmul(parts[0], parts[1], parts[3], value=-1, out=gk)
                torch.mul(parts[1], parts[2], out=gv)
    return gw_C, gu_C


def _difference(pair: Pair) -> Tensor:
    """Sum over all tokens of the pair's first less its second: (C,)."""
    first_C, second_C = pair.all.sum(0).sum((1, 2))  # in one go it takes six times as long
    return first_C - second_C


class _Decay(NamedTuple):
    """w in float64, exp(-w) and exp(u): (C,)."""

    w_C: Tensor
    decay_C: Tensor
    bonus_C: Tensor

    @staticmethod
    def of(w_C: Tensor, u_C: Tensor, dtype: torch.dtype) -> _Decay:
        w_C = w_C.double()
        return _Decay(w_C, torch.exp(-w_C).to(dtype), u_C.to(dtype).exp())


class _Sources:
    """The pairs x = (e (v - a), e) of a group, with e = exp(k - max_t k), and the sums of pairs over its tokens.

    The output wants a = 0. A segment's x stands in its first buffer. Sums over all tokens take two passes over the
    segments, in opposite orders, so that one segment at least still stands in its buffers.
    """

    def __init__(self, group: Group, decay: _Decay, k_BTC: Tensor, v_BTC: Tensor) -> None:
        self.group, self.k_BTC, self.v_BTC = group, k_BTC, v_BTC
        self.w_C, self.decay_C, self.bonus_C = (x_C[group.channels] for x_C in decay)
        self.maximum_B1C = group.whole(k_BTC).amax(1, keepdim=True).to(self.decay_C.dtype)
        self.centre_B1C: Tensor | None = None  # a; None is 0
        self.weighed: Segment | None = None  # whose e stands in the first buffer
        self.valued: Segment | None = None  # whose e (v - a) does

    def weigh(self, segment: Segment) -> None:
        """Fill the first buffer with the segment's x, unless it is there."""
        x = segment.pairs[0]
        weighted_all, e_all = x.all.unbind(1)
        if self.weighed is not segment:
            for (k,), (e,) in segment.views((self.k_BTC,), (e_all,)):
                torch.sub(k, self.maximum_B1C, out=e)
            e_all.mul_(LOG2_E).exp2_()  # three times as fast as exp on a CPU
            segment.empty_rest(x)
            self.weighed, self.valued = segment, None
        if self.valued is not segment:
            for (v,), (weighted, e) in segment.views((self.v_BTC,), (weighted_all, e_all)):
                if self.centre_B1C is None:
                    torch.mul(v, e, out=weighted)
                else:
                    torch.sub(v, self.centre_B1C, out=weighted).mul_(e)
            self.valued = segment

    def enter_centred(self, sums: Tensor, entering: Tensor) -> None:
        """Let a be the mean of v under e, and sum x: no gradient depends on a, and v_i - y_t cancels less.

        Each segment is summed about its own mean, and the sums are moved to that of all: one pass less.
        """
        means, masses = [], []
        for segment in self.group.segments:
            self._centre_at(None)
            self.weigh(segment)
            weighted_BC, mass_BC = segment.pairs[0].all.sum(0).sum(2)
            means.append((weighted_BC / mass_BC.clamp_min(TINY))[:, None])
            masses.append(mass_BC[:, None])
            self._centre_at(means[-1])
            self.weigh(segment)
            self.sum_chunks(segment, segment.pairs[0], sums)
        if len(means) > 1:
            mean, mass = torch.stack(means), torch.stack(masses)
            self._centre_at((mean * mass).sum(0) / mass.sum(0))
            for segment, own_mean in zip(self.group.segments, means, strict=True):
                weighted, e = sums[..., segment.chunks, :].unbind(1)
                weighted.addcmul_(e, own_mean - self.centre_B1C)
        self.scan_chunks(sums, entering)

    def sum_chunks(self, segment: Segment, x: Pair, sums: Tensor) -> None:
        if self.group.num_chunks > 1:
            sum_chunks(x.at, self.decay_C, sums[..., segment.chunks, :])

    def scan_chunks(self, sums: Tensor, entering: Tensor) -> None:
        if self.group.num_chunks > 1:
            scan_chunks(sums, self.w_C * self.group.length, entering)
        else:
            entering.zero_()

    def carry_past(self, segment: Segment, x: Pair, entering: Tensor, out: Pair) -> None:
        carry_through(x.at, self.decay_C, entering[0, ..., segment.chunks, :], out.at)

    def carry_future(self, segment: Segment, x: Pair, entering: Tensor, out: Pair) -> None:
        carry_through(x.at[::-1], self.decay_C, entering[1, ..., segment.chunks, :], out.at[::-1])

    def _centre_at(self, centre_B1C: Tensor | None) -> None:
        self.centre_B1C, self.valued = centre_B1C, None


class _Readers:
    """The pairs (g, h) = (gy / den, gy y / den), which are summed over the readers as x is over the sources.

    A segment's x, its past, its future and (g, h) stand in the first four buffers.
    """

    def __init__(self, sources: _Sources, gy_BTC: Tensor) -> None:
        self.sources, self.gy_BTC = sources, gy_BTC
        sums, self.entering_x, _ = sources.group.sums
        sources.enter_centred(sums, self.entering_x)
        self.weighed: Segment | None = None

    def weigh(self, segment: Segment) -> None:
        """Fill the first four buffers, unless they hold the segment, and overwrite the fifth."""
        if self.weighed is segment:
            return
        x, x_past, x_future, g, whole = segment.pairs
        sources = self.sources
        sources.weigh(segment)
        sources.carry_past(segment, x, self.entering_x, x_past)
        sources.carry_future(segment, x, self.entering_x, x_future)
        torch.add(x_past.all, x_future.all, out=whole.all).addcmul_(x.all, sources.bonus_C)
        num, den = whole.all.unbind(1)
        g_all, h_all = g.all.unbind(1)
        for (gy,), (part_g, part_den) in segment.views((self.gy_BTC,), (g_all, den)):
            torch.div(gy, part_den, out=part_g)
        torch.mul(num.div_(den), g_all, out=h_all)
        segment.empty_rest(g)
        self.weighed = segment
