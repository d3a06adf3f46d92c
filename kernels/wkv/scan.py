"""Sums over the tokens before and after each token, with weights that decay by the token: linear scans.

Tokens lie in a buffer by chunks, the place inside the chunk outermost, so that one step of a scan is one operation
on contiguous memory for all chunks at once. Each chunk is summed, the sums are scanned in the same way, and what
enters a chunk is carried through it. The derivation is in `README.md`.
Shapes: L tokens of a chunk, N chunks, C channels, D the directions (past, future), S and B as the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RADIX = 16  # tokens of a chunk; a decay is multiplied up inside a chunk only, so its rounding stays small
LONGEST = 64  # tokens that are one chunk


def chunk_length(num_tokens: int) -> int:
    """Tokens of a chunk: all of few tokens, else at most RADIX, and so many that the last chunk is nearly full."""
    if num_tokens <= LONGEST:
        return num_tokens
    return -(-num_tokens // -(-num_tokens // RADIX))


def carry_through(x: Sequence[Tensor], decay_C: Tensor, entering: Tensor, out: Sequence[Tensor]) -> None:
    """out_0 = entering, out_t = x_{t-1} + decay out_{t-1}: the past; with x and out reversed, the future."""
    out[0].copy_(entering)
    for t in range(1, len(out)):
        torch.addcmul(x[t - 1], out[t - 1], decay_C, out=out[t])


def sum_chunks(x: Sequence[Tensor], decay_C: Tensor, out_DSBNC: Tensor) -> None:
    """What each chunk by itself hands to the next chunk, and to the one before it. x: L times (S, B, N, C)."""
    _sum(x, decay_C, out_DSBNC[0])
    _sum(x[::-1], decay_C, out_DSBNC[1])


def scan_chunks(sums_DSBNC: Tensor, w_C: Tensor, out_DSBNC: Tensor) -> None:
    """What enters each chunk from all before it and from all after it. w_C: float64, from one chunk to the next."""
    _scan(sums_DSBNC[0], w_C, out_DSBNC[0], step=1)
    _scan(sums_DSBNC[1], w_C, out_DSBNC[1], step=-1)


def _sum(x: Sequence[Tensor], decay_C: Tensor, out: Tensor) -> None:
    """out = sum_t decay^(L-1-t) x_t."""
    if len(x) == 1:
        out.copy_(x[0])
        return
    torch.addcmul(x[1], x[0], decay_C, out=out)
    for x_t in x[2:]:
        torch.addcmul(x_t, out, decay_C, out=out)


def _scan(x_SBNC: Tensor, w_C: Tensor, out_SBNC: Tensor, step: int) -> None:
    """out_n = sum_{j<n} exp(-(n-j-1) w) x_j, or with step -1 the same from the other end."""
    # In float64: the rounding of one step would be raised to the power of the distance.
    decay_C = torch.exp(-w_C).to(x_SBNC.dtype)
    num = x_SBNC.shape[-2]
    if num <= 2 * RADIX:
        nothing = torch.zeros_like(x_SBNC[..., 0, :])
        carry_through(x_SBNC.unbind(-2)[::step], decay_C, nothing, out_SBNC.unbind(-2)[::step])
        return
    rest = -num % RADIX
    x = torch.nn.functional.pad(x_SBNC, (0, 0, 0, rest)) if rest else x_SBNC
    out = torch.empty_like(x) if rest else out_SBNC
    x_at, out_at = (buffer.unflatten(-2, (-1, RADIX)).unbind(-2)[::step] for buffer in (x, out))
    sums, entering = torch.empty((2, *x_at[0].shape), dtype=x.dtype, device=x.device)
    _sum(x_at, decay_C, sums)
    _scan(sums, RADIX * w_C, entering, step)
    carry_through(x_at, decay_C, entering, out_at)
    if rest:
        out_SBNC.copy_(out[..., :num, :])
