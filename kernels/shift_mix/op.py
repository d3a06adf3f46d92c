"""The public function `shift_mix`: checks its arguments and hands them to a backend.

The equation is in `reference.py`, the arithmetic in `torch.py` and `triton.py`, the derivation in `README.md`;
which backend runs is decided in `drwkv.kernels.backends`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drwkv.kernels import backends
from drwkv.kernels.shift_mix.reference import shift_mix_reference
from drwkv.kernels.shift_mix.torch import shift_mix_torch

BACKENDS = ("reference", "torch", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_MIXES = 4


def shift_mix(
    x: Tensor,
    mixes: Tensor,
    grid: tuple[int, int],
    *,
    num_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Lerp each token with its neighbour once for each of M mixes: out_m = x mix_m + xx (1 - mix_m).

    xx is q_shift(x): of the h x w image tokens the four quarters of the channels come from the token on the left,
    on the right, above and below, zeros from beyond the border; the D % 4 channels left over and the `num_tokens`
    leading conditioning tokens are their own neighbours (Vision-RWKV, arXiv 2403.02308, section 3.2).

    x: (B, num_tokens + h w, D) in any strides, D >= 1; B may be 0. mixes: (M, D), M in 1..4. grid: (h, w).
    Returns M contiguous tensors of x's shape in `out_dtype`, None meaning x's. Dtypes: floating point, and x and
    mixes may differ; the arithmetic is float32 (float64 when x or mixes is), rounded once. Gradients flow to x and
    mixes and have their dtype. backend: "reference", "torch" or "triton"; None chooses by the device of x.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for a backend unknown or not possible here.

    >>> x_r, x_k, x_v = shift_mix(x, torch.stack([mix_r, mix_k, mix_v]), (h, w))
    """
    h, w = grid
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, mixes, h, w, num_tokens, out_dtype)
    chosen = backends.choose("shift_mix", backend, _widest(x, mixes, out_dtype), BACKENDS)
    if chosen == "triton":
        from drwkv.kernels.shift_mix.triton import shift_mix_triton

        return shift_mix_triton(x, mixes, (h, w), out_dtype)
    run = shift_mix_torch if chosen == "torch" else shift_mix_reference
    return run(x, mixes, (h, w), out_dtype)


def _widest(x: Tensor, mixes: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The tensor that decides who can run this: x, or a float64 one if anything is float64."""
    is_double = torch.float64 in (mixes.dtype, out_dtype)
    return x.new_empty(0, dtype=torch.float64) if is_double else x


def _check(x: Tensor, mixes: Tensor, h: int, w: int, num_tokens: int, out_dtype: torch.dtype) -> None:
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"shift_mix: x must be (B, T, D) with at least one channel; got {tuple(x.shape)}")
    if h < 1 or w < 1 or num_tokens < 0 or x.shape[1] != num_tokens + h * w:
        raise ValueError(
            f"shift_mix: x {tuple(x.shape)} has {x.shape[1]} tokens, but num_tokens {num_tokens} and grid "
            f"{h} x {w} make {num_tokens + h * w} (each side of the grid at least 1)"
        )
    if mixes.dim() != 2 or mixes.shape[1] != x.shape[2] or not 1 <= mixes.shape[0] <= MAX_MIXES:
        raise ValueError(
            f"shift_mix: mixes must be (M, D) with M in 1..{MAX_MIXES} and D = {x.shape[2]} to fit x "
            f"{tuple(x.shape)}; got {tuple(mixes.shape)}"
        )
    for name, dtype in (("x", x.dtype), ("mixes", mixes.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"shift_mix: {name} must be floating point of 16, 32 or 64 bits; got {dtype}")
    if mixes.device != x.device:
        raise ValueError(f"shift_mix: mixes is on {mixes.device} but x is on {x.device}; move them together")
