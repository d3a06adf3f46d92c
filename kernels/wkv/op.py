"""The public functions `bi_wkv` and `bi_wkv_gated`: they check their arguments and hand them to a backend.

The equation is in `reference.py`, the linear-time arithmetic in `torch.py` and `triton.py`, the derivation in
`README.md`. Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drwkv.kernels import backends
from drwkv.kernels.wkv.reference import bi_wkv_reference
from drwkv.kernels.wkv.torch import bi_wkv_torch

if backends.HAS_TRITON:
    from drwkv.kernels.wkv.triton import bi_wkv_gated_triton, bi_wkv_triton

BACKENDS = ("reference", "torch", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bi_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Mix v over all tokens with weights from k and from the distance in tokens, at a cost linear in T.

    y_t = sum_i p_ti v_i / sum_i p_ti, where p_ti = exp(k_i - (|t - i| - 1) decay) for i != t and
    p_tt = exp(first + k_t), for each batch and channel by itself (Diffusion-RWKV, arXiv 2404.04478).

    decay, first: (C,), per token (already divided by T), of either sign, safe up to 1e6 in size.
    k, v: (B, T, C), any T >= 1 and C >= 1, in any strides; B may be 0. Returns (B, T, C) in v's dtype.
    Dtypes: floating point of 16 to 64 bits, and they may differ (float32 decay beside bfloat16 k and v); the state
    is float32, or float64 when k or v is. Gradients flow to all four and have their input's dtype.
    A NaN or +inf in k makes its (batch, channel) NaN; a token whose k is -inf weighs nothing. Finite k are safe up
    to 1e38 in size. Differentiable once, backward only.
    backend: "triton", "torch" or "reference" (O(T^2)); None: triton on a GPU that can, torch elsewhere.
    Raises ValueError for shapes, dtypes or devices that do not fit, for an unknown backend, and for one that
    cannot run here.

    >>> y = bi_wkv(decay / T, first / T, k, v)
    """
    _check("bi_wkv", decay, first, k, v)
    match _choose("bi_wkv", backend, k, v):
        case "triton":
            return bi_wkv_triton(decay, first, k, v)
        case "torch":
            return bi_wkv_torch(decay, first, k, v)
        case _:
            return bi_wkv_reference(decay, first, k, v)


def bi_wkv_gated(
    decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor, *, backend: str | None = None
) -> Tensor:
    """sigmoid(r) * bi_wkv(decay, first, k, v): on a GPU in the same kernel, where the gate costs no pass of its own.

    r: (B, T, C), floating point, in any strides. All else is as in `bi_wkv`. Returns (B, T, C) in v's dtype: the
    triton backend rounds once, the others y, then the gate, then the product.
    Raises ValueError as `bi_wkv` does.

    >>> y = bi_wkv_gated(decay / T, first / T, k, v, r)
    """
    _check("bi_wkv_gated", decay, first, k, v, r)
    match _choose("bi_wkv_gated", backend, k, v, r):
        case "triton":
            return bi_wkv_gated_triton(decay, first, k, v, r)
        case "torch":
            y = bi_wkv_torch(decay, first, k, v)
        case _:
            y = bi_wkv_reference(decay, first, k, v)
    return torch.sigmoid(r).to(y.dtype) * y


def _choose(operator: str, backend: str | None, *tensors: Tensor) -> str:
    widest = tensors[0]
    for x in tensors:  # as torch.compile can follow
        widest = x if x.dtype == torch.float64 else widest
    return backends.choose(operator, backend, widest, BACKENDS)


def _check(
    operator: str, decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None
) -> None:
    named = {"decay": decay, "first": first, "k": k, "v": v} | ({} if r is None else {"r": r})
    if k.dim() != 3 or any(x.shape != k.shape for x in (v, r) if x is not None):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in list(named.items())[2:])
        names = "k and v" if r is None else "k, v and r"
        raise ValueError(f"{operator}: {names} must have one shape (B, T, C); got {shapes}")
    if k.shape[1] == 0 or k.shape[2] == 0:
        raise ValueError(
            f"{operator}: k and v need at least one token and one channel; got k {tuple(k.shape)}"
        )
    for name in ("decay", "first"):
        if named[name].shape != k.shape[2:]:
            raise ValueError(
                f"{operator}: {name} must be (C,) = ({k.shape[2]},) to fit k {tuple(k.shape)}; "
                f"got {tuple(named[name].shape)}"
            )
    for name, x in named.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{operator}: {name} must be floating point of 16, 32 or 64 bits; got {x.dtype}")
        if x.device != k.device:
            raise ValueError(
                f"{operator}: {name} is on {x.device} but k is on {k.device}; move them together"
            )
