"""Sums over the tokens before and after each token, with weights that decay by the token: two linear scans.

Chunks of RADIX tokens are summed token by token, all chunks at once; the chunks' sums are scanned in the same
way; then every chunk receives what lies outside it. The derivation is in `README.md`.
Shapes: T tokens, C channels, R powers, ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RADIX = 16  # tokens of a chunk; a decay is multiplied up inside a chunk only, so its rounding stays small


class Powers(NamedTuple):
    """exp(-w s) and exp(-w s r) for r = 0..R-1 and R-1..0, with s the distance of neighbours at one level."""

    one_C: Tensor
    rising_RC: Tensor
    falling_RC: Tensor


def decay_powers(w_C: Tensor, num_tokens: int, dtype: torch.dtype) -> list[Powers]:
    """The powers for each level of a scan over `num_tokens`."""
    # In float64: the rounding of one step would be raised to the power of the distance.
    one_C, levels = torch.exp(-w_C.double()), []
    while True:
        rising = torch.cat([torch.ones_like(one_C)[None], one_C.expand(RADIX, -1).cumprod(0)])
        levels.append(Powers(one_C.to(dtype), rising[:-1].to(dtype), rising[:-1].flip(0).to(dtype)))
        if num_tokens <= 2 * RADIX:
            return levels
        one_C, num_tokens = rising[-1], num_tokens // RADIX + 1


class Rows:
    """A buffer (..., T, C) and its views by token, made once for the many scans that run over it."""

    def __init__(self, buffer: Tensor) -> None:
        num_tokens = buffer.shape[-2]
        full = num_tokens // RADIX if num_tokens > 2 * RADIX else 0
        self.all = buffer
        self.rest = buffer[..., full * RADIX :, :]
        self.rest_at: Sequence[Tensor] = self.rest.unbind(-2)
        self.chunks_at: Sequence[Tensor] = ()
        if full:
            self.chunks = buffer[..., : full * RADIX, :].unflatten(-2, (full, RADIX))
            self.chunks_at = self.chunks.unbind(-2)
            sums, outside = buffer.new_empty((2, *buffer.shape[:-2], full + 1, buffer.shape[-1]))
            self.sums, self.chunk_sums, self.rest_sum = Rows(sums), sums[..., :full, :], sums[..., full, :]
            self.outside = Rows(outside)
            self.outside_chunks, self.outside_rest = outside[..., :full, None, :], outside[..., full:, :]


def sum_past(x: Rows, powers: Sequence[Powers], out: Rows) -> None:
    """out_t = sum_{i<t} exp(-(t-i-1) w) x_i."""
    p = powers[0]
    for x_at, out_at in ((x.chunks_at, out.chunks_at), (x.rest_at, out.rest_at)):
        if out_at:
            out_at[0].zero_()
        for t in range(1, len(out_at)):
            torch.addcmul(x_at[t - 1], out_at[t - 1], p.one_C, out=out_at[t])
    if out.chunks_at:
        torch.addcmul(x.chunks_at[-1], out.chunks_at[-1], p.one_C, out=out.chunk_sums)
        out.rest_sum.zero_()
        sum_past(out.sums, powers[1:], out.outside)
        out.chunks.addcmul_(out.outside_chunks, p.rising_RC)
        if out.rest_at:
            out.rest.addcmul_(out.outside_rest, p.rising_RC[: len(out.rest_at)])


def sum_future(x: Rows, powers: Sequence[Powers], out: Rows) -> None:
    """out_t = sum_{i>t} exp(-(i-t-1) w) x_i."""
    p = powers[0]
    for x_at, out_at in ((x.chunks_at, out.chunks_at), (x.rest_at, out.rest_at)):
        if out_at:
            out_at[-1].zero_()
        for t in range(len(out_at) - 1, 0, -1):
            torch.addcmul(x_at[t], out_at[t], p.one_C, out=out_at[t - 1])
    if out.chunks_at:
        torch.addcmul(x.chunks_at[0], out.chunks_at[0], p.one_C, out=out.chunk_sums)
        if out.rest_at:
            torch.addcmul(x.rest_at[0], out.rest_at[0], p.one_C, out=out.rest_sum)
        else:
            out.rest_sum.zero_()
        sum_future(out.sums, powers[1:], out.outside)
        out.chunks.addcmul_(out.outside_chunks, p.falling_RC)
