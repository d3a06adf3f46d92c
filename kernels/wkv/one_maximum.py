"""Bi-WKV under one maximum per (batch, channel): two plain linear recurrences and the diagonal.

Valid for channels with |w| T + |u| <= REACH; the others take `carried_maximum.py`. `torch.py` chooses.
The equations are numbered in `README.md`.
Shapes: S the pair (numerator, denominator), B batch, T tokens, C channels, N levels and R radix of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

REACH = 30.0  # y holds to 60 in float32; from about 30 on the gradient of a negative decay loses digits
RADIX = 16  # tokens of a chunk; a decay is multiplied up inside a chunk only, so its rounding stays small
BLOCK = 1 << 19  # elements of a (B, T, C) buffer: few enough for the cache, enough to outweigh the calls
LOG2_E = 1 / math.log(2)
NARROWEST = 64  # channels of a block: rows of fewer are read and added slowly


def forward(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, *, y_BTC: Tensor, dtype: torch.dtype
) -> None:
    """Write y, computing in `dtype`."""
    powers, bonus_C, m_B1C = _tables(w_C, u_C, k_BTC, dtype)
    for at, (x, x_past, x_future) in _blocks(k_BTC, dtype, 3):
        c = at[2]
        _weigh(k_BTC[at], v_BTC[at], m_B1C[at], x)
        sum_past(x, powers[..., c], x_past)
        sum_future(x, powers[..., c], x_future)
        num, den = x_past.add_(x_future).addcmul_(x, bonus_C[c])
        torch.div(num, den, out=y_BTC[at])


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
    powers, bonus_C, m_B1C = _tables(w_C, u_C, k_BTC, dtype)
    gw_C, gu_C = torch.zeros_like(bonus_C), torch.zeros_like(bonus_C)
    for at, (x, x_past, x_future, g, g_past, g_future) in _blocks(k_BTC, dtype, 6):
        c, bonus = at[2], bonus_C[at[2]]
        _weigh(k_BTC[at], v_BTC[at], m_B1C[at], x)
        _centre(v_BTC[at], x)
        sum_past(x, powers[..., c], x_past)
        sum_future(x, powers[..., c], x_future)

        # (g, h) = (gy / den, gy y / den) is summed over the readers as (e v, e) is over the sources.
        num, den = torch.add(x_past, x_future, out=g_past).addcmul_(x, bonus)
        torch.div(gy_BTC[at], den, out=g[0])
        torch.mul(num.div_(den), g[0], out=g[1])
        gu_C[c] += _difference(torch.mul(g, x, out=g_past)).mul_(bonus)
        sum_past(g, powers[..., c], g_past)
        sum_future(g, powers[..., c], g_future)

        # Each token strictly between a source and its reader adds one to their distance.
        between = x_past.mul_(g_future).addcmul_(x_future, g_past)
        gw_C[c] -= _difference(between).mul_(powers[0, 1, c])

        total_g, total_h = g_past.add_(g_future).addcmul_(g, bonus)
        torch.mul(total_g, x[1], out=gv_BTC[at])
        torch.addcmul(x[0].mul_(total_g), x[1], total_h, value=-1, out=gk_BTC[at])
    return gw_C, gu_C


def _difference(pair_SBTC: Tensor) -> Tensor:
    """Sum over (B, T) of the pair's first less its second."""
    first_C, second_C = pair_SBTC.sum((1, 2))
    return first_C - second_C


def _blocks(
    k_BTC: Tensor, dtype: torch.dtype, count: int
) -> Iterator[tuple[tuple[slice, slice, slice], Sequence[Tensor]]]:
    """Index blocks of about BLOCK elements, all tokens in each, and give each `count` buffers (S, B, T, C)."""
    if k_BTC.numel() == 0:
        return
    batch, num_tokens, channels = k_BTC.shape
    b_step = -(-batch // min(batch, -(-k_BTC.numel() // BLOCK)))
    c_step = -(-channels // max(1, min(channels // NARROWEST, num_tokens * channels // BLOCK)))
    workspace = k_BTC.new_empty((count, 2 * b_step * num_tokens * c_step), dtype=dtype)
    for b in range(0, batch, b_step):
        for c in range(0, channels, c_step):
            shape = (2, min(b_step, batch - b), num_tokens, min(c_step, channels - c))
            at = (slice(b, b + shape[1]), slice(None), slice(c, c + shape[3]))
            yield at, workspace[:, : math.prod(shape)].view(count, *shape).unbind()


def _tables(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Powers exp(-w R^n r), r = 0..R, of every scan level (N, R + 1, C); exp(u) (C,); max_t k (B, 1, C)."""
    levels, length = 1, k_BTC.shape[1]
    while length > 2 * RADIX:
        levels, length = levels + 1, length // RADIX + 1
    # In float64: the rounding of one power would be raised to the power of the distance.
    steps = [[[-float(r * RADIX**n)] for r in range(RADIX + 1)] for n in range(levels)]
    steps_NR1 = torch.tensor(steps, dtype=torch.float64, device=w_C.device)
    powers = torch.exp(steps_NR1 * w_C.double()).to(dtype)
    return powers, u_C.to(dtype).exp(), k_BTC.amax(1, keepdim=True).to(dtype)


def _weigh(k_BTC: Tensor, v_BTC: Tensor, m_B1C: Tensor, x_SBTC: Tensor) -> None:
    """x = (e v, e) with e = exp(k - m), as a power of two: three times as fast as exp on a CPU."""
    weighted, e = x_SBTC
    torch.sub(k_BTC, m_B1C, out=e).mul_(LOG2_E).exp2_()
    torch.mul(e, v_BTC, out=weighted)


def _centre(v_BTC: Tensor, x_SBTC: Tensor) -> None:
    """x = (e (v - a), e), a the mean of v under e: no gradient depends on a, and v_i - y_t cancels less."""
    weighted, e = x_SBTC
    mean_B1C = weighted.sum(1, keepdim=True) / e.sum(1, keepdim=True)
    torch.sub(v_BTC, mean_B1C, out=weighted).mul_(e)


def sum_past(x: Tensor, powers: Tensor, out: Tensor) -> Tensor:
    """out_t = sum_{i<t} exp(-(t-i-1) w) x_i over dim -2."""
    num_tokens, step_C = x.shape[-2], powers[0, 1]
    if num_tokens <= 2 * RADIX:
        return _step_past(x, step_C, out)

    # Sum inside the chunks; then scan their sums and give every chunk what lies before it.
    (x_chunks, x_rest), (chunks, rest) = _cut(x), _cut(out)
    _step_past(x_chunks, step_C, chunks)
    _step_past(x_rest, step_C, rest)
    full = chunks.shape[-3]
    sums = x.new_empty((*x.shape[:-2], full + 1, x.shape[-1]))  # the last is not read
    torch.addcmul(x_chunks[..., -1, :], chunks[..., -1, :], step_C, out=sums[..., :full, :])
    before = sum_past(sums, powers[1:], torch.empty_like(sums))
    chunks.addcmul_(before[..., :full, None, :], powers[0, :RADIX])
    rest.addcmul_(before[..., full:, :], powers[0, : rest.shape[-2]])
    return out


def sum_future(x: Tensor, powers: Tensor, out: Tensor) -> Tensor:
    """out_t = sum_{i>t} exp(-(i-t-1) w) x_i over dim -2."""
    num_tokens, step_C = x.shape[-2], powers[0, 1]
    if num_tokens <= 2 * RADIX:
        return _step_future(x, step_C, out)

    # Sum inside the chunks; then scan their sums and give every chunk what lies after it.
    (x_chunks, x_rest), (chunks, rest) = _cut(x), _cut(out)
    _step_future(x_chunks, step_C, chunks)
    _step_future(x_rest, step_C, rest)
    full, has_rest = chunks.shape[-3], rest.shape[-2] > 0
    sums = x.new_empty((*x.shape[:-2], full + has_rest, x.shape[-1]))
    torch.addcmul(x_chunks[..., 0, :], chunks[..., 0, :], step_C, out=sums[..., :full, :])
    if has_rest:
        torch.addcmul(x_rest[..., 0, :], rest[..., 0, :], step_C, out=sums[..., -1, :])
    after = sum_future(sums, powers[1:], torch.empty_like(sums))
    chunks.addcmul_(after[..., :full, None, :], powers[0, :RADIX].flip(0))
    return out


def _cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the whole chunks (..., chunks, RADIX, C) and of the fewer than RADIX tokens that remain."""
    whole = x.shape[-2] // RADIX * RADIX
    return x[..., :whole, :].unflatten(-2, (-1, RADIX)), x[..., whole:, :]


def _step_past(x: Tensor, step_C: Tensor, out: Tensor) -> Tensor:
    x_at, out_at = x.unbind(-2), out.unbind(-2)
    if out_at:
        out_at[0].zero_()
    for t in range(1, len(out_at)):
        torch.addcmul(x_at[t - 1], out_at[t - 1], step_C, out=out_at[t])
    return out


def _step_future(x: Tensor, step_C: Tensor, out: Tensor) -> Tensor:
    x_at, out_at = x.unbind(-2), out.unbind(-2)
    if out_at:
        out_at[-1].zero_()
    for t in range(len(out_at) - 1, 0, -1):
        torch.addcmul(x_at[t], out_at[t], step_C, out=out_at[t - 1])
    return out
