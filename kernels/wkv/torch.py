"""The `torch` backend of Bi-WKV: one custom operator whose time and memory are linear in T, on any device.

Here: registration (fake tensors, autograd, FLOP count) and the choice of arithmetic per channel. The
arithmetic itself is in `one_maximum.py` and `carried_maximum.py`, the derivation in `README.md`.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from drwkv.kernels.wkv import carried_maximum, one_maximum


def bi_wkv_torch(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV in time and memory linear in T; arguments as in `op.bi_wkv`, unchecked."""
    return _bi_wkv(decay, first, k, v)


@torch.library.custom_op("drwkv::bi_wkv", mutates_args=())
def _bi_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    near, far = _split_channels(decay, first, k.shape[1])
    if near is None:
        one_maximum.forward(decay, first, k, v, y_BTC=y, dtype=_state_dtype(k, v))
        return y
    part = y[..., near]
    one_maximum.forward(*_pick(near, decay, first, k, v), y_BTC=part, dtype=_state_dtype(k, v))
    y[..., near] = part
    y[..., far] = carried_maximum.forward(*_pick(far, decay, first, k, v)).to(y.dtype)
    return y


@torch.library.custom_op("drwkv::bi_wkv_backward", mutates_args=())
def _bi_wkv_backward(
    gy: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gk = torch.empty_like(k, memory_format=torch.contiguous_format)
    gv = torch.empty_like(v, memory_format=torch.contiguous_format)
    near, far = _split_channels(decay, first, k.shape[1])
    if near is None:
        gw, gu = one_maximum.backward(decay, first, k, v, gy, gk_BTC=gk, gv_BTC=gv, dtype=_state_dtype(k, v))
        return gw.to(decay.dtype), gu.to(first.dtype), gk, gv

    gw, gu = torch.empty_like(decay), torch.empty_like(first)
    gk_part, gv_part = gk[..., near], gv[..., near]
    gw_part, gu_part = one_maximum.backward(
        *_pick(near, decay, first, k, v, gy), gk_BTC=gk_part, gv_BTC=gv_part, dtype=_state_dtype(k, v)
    )
    far_grads = carried_maximum.backward(*_pick(far, decay, first, k, v, gy))
    near_grads = (gw_part, gu_part, gk_part, gv_part)
    for whole, near_part, far_part in zip((gw, gu, gk, gv), near_grads, far_grads, strict=True):
        whole[..., near] = near_part.to(whole.dtype)
        whole[..., far] = far_part.to(whole.dtype)
    return gw, gu, gk, gv


def _split_channels(decay: Tensor, first: Tensor, num_tokens: int) -> tuple[Tensor | None, Tensor]:
    """Indices of the channels that one maximum holds (None: all of them) and of those that it does not."""
    is_near_C = decay.abs() * num_tokens + first.abs() <= one_maximum.REACH
    if bool(is_near_C.all()):
        return None, decay
    return is_near_C.nonzero()[:, 0], is_near_C.logical_not().nonzero()[:, 0]


def _pick(channels: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    return [x[..., channels] for x in tensors]


def _state_dtype(k: Tensor, v: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (k.dtype, v.dtype) else torch.float32


@_bi_wkv.register_fake
def _(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@_bi_wkv_backward.register_fake
def _(
    gy: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv = (x.new_empty(x.shape) for x in (decay, first, k, v))
    return gw, gu, gk, gv


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _bi_wkv_backward(gy, *ctx.saved_tensors)


_bi_wkv.register_autograd(_differentiate, setup_context=_save_inputs)


# Per token and channel, an exponential counting as one.
# Forward: x 3, two scans of a pair with their carries 16, diagonal and sum 6, quotient 1.
# Backward: the forward's x and sums 25, g and h 4, their two scans 16, for u and w 16, for k and v 10.
FORWARD_FLOPS = 26
BACKWARD_FLOPS = 71


@register_flop_formula(torch.ops.drwkv.bi_wkv)
def _forward_flops(decay: Any, first: Any, k: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return FORWARD_FLOPS * k[0] * k[1] * k[2]


@register_flop_formula(torch.ops.drwkv.bi_wkv_backward)
def _backward_flops(gy: Any, decay: Any, first: Any, k: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return BACKWARD_FLOPS * k[0] * k[1] * k[2]
