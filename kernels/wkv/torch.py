"""The `torch` backend of Bi-WKV: one custom operator whose time and memory are linear in T, on any device.

Here: registration (fake tensors, autograd, FLOP count) and the choice of arithmetic per channel. The arithmetic
itself is in `one_maximum.py` and `carried_maximum.py`, the derivation in `README.md`.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from drwkv.kernels.wkv import carried_maximum, one_maximum


def _state_dtype(k: Tensor, v: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (k.dtype, v.dtype) else torch.float32


def _split_channels(decay: Tensor, first: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Indices of the channels that one maximum can hold, and of those that it cannot (None: there are none)."""
    reach_C = decay.double().abs() * num_tokens + first.double().abs()
    is_near_C = reach_C <= one_maximum.REACH
    if bool(is_near_C.all()):
        return torch.empty(0), None
    return is_near_C.nonzero()[:, 0], (~is_near_C).nonzero()[:, 0]


@torch.library.custom_op("drwkv::bi_wkv", mutates_args=())
def _forward(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    near, far = _split_channels(decay, first, k.shape[1])
    if far is None:
        one_maximum.forward(decay, first, k, v, y, _state_dtype(k, v))
        return y
    if len(near):
        part = y[..., near]
        one_maximum.forward(*(x[..., near] for x in (decay, first, k, v)), part, _state_dtype(k, v))
        y[..., near] = part
    y[..., far] = carried_maximum.forward(*(x[..., far] for x in (decay, first, k, v))).to(y.dtype)
    return y


@torch.library.custom_op("drwkv::bi_wkv_backward", mutates_args=())
def _backward(
    grad: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (decay, first, k, v, grad)
    gw, gu, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:4])
    near, far = _split_channels(decay, first, k.shape[1])
    if far is None:
        w_and_u = one_maximum.backward(*inputs, gk, gv, _state_dtype(k, v))
        return w_and_u[0].to(gw.dtype), w_and_u[1].to(gu.dtype), gk, gv
    if len(near):
        parts = gk[..., near], gv[..., near]
        gw[near], gu[near] = (
            x.to(like.dtype)
            for x, like in zip(one_maximum.backward(*(x[..., near] for x in inputs), *parts, _state_dtype(k, v)), (gw, gu))
        )
        gk[..., near], gv[..., near] = parts
    for whole, part in zip((gw, gu, gk, gv), carried_maximum.backward(*(x[..., far] for x in inputs)), strict=True):
        whole[..., far] = part.to(whole.dtype)
    return gw, gu, gk, gv


@_forward.register_fake
def _(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@_backward.register_fake
def _(
    grad: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        decay.new_empty(decay.shape),
        first.new_empty(first.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.drwkv.bi_wkv_backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


def bi_wkv_torch(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV in time and memory linear in T; arguments as in `op.bi_wkv`, unchecked."""
    return torch.ops.drwkv.bi_wkv(decay, first, k, v)


# Per token and channel forward: e v, two scans of the pair (2 each, and the carry over chunks 2), the diagonal and
# the sum (4 x 2), the quotient; backward: the same again for the sources and for the readers, and the products.
FORWARD_FLOPS = 2 + 16 + 8 + 1
BACKWARD_FLOPS = 2 * FORWARD_FLOPS + 20


@register_flop_formula(torch.ops.drwkv.bi_wkv)
def _forward_flops(decay: Any, first: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return FORWARD_FLOPS * k[0] * k[1] * k[2]


@register_flop_formula(torch.ops.drwkv.bi_wkv_backward)
def _backward_flops(grad: Any, decay: Any, first: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return BACKWARD_FLOPS * k[0] * k[1] * k[2]
