"""The public function `bi_wkv`: checks its arguments and hands them to a backend.

The equation is in `reference.py`, the linear-time arithmetic in `torch.py`, the derivation in `README.md`.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from torch import Tensor

from drwkv.kernels.wkv.reference import bi_wkv_reference
from drwkv.kernels.wkv.torch import bi_wkv_torch

BACKENDS = {"reference": bi_wkv_reference, "torch": bi_wkv_torch}


def bi_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Mix v over all tokens with weights from k and from the distance in tokens, at a cost linear in T.

    y_t = sum_i p_ti v_i / sum_i p_ti, where p_ti = exp(k_i - (|t - i| - 1) decay) for i != t and
    p_tt = exp(first + k_t), for each batch and channel by itself (Diffusion-RWKV, arXiv 2404.04478).

    decay, first: (C,), per token (already divided by T), of either sign, safe up to 1e6 in size.
    k, v: (B, T, C), any T >= 1 and C >= 1, in any strides; B may be 0. Returns (B, T, C) in v's dtype.
    Dtypes: floating point, and they may differ (float32 decay beside bfloat16 k and v); the state is float32,
    or float64 when k or v is. Gradients flow to all four and have their input's dtype.
    A NaN or +inf in k makes its (batch, channel) NaN; a token whose k is -inf weighs nothing.
    backend: "torch" or "reference" (O(T^2)); None chooses by the device of k.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for an unknown backend.

    >>> y = bi_wkv(decay / T, first / T, k, v)
    """
    _check(decay, first, k, v)
    return BACKENDS[_backend_for(k, backend)](decay, first, k, v)


def _backend_for(k: Tensor, backend: str | None) -> str:
    if backend is None:
        return "torch"
    if backend == "triton":
        raise ValueError("bi_wkv: backend 'triton' is not in this version; use 'torch' (or None)")
    if backend not in BACKENDS:
        raise ValueError(f"bi_wkv: unknown backend {backend!r}; known are {', '.join(map(repr, BACKENDS))}")
    return backend


def _check(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dim() != 3 or k.shape != v.shape:
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"bi_wkv: k and v must have one shape (B, T, C); got {shapes}")
    if k.shape[1] == 0 or k.shape[2] == 0:
        raise ValueError(f"bi_wkv: k and v need at least one token and one channel; got k {tuple(k.shape)}")
    named = {"decay": decay, "first": first, "k": k, "v": v}
    for name in ("decay", "first"):
        if named[name].shape != k.shape[2:]:
            raise ValueError(
                f"bi_wkv: {name} must be (C,) = ({k.shape[2]},) to fit k {tuple(k.shape)}; "
                f"got {tuple(named[name].shape)}"
            )
    for name, x in named.items():
        if not x.is_floating_point():
            raise ValueError(f"bi_wkv: {name} must be floating point; got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"bi_wkv: {name} is on {x.device} but k is on {k.device}; move them together")
