"""Bi-WKV sums under one maximum per (batch, channel): two plain linear recurrences and the diagonal.

Valid for channels with |w| T + |u| <= REACH; the others take `carried_maximum.py`. `torch.py` chooses.
The equations are numbered in `README.md`.
Shapes: S the pair (numerator, denominator), B batch, T tokens, C channels, R radix, N levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 60.0
RADIX = 16


def powers_NRC(w_C: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """exp(-w R^n r) for r = 1..R at every level n of the scan, evaluated in float64 so that it rounds once."""
    levels, span = 1, 2 * RADIX
    while span < num_tokens:
        levels, span = levels + 1, span * RADIX
    step = torch.arange(1, RADIX + 1, dtype=torch.float64, device=w_C.device)
    step_NR = torch.stack([step * RADIX**n for n in range(levels)])
    return torch.exp(-step_NR[:, :, None] * w_C.double()).to(dtype)


def past_(x: Tensor, powers: Tensor) -> Tensor:
    """In place x_t <- sum_{i<=t} exp(-(t-i) w) x_i over dim -2."""
    num_tokens, radix = x.shape[-2], powers.shape[1]
    chunk = num_tokens if num_tokens <= 2 * radix else radix
    for t in range(1, chunk):
        here = x[..., t::chunk, :]
        here.addcmul_(x[..., t - 1 :: chunk, :][..., : here.shape[-2], :], powers[0, 0])
    if chunk == num_tokens:
        return x

    # Carry the chunks' ends over the chunks, then into the tokens of the next chunk.
    full = num_tokens // chunk
    ends = past_(x[..., chunk - 1 :: chunk, :].contiguous(), powers[1:])
    body = x[..., chunk : full * chunk, :].unflatten(-2, (full - 1, chunk))
    body.addcmul_(ends[..., : full - 1, None, :], powers[0])
    tail = x[..., full * chunk :, :]
    tail.addcmul_(ends[..., -1:, :], powers[0, : tail.shape[-2]])
    return x


def future_(x: Tensor, powers: Tensor) -> Tensor:
    """In place x_t <- sum_{i>=t} exp(-(i-t) w) x_i over dim -2."""
    num_tokens, radix = x.shape[-2], powers.shape[1]
    chunk = num_tokens if num_tokens <= 2 * radix else radix
    for t in range(chunk - 2, -1, -1):
        following = x[..., t + 1 :: chunk, :]
        x[..., t::chunk, :][..., : following.shape[-2], :].addcmul_(following, powers[0, 0])
    if chunk == num_tokens:
        return x

    # Carry the chunks' starts back over the chunks, then into the tokens of the chunk before.
    starts = future_(x[..., ::chunk, :].contiguous(), powers[1:])
    before = starts.shape[-2] - 1
    body = x[..., : before * chunk, :].unflatten(-2, (before, chunk))
    body.addcmul_(starts[..., 1:, None, :], powers[0].flip(0))
    return x


def _weighted_values(k_BTC: Tensor, v_BTC: Tensor, dtype: torch.dtype) -> Tensor:
    """x = (e v, e) with e = exp(k - max_t k); NaN for a whole (batch, channel) where k is not finite."""
    top, bottom = k_BTC.amax(1, keepdim=True).to(dtype), k_BTC.amin(1, keepdim=True).to(dtype)
    m_B1C = top + 0 * top + 0 * bottom
    x_SBTC = k_BTC.new_empty((2, *k_BTC.shape), dtype=dtype)
    torch.exp(k_BTC - m_B1C, out=x_SBTC[1])
    torch.mul(x_SBTC[1], v_BTC, out=x_SBTC[0])
    return x_SBTC


def _two_sided(x_SBTC: Tensor, past: Tensor, future: Tensor, bonus_C: Tensor) -> Tensor:
    total_SBTC = x_SBTC * bonus_C
    total_SBTC[:, :, 1:] += past[:, :, :-1]
    total_SBTC[:, :, :-1] += future[:, :, 1:]
    return total_SBTC


def forward(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, dtype: torch.dtype) -> Tensor:
    """y (B, T, C) in `dtype`."""
    powers = powers_NRC(w_C, k_BTC.shape[1], dtype)
    x = _weighted_values(k_BTC, v_BTC, dtype)
    num, den = _two_sided(x, past_(x.clone(), powers), future_(x.clone(), powers), u_C.to(dtype).exp())
    return num / den


def backward(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, gy_BTC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w (C,), u (C,), k and v (B, T, C), in `dtype`."""
    powers = powers_NRC(w_C, k_BTC.shape[1], dtype)
    bonus_C = u_C.to(dtype).exp()
    x = _weighted_values(k_BTC, v_BTC, dtype)
    x_past, x_future = past_(x.clone(), powers), future_(x.clone(), powers)
    num, den = _two_sided(x, x_past, x_future, bonus_C)

    # g_t = gy_t / den_t and h_t = -g_t y_t are summed over the readers as (e v, e) is over the sources.
    g = torch.empty_like(x)
    torch.div(gy_BTC, den, out=g[0])
    torch.mul(g[0], num.div_(den).neg_(), out=g[1])
    grad_u_C = bonus_C * (g * x).sum((0, 1, 2))
    g_past, g_future = past_(g.clone(), powers), future_(g.clone(), powers)
    total = _two_sided(g, g_past, g_future, bonus_C)
    grad_v = total[0] * x[1]
    grad_k = total.mul_(x).sum(0)

    # Each token strictly between a source and its reader adds one to their distance.
    between = (g_future[:, :, 2:] * x_past[:, :, :-2]).addcmul_(g_past[:, :, :-2], x_future[:, :, 2:])
    grad_w = between.sum((0, 1, 2)) * -powers[0, 0]
    return grad_w, grad_u_C, grad_k, grad_v
