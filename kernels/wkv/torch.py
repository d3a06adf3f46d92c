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


def _far_channels(decay: Tensor, first: Tensor, num_tokens: int) -> Tensor:
    """Indices of the channels whose weights span more than one maximum can hold."""
    reach_C = decay.detach().double().abs() * num_tokens + first.detach().double().abs()
    return (~(reach_C <= one_maximum.REACH)).nonzero()[:, 0]


@torch.library.custom_op("drwkv::bi_wkv", mutates_args=())
def _forward(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = _far_channels(decay, first, k.shape[1])
    if len(far) == 0:
        return one_maximum.forward(decay, first, k, v, _state_dtype(k, v)).to(v.dtype)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    near = _others(far, k.shape[2])
    y[..., near] = one_maximum.forward(
        decay[near], first[near], k[..., near], v[..., near], _state_dtype(k, v)
    ).to(v.dtype)
    y[..., far] = carried_maximum.forward(decay[far], first[far], k[..., far], v[..., far]).to(v.dtype)
    return y


def _others(far: Tensor, num_channels: int) -> Tensor:
    near_C = torch.ones(num_channels, dtype=torch.bool, device=far.device)
    near_C[far] = False
    return near_C.nonzero()[:, 0]


@torch.library.custom_op("drwkv::bi_wkv_backward", mutates_args=())
def _backward(
    grad: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (decay, first, k, v)
    far = _far_channels(decay, first, k.shape[1])
    if len(far) == 0:
        grads = one_maximum.backward(decay, first, k, v, grad, _state_dtype(k, v))
        return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore[return-value]
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    near = _others(far, k.shape[2])
    for channels, grads in (
        (near, one_maximum.backward(*(x[..., near] for x in (*inputs, grad)), _state_dtype(k, v))),
        (far, carried_maximum.backward(*(x[..., far] for x in (*inputs, grad)))),
    ):
        for whole, part in zip(out, grads, strict=True):
            whole[..., channels] = part.to(whole.dtype)
    return out  # type: ignore[return-value]


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
