"""Bi-WKV sums with a maximum of their own at every token: any decay, any k, still linear in T.

The slow and general path: a two-level scan over (maximum, values) in float64. Channels of ordinary decay take
`one_maximum.py`; `torch.py` chooses. The equations are numbered in `README.md`.
Shapes: S the pair (numerator, denominator), B batch, T tokens, C channels, N chunks, L tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
EMPTY = -1e300  # the logarithm of an empty sum's scale: finite, so that the difference of two is no NaN


class Sums(NamedTuple):
    """The values exp(log_scale) * values: log_scale (..., C), values (S, ..., C)."""

    log_scale: Tensor
    values: Tensor


def _add(*terms: Sums) -> Sums:
    m = terms[0].log_scale
    for term in terms[1:]:
        m = torch.maximum(m, term.log_scale)
    values = terms[0].values * torch.exp(terms[0].log_scale - m)
    for term in terms[1:]:
        values.addcmul_(term.values, torch.exp(term.log_scale - m))
    return Sums(m, values)


def _past(s_BTC: Tensor, x_SBTC: Tensor, w_C: Tensor) -> Sums:
    """sum_{i<=t} exp(s_i - (t-i) w) x_i at every t."""
    num_tokens = s_BTC.shape[1]
    chunk = min(CHUNK, num_tokens)
    pad = -num_tokens % chunk
    s = torch.nn.functional.pad(s_BTC, (0, 0, 0, pad), value=EMPTY).unflatten(1, (-1, chunk))
    x = torch.nn.functional.pad(x_SBTC, (0, 0, 0, pad)).unflatten(2, (-1, chunk))

    # Inside the chunks: after the step of size 2^j a token holds its last 2^(j+1) tokens.
    size = 1
    while size < chunk:
        earlier = Sums(s[:, :, :-size] - size * w_C, x[:, :, :, :-size])
        later = _add(Sums(s[:, :, size:], x[:, :, :, size:]), earlier)
        s = torch.cat([s[:, :, :size], later.log_scale], dim=2)
        x = torch.cat([x[:, :, :, :size], later.values], dim=3)
        size *= 2

    # Over the chunks: what enters each, one after the other.
    carry = Sums(torch.full_like(s[:, 0, 0], EMPTY), torch.zeros_like(x[:, :, 0, 0]))
    entering = []
    for n in range(s.shape[1]):
        entering.append(carry)
        aged = Sums(carry.log_scale - chunk * w_C, carry.values)
        carry = _add(Sums(s[:, n, -1], x[:, :, n, -1]), aged)
    entering_s = torch.stack([c.log_scale for c in entering], dim=1)[:, :, None, :]
    entering_x = torch.stack([c.values for c in entering], dim=2)[:, :, :, None, :]
    age_L1 = torch.arange(1, chunk + 1, dtype=s.dtype, device=s.device)[:, None]
    whole = _add(Sums(s, x), Sums(entering_s - age_L1 * w_C, entering_x))
    return Sums(whole.log_scale.flatten(1, 2)[:, :num_tokens], whole.values.flatten(2, 3)[:, :, :num_tokens])


def _future(s_BTC: Tensor, x_SBTC: Tensor, w_C: Tensor) -> Sums:
    """sum_{i>=t} exp(s_i - (i-t) w) x_i at every t."""
    flipped = _past(s_BTC.flip(1), x_SBTC.flip(2), w_C)
    return Sums(flipped.log_scale.flip(1), flipped.values.flip(2))


def _two_sided(s_BTC: Tensor, x_SBTC: Tensor, past: Sums, future: Sums, u_C: Tensor) -> Sums:
    """The sums without the token itself, by one token's shift, and the token itself at weight exp(u)."""
    pad = torch.nn.functional.pad
    before = Sums(
        pad(past.log_scale[:, :-1], (0, 0, 1, 0), value=EMPTY), pad(past.values[:, :, :-1], (0, 0, 1, 0))
    )
    after = Sums(
        pad(future.log_scale[:, 1:], (0, 0, 0, 1), value=EMPTY), pad(future.values[:, :, 1:], (0, 0, 0, 1))
    )
    return _add(Sums(s_BTC + u_C, x_SBTC), before, after)


def _log_keys(k_BTC: Tensor) -> Tensor:
    """k - max_t k in float64. A k of -inf weighs nothing; a NaN or +inf makes its (batch, channel) NaN."""
    k = k_BTC.double()
    return (k - k.amax(1, keepdim=True)).clamp_min(EMPTY)


def forward(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """y (B, T, C) in float64."""
    w, u, s, v = w_C.double(), u_C.double(), _log_keys(k_BTC), v_BTC.double()
    x = torch.stack([v, torch.ones_like(v)])
    num, den = _two_sided(s, x, _past(s, x, w), _future(s, x, w), u).values
    return num / den


def backward(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, gy_BTC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w (C,), u (C,), k and v (B, T, C), in float64."""
    w, u, s, v = w_C.double(), u_C.double(), _log_keys(k_BTC), v_BTC.double()
    x = torch.stack([v, torch.ones_like(v)])
    x_past, x_future = _past(s, x, w), _future(s, x, w)
    whole = _two_sided(s, x, x_past, x_future, u)
    num, den = whole.values

    # (gy, -gy y) at the scale 1 / den_t are summed over the readers as (v, 1) is over the sources.
    r = -(whole.log_scale + den.log())
    gy = gy_BTC.double()
    g = torch.stack([gy, -gy * (num / den)])
    g_past, g_future = _past(r, g, w), _future(r, g, w)
    total = _two_sided(r, g, g_past, g_future, u)
    grad_v = total.values[0] * torch.exp(s + total.log_scale)
    grad_k = (total.values * x).sum(0) * torch.exp(s + total.log_scale)
    grad_u = ((g * x).sum(0) * torch.exp(s + r + u)).sum((0, 1))

    # Each token strictly between a source and its reader adds one to their distance.
    grad_w = torch.zeros_like(w)
    for earlier, later in ((x_past, g_future), (g_past, x_future)):
        weight = torch.exp(earlier.log_scale[:, :-2] + later.log_scale[:, 2:] - w)
        grad_w -= ((earlier.values[:, :, :-2] * later.values[:, :, 2:]).sum(0) * weight).sum((0, 1))
    return grad_w, grad_u, grad_k, grad_v
