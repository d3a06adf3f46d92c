"""The yardstick: Bi-WKV as its first implementations had it, one token after the other, with autograd's backward.

Not a backend: `drwkv.kernels.wkv` has those. Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bi_wkv_loop(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as a loop over tokens that carries (maximum, numerator, denominator); arguments as in `bi_wkv`."""
    num_tokens = k.shape[1]

    def scan(order: Sequence[int]) -> list[tuple[Tensor, ...]]:
        m, num, den = torch.full_like(k[:, 0], -1e30), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        before: list[tuple[Tensor, ...]] = [()] * num_tokens
        for t in order:
            before[t] = (m, num, den)
            aged, k_t, v_t = m - decay, k[:, t], v[:, t]
            m = torch.maximum(aged, k_t)
            old, new = torch.exp(aged - m), torch.exp(k_t - m)
            num, den = old * num + new * v_t, old * den + new
        return before

    past, future = scan(range(num_tokens)), scan(range(num_tokens - 1, -1, -1))
    y = []
    for t in range(num_tokens):
        (m_past, num_past, den_past), (m_future, num_future, den_future) = past[t], future[t]
        own, v_t = first + k[:, t], v[:, t]
        m = torch.maximum(torch.maximum(m_past, m_future), own)
        a, b, c = torch.exp(m_past - m), torch.exp(m_future - m), torch.exp(own - m)
        y.append((a * num_past + b * num_future + c * v_t) / (a * den_past + b * den_future + c))
    return torch.stack(y, dim=1)


class _Unbound:
    """Tokens cut once by `unbind`: its backward is one stack, that of each k[:, t] fills a whole tensor."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.tokens = x.shape, x.unbind(1)

    def __getitem__(self, index: tuple[slice, int]) -> Tensor:
        return self.tokens[index[1]]


def bi_wkv_loop_unbind(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same loop, for information: what it costs where its author knows autograd well."""
    return bi_wkv_loop(decay, first, _Unbound(k), _Unbound(v))  # type: ignore[arg-type]
