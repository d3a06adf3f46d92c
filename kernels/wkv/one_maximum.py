"""Bi-WKV under one maximum per (batch, channel): two plain linear scans (`scan.py`) and the diagonal.

Valid for channels with |w| T + |u| <= REACH; the others take `carried_maximum.py`. `torch.py` chooses.
The derivation is in `README.md`.
Shapes: S the pair (numerator, denominator), B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from drwkv.kernels.wkv.scan import Powers, Rows, decay_powers, sum_future, sum_past

REACH = 30.0  # y holds to 60 in float32; from about 30 on the gradient of a negative decay loses digits
BLOCK = 3 << 16  # elements of a (B, T, C) buffer: few enough for the cache, enough to outweigh the calls
LOG2_E = 1 / math.log(2)
NARROWEST = 128  # channels of a block, where there are more: narrower rows are read and added slowly


def forward(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, *, y_BTC: Tensor, dtype: torch.dtype
) -> None:
    """Write y, computing in `dtype`."""
    bonus_C = u_C.to(dtype).exp()
    for at, powers, (x, x_past, x_future) in _blocks(w_C, k_BTC, dtype, 3):
        _weigh(k_BTC[at], v_BTC[at], x.all)
        sum_past(x, powers, x_past)
        sum_future(x, powers, x_future)
        num, den = x_past.all.add_(x_future.all).addcmul_(x.all, bonus_C[at[2]])
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
    bonus_C = u_C.to(dtype).exp()
    gw_C, gu_C = torch.zeros_like(bonus_C), torch.zeros_like(bonus_C)
    for at, powers, (x_rows, x_past_rows, x_future_rows, g_rows, g_past_rows) in _blocks(
        w_C, k_BTC, dtype, 5
    ):
        c, bonus, g_future_rows = at[2], bonus_C[at[2]], x_future_rows
        x, x_past, x_future = x_rows.all, x_past_rows.all, x_future_rows.all
        g, g_past, g_future = g_rows.all, g_past_rows.all, g_future_rows.all
        _weigh(k_BTC[at], v_BTC[at], x)
        _centre(v_BTC[at], x)
        sum_past(x_rows, powers, x_past_rows)
        sum_future(x_rows, powers, x_future_rows)

        # (g, h) = (gy / den, gy y / den) is summed over the readers as (e v, e) is over the sources.
        num, den = torch.add(x_past, x_future, out=g_past).addcmul_(x, bonus)
        torch.div(gy_BTC[at], den, out=g[0])
        torch.mul(num.div_(den), g[0], out=g[1])
        gu_C[c] += _difference(torch.mul(g, x, out=g_past)).mul_(bonus)

        # Each token strictly between a source and its reader adds one to their distance.
        sum_past(g_rows, powers, g_past_rows)
        between_C = _difference(x_future.mul_(g_past))
        sum_future(g_rows, powers, g_future_rows)
        between_C += _difference(x_past.mul_(g_future))
        gw_C[c] -= between_C.mul_(powers[0].one_C)

        total_g, total_h = g_past.add_(g_future).addcmul_(g, bonus)
        torch.mul(total_g, x[1], out=gv_BTC[at])
        torch.addcmul(x[0].mul_(total_g), x[1], total_h, value=-1, out=gk_BTC[at])
    return gw_C, gu_C


def _difference(pair_SBTC: Tensor) -> Tensor:
    """Sum over (B, T) of the pair's first less its second."""
    first_C, second_C = pair_SBTC.sum((1, 2))
    return first_C - second_C


def _blocks(
    w_C: Tensor, k_BTC: Tensor, dtype: torch.dtype, count: int
) -> Iterator[tuple[tuple[slice, slice, slice], list[Powers], list[Rows]]]:
    """Index blocks of about BLOCK elements, all tokens in each, with the decay's powers and `count` buffers.

    All blocks share the buffers, so what a call holds beside its inputs and outputs does not grow with B.
    """
    if k_BTC.numel() == 0:
        return
    batch, num_tokens, channels = k_BTC.shape
    c_step = _even_step(channels, max(NARROWEST, BLOCK // num_tokens))
    b_step = _even_step(batch, max(1, BLOCK // (num_tokens * c_step)))
    workspace = k_BTC.new_empty((count, 2 * b_step * num_tokens * c_step), dtype=dtype)
    buffers: dict[tuple[int, ...], list[Rows]] = {}
    for c in range(0, channels, c_step):
        powers = decay_powers(w_C[c : c + c_step], num_tokens, dtype)
        for b in range(0, batch, b_step):
            shape = (2, min(b_step, batch - b), num_tokens, min(c_step, channels - c))
            if shape not in buffers:
                pieces = workspace[:, : math.prod(shape)].view(count, *shape)
                buffers[shape] = [Rows(piece) for piece in pieces]
            yield (slice(b, b + shape[1]), slice(None), slice(c, c + shape[3])), powers, buffers[shape]


def _even_step(length: int, at_most: int) -> int:
    pieces = -(-length // at_most)
    return -(-length // pieces)


def _weigh(k_BTC: Tensor, v_BTC: Tensor, x_SBTC: Tensor) -> None:
    """x = (e v, e) with e = exp(k - max_t k), as a power of two: three times as fast as exp on a CPU."""
    weighted, e = x_SBTC
    torch.sub(k_BTC, k_BTC.amax(1, keepdim=True).to(e.dtype), out=e).mul_(LOG2_E).exp2_()
    torch.mul(e, v_BTC, out=weighted)


def _centre(v_BTC: Tensor, x_SBTC: Tensor) -> None:
    """x = (e (v - a), e), a the mean of v under e: no gradient depends on a, and v_i - y_t cancels less."""
    weighted, e = x_SBTC
    mean_B1C = weighted.sum(1, keepdim=True) / e.sum(1, keepdim=True)
    torch.sub(v_BTC, mean_B1C, out=weighted).mul_(e)
