"""Inputs, results and cases that the tests of Bi-WKV's backends share.

Channels that one maximum holds
are "near", those that take the general scan "far".
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from closeness import assert_close
from torch import Tensor

from drwkv.kernels.wkv import bi_wkv, bi_wkv_gated

NAMES = ("output", "grad decay", "grad first", "grad k", "grad v", "grad r")
MOST_PAIRS = 4_000_000  # of tokens: with more the equation, O(T^2), is evaluated for the first channels, three at least


def make_inputs(
    shape: tuple[int, int, int],
    *,
    decay_times_T: str = "mixed signs",
    k_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """decay, first, k, v and with `gated` r, with gradients asked for."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, channels = shape[1:]
    spread_C = torch.rand(channels, generator=generator)
    index_C = torch.arange(channels)
    decay = {
        "positive": 5 * spread_C,
        "zero": 0 * spread_C,
        "negative": -5 * spread_C,
        "mixed signs": 10 * spread_C - 5,
        "positive, zero, negative": 5 * spread_C * (1 - index_C % 3),
        "far": torch.where(spread_C > 0.5, 1, -1) * (70 + 100 * spread_C),
        "near and far": torch.linspace(-90, 100, channels),
    }[decay_times_T]
    first = torch.randn(channels, generator=generator)
    k = k_scale * torch.randn(shape, generator=generator)
    v = torch.randn(shape, generator=generator)
    inputs = [decay / num_tokens, first, k, v]
    if gated:
        inputs.append(torch.randn(shape, generator=generator))
    return [x.to(device, dtype).requires_grad_() for x in inputs]


def apply(inputs: list[Tensor], backend: str | None) -> Tensor:
    """bi_wkv of four inputs, bi_wkv_gated of five."""
    return (bi_wkv if len(inputs) == 4 else bi_wkv_gated)(*inputs, backend=backend)


def results(inputs: list[Tensor], backend: str | None = "torch") -> dict[str, Tensor]:
    """The output and every gradient, for a fixed cotangent."""
    y = apply(inputs, backend)
    gy = cotangent(y)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, inputs, gy)), strict=False))


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def expected(inputs: list[Tensor]) -> dict[str, Tensor]:
    """The same by the equation in float64; for large inputs of the first channels alone."""
    batch, num_tokens, _ = inputs[2].shape
    channels = slice(max(3, MOST_PAIRS // max(1, batch * num_tokens**2)))
    exact = [x.detach().double()[..., channels].requires_grad_() for x in inputs]
    y = apply(exact, "reference")
    gy = cotangent(inputs[3]).double()[..., channels]
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, exact, gy)), strict=False))


def assert_safe(inputs: list[Tensor], backend: str) -> None:
    """Where weights saturate, the output and the gradient of v are right and every gradient is finite."""
    actual = results(inputs, backend)
    assert_close(actual, expected(inputs), 1e-5, ("output", "grad v"))
    assert all(x.isfinite().all() for x in actual.values())


def assert_safe_with(inputs: list[Tensor], name: str, value: float, backend: str) -> None:
    """The same with `value` as one channel's decay or first."""
    with torch.no_grad():
        inputs[("decay", "first").index(name)][1] = value
    assert_safe(inputs, backend)
