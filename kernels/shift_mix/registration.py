"""What every backend's operator shares: schema, fake tensors, autograd and FLOP count, registered by `register`.

The arithmetic is in `torch.py` and `triton.py`. The number of conditioning tokens is not passed: it is N - h w.
Shapes: B batch, N = K + h w tokens, D channels, M mixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

# (x, mixes, h, w, out_dtype) -> M outputs, and (grads, x, mixes, h, w) -> grad x, grad mixes
Forward = Callable[[Tensor, Tensor, int, int, torch.dtype], list[Tensor]]
Backward = Callable[[Sequence[Tensor], Tensor, Tensor, int, int], tuple[Tensor, Tensor]]

LIBRARY = torch.library.Library("drwkv", "FRAGMENT")
FORWARD_SCHEMA = "(Tensor x, Tensor mixes, SymInt h, SymInt w, ScalarType out_dtype) -> Tensor[]"
BACKWARD_SCHEMA = "(Tensor[] grads, Tensor x, Tensor mixes, SymInt h, SymInt w) -> (Tensor, Tensor)"


def register(name: str, forward: Forward, backward: Backward) -> tuple[OpOverload, OpOverload]:
    """Make the operators drwkv::`name` and drwkv::`name`_backward of two functions.

    forward: x (B, N, D), mixes (M, D) -> M new contiguous tensors (B, N, D) of out_dtype.
    backward: M gradients (B, N, D) of any strides -> grad x and grad mixes, contiguous, in the inputs' dtypes.
    """
    operator = _define(name, FORWARD_SCHEMA, forward, _fake_forward)
    gradient = _define(f"{name}_backward", BACKWARD_SCHEMA, backward, _fake_backward)
    register_flop_formula(operator.overloadpacket)(_forward_flops)
    register_flop_formula(gradient.overloadpacket)(_backward_flops)

    # `torch.library.custom_op` with `register_autograd` would do the rest, but its way with a list of outputs takes
    # 70 us more of Python for a forward and backward, a tenth of the whole on a small CPU batch; so it is spelt out.
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, mixes: Tensor, h: int, w: int, out_dtype: torch.dtype
        ) -> tuple[Tensor, ...]:
            ctx.save_for_backward(x, mixes)
            ctx.grid = (h, w)
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(operator(x, mixes, h, w, out_dtype))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return *gradient(grads, *ctx.saved_tensors, *ctx.grid), None, None, None

    def differentiable(x: Tensor, mixes: Tensor, h: int, w: int, out_dtype: torch.dtype) -> list[Tensor]:
        if torch.is_grad_enabled() and (x.requires_grad or mixes.requires_grad):
            return list(Differentiable.apply(x, mixes, h, w, out_dtype))
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, mixes, h, w, out_dtype)

    LIBRARY.impl(name, differentiable, "Autograd")
    return operator, gradient


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"drwkv::{name}", fake)
    operator: OpOverload = getattr(torch.ops.drwkv, name).default
    return operator


def _fake_forward(x: Tensor, mixes: Tensor, h: int, w: int, out_dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=out_dtype) for _ in range(mixes.shape[0])]


def _fake_backward(
    grads: Sequence[Tensor], x: Tensor, mixes: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mixes.new_empty(mixes.shape)


# Per element. Forward: x - xx, and a multiply-add for each mix.
# Backward: x - xx and the neighbours' share added; for each mix three multiply-adds.
def _forward_flops(x: Sequence[int], mixes: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return (1 + 2 * mixes[0]) * math.prod(x)


def _backward_flops(grads: Any, x: Sequence[int], mixes: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return (2 + 6 * mixes[0]) * math.prod(x)
