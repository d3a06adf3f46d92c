"""The `triton` backend of Bi-WKV: custom operators, launches, and what the launches may be.

Here: registration (fake tensors, autograd, FLOP count), buffers, grids, and the choice of the launch configuration. The
kernels are in `triton_forward.py` and `triton_backward.py`, what of them is compiled without a GPU in
`triton_compilations.py`; the derivation is in `README.md`.
Shapes: B batch, T tokens, C channels, S tiles, P parts of the decays' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from drwkv.kernels import autotune, backends
from drwkv.kernels.wkv import triton_backward, triton_forward
from drwkv.kernels.wkv.torch import BACKWARD_FLOPS, FORWARD_FLOPS

CARRIED_TILE = {"N": 16, "BC": 8}  # of the general path
CARRIED_WARPS = 4
WHOLE_ROWS, EXCHANGE_ROWS = 16, 64  # tiles that meet at a time: inside one program, in a launch of its own
EXCHANGE = {"BC": 16, "ROWS": EXCHANGE_ROWS}
EXCHANGE_WARPS = 16
MAX_WHOLE_TILES = 64  # longer sequences are always cut
PROGRAMS_TO_FILL = 264  # two for each multiprocessor of the largest chip known here


@dataclass(frozen=True)
class Config:
    """One launch configuration: tiles of N runs of R tokens by BC channels."""

    N: int
    R: int
    BC: int
    num_warps: int

    @property
    def tile(self) -> int:
        return self.N * self.R

    def span(self, num_tokens: int) -> int:
        """The longest distance over which a decay is multiplied up: a tile may be longer than the sequence."""
        return max(num_tokens, self.tile)

    @property
    def constants(self) -> dict[str, int]:
        return {"N": self.N, "R": self.R, "BC": self.BC}


SHORT = 32  # tokens of which a small tile holds all
SMALL = (Config(4, 8, 16, 2),)
FORWARD = (Config(16, 8, 32, 4), Config(16, 8, 16, 8))  # the first is the default
BACKWARD = (Config(16, 8, 16, 8), Config(8, 8, 32, 8))
ODD = (Config(16, 8, 16, 8),)  # for strides that allow no vector loads, whose addresses take registers


def bi_wkv_triton(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV in fused kernels; arguments as in `op.bi_wkv`, unchecked but for their size.

    Raises ValueError for more than 2^30 tokens or channels.
    """
    backends.check_size("bi_wkv", "k", k)
    return _bi_wkv(decay, first, k, v)[0]


def bi_wkv_gated_triton(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """sigmoid(r) times Bi-WKV in the same kernels; arguments as in `op.bi_wkv_gated`, unchecked but for their size.

    Raises ValueError for more than 2^30 tokens or channels.
    """
    backends.check_size("bi_wkv", "k", k)
    return _bi_wkv_gated(decay, first, k, v, r)[0]


@torch.library.custom_op("drwkv::bi_wkv_triton", mutates_args=())
def _bi_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _forward(decay, first, k, v, None)


@torch.library.custom_op("drwkv::bi_wkv_gated_triton", mutates_args=())
def _bi_wkv_gated(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return _forward(decay, first, k, v, r)


@torch.library.custom_op("drwkv::bi_wkv_triton_backward", mutates_args=())
def _bi_wkv_backward(
    gy: Tensor, centre: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv, _ = _backward(gy, centre, decay, first, k, v, None)
    return gw, gu, gk, gv


@torch.library.custom_op("drwkv::bi_wkv_gated_triton_backward", mutates_args=())
def _bi_wkv_gated_backward(
    gy: Tensor, centre: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv, gr = _backward(gy, centre, decay, first, k, v, r)
    assert gr is not None
    return gw, gu, gk, gv, gr


def _forward(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, T, C), gated with r, and its ungated first token (B, C) in float32."""
    B, T, C = k.shape
    y, centre = v.new_empty((B, T, C)), k.new_empty((B, C), dtype=torch.float32)
    if not k.numel():
        return y, centre
    w, u, r_or_k = decay.contiguous(), first.contiguous(), k if r is None else r
    strides = (*k.stride(), *v.stride(), *r_or_k.stride())

    def launch(config: Config) -> None:
        """All kernels of the ordinary channels."""
        cut = _Cut(k, config)
        sums = k.new_empty((5, B, cut.S, C), dtype=torch.float32)
        if not cut.whole:
            cut.sum_sources(w, u, k, v, None, sums)
            cut.exchange(w, u, sums)
        triton_forward.forward_kernel[cut.grid](
            w, u, k, v, r_or_k, y, centre, sums, *cut.sizes, *strides,
            GATED=r is not None, WHOLE=cut.whole, ROWS=WHOLE_ROWS, EVEN=cut.even, **cut.options,
        )  # fmt: skip

    with backends.on_device_of(k):
        config = _choose("bi_wkv_forward", FORWARD, launch, [k, v, r_or_k])
        launch(config)
        steps, grid = _carried_cut(k)
        triton_forward.forward_carried_kernel[grid](
            w, u, k, v, r_or_k, y, centre,
            k.new_empty((B, steps, C), dtype=torch.float64), k.new_empty((2, B, steps, C), dtype=torch.float32),
            T, C, steps, config.span(T), B * steps * C, *strides,
            GATED=r is not None, **CARRIED_TILE, num_warps=CARRIED_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y, centre


def _backward(
    gy: Tensor, centre: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of decay, first, k, v and r, each in its input's dtype."""
    B, T, C = k.shape
    gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    gr = None if r is None else torch.empty_like(r, memory_format=torch.contiguous_format)
    if not k.numel():
        return torch.zeros_like(decay), torch.zeros_like(first), gk, gv, gr
    w, u, r_or_k, gr_or_gk = (
        decay.contiguous(),
        first.contiguous(),
        k if r is None else r,
        gk if gr is None else gr,
    )
    strides = (*k.stride(), *v.stride(), *r_or_k.stride(), *gy.stride())

    def launch(config: Config) -> Tensor:
        """All kernels of the ordinary channels; the parts (2, B, P, C) of the gradients of decay and first."""
        cut = _Cut(k, config)
        sums, grad_sums = (k.new_empty((n, B, cut.S, C), dtype=torch.float32) for n in (5, 4))
        parts = k.new_empty((2, B, 1 if cut.whole else cut.S, C), dtype=torch.float32)

        def run(readers: bool, gradients: bool) -> None:
            triton_backward.backward_kernel[cut.grid](
                w, u, k, v, r_or_k, gy, centre, gk, gv, gr_or_gk, parts[0], parts[1], sums, grad_sums,
                *cut.sizes, *strides, GATED=r is not None, WHOLE=cut.whole, READERS=readers, GRADIENTS=gradients,
                ROWS=WHOLE_ROWS, EVEN=cut.even, **cut.options,
            )  # fmt: skip

        if cut.whole:
            run(True, True)
        else:
            cut.sum_sources(w, u, k, v, centre, sums)
            cut.exchange(w, u, sums)
            run(True, False)
            cut.exchange(w, u, grad_sums)
            run(False, True)
        return parts

    with backends.on_device_of(k):
        config = _choose("bi_wkv_backward", BACKWARD, launch, [k, v, r_or_k, gy])
        parts = launch(config)
        steps, grid = _carried_cut(k)
        triton_backward.backward_carried_kernel[grid](
            w, u, k, v, r_or_k, gy, centre, gk, gv, gr_or_gk, parts[0], parts[1],
            k.new_empty((3, B, steps, C), dtype=torch.float64),
            k.new_empty((3, 2, B, steps, C), dtype=torch.float32),
            T, C, steps, config.span(T), B * steps * C, parts.shape[2], *strides,
            GATED=r is not None, **CARRIED_TILE, num_warps=CARRIED_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        gw, gu = parts[0].sum((0, 1)), parts[1].sum((0, 1))
    return gw.to(decay.dtype), gu.to(first.dtype), gk, gv, gr


class _Cut:
    """How a launch is cut into programs, with what all of its kernels take."""

    def __init__(self, k: Tensor, config: Config) -> None:
        B, T, C = k.shape
        blocks = B * triton.cdiv(C, config.BC)
        self.S = triton.cdiv(T, config.tile)
        self.whole = self.S == 1 or (self.S <= MAX_WHOLE_TILES and blocks >= PROGRAMS_TO_FILL)
        self.even = T % config.tile == 0 and C % config.BC == 0
        self.grid = (blocks if self.whole else blocks * self.S,)
        self.sizes = (T, C, self.S, config.span(T), B * self.S * C)
        self.options = {**config.constants, "num_warps": config.num_warps, "enable_fp_fusion": True}
        self._length, self._batch = config.tile, B

    def sum_sources(
        self, w: Tensor, u: Tensor, k: Tensor, v: Tensor, centre: Tensor | None, sums: Tensor
    ) -> None:
        """Fill `sums` (5, B, S, C) with every tile's sums, of v less `centre` where given."""
        triton_forward.sums_kernel[self.grid](
            w, u, k, v, sums if centre is None else centre, sums, *self.sizes, *k.stride(), *v.stride(),
            CENTRED=centre is not None, EVEN=self.even, **self.options,
        )  # fmt: skip

    def exchange(self, w: Tensor, u: Tensor, sums: Tensor) -> None:
        """Turn every tile's sums into what comes to it."""
        triton_forward.exchange_kernel[(self._batch * triton.cdiv(sums.shape[3], EXCHANGE["BC"]),)](
            w, u, sums, *self.sizes, HAS_MAXIMUM=sums.shape[0] == 5, LENGTH=self._length, **EXCHANGE,
            num_warps=EXCHANGE_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _carried_cut(k: Tensor) -> tuple[int, tuple[int]]:
    """Steps and grid of the general path, whose programs end at once where one maximum does for all channels."""
    B, T, C = k.shape
    return triton.cdiv(T, CARRIED_TILE["N"]), (B * triton.cdiv(C, CARRIED_TILE["BC"]),)


def _choose(
    kernel: str,
    usual: tuple[Config, ...],
    launch: Callable[[Config], object],
    tensors: list[Tensor],
) -> Config:
    """The configuration for these sizes; batches of up to twice the size share one."""
    B, T, C = tensors[0].shape
    candidates = SMALL if T <= SHORT else usual if all(map(_allows_vectors, tensors)) else ODD
    key = (B.bit_length(), T, C, *(str(x.dtype) for x in tensors))

    def time_ms(config: Config) -> float:
        return autotune.launch_ms(lambda: launch(config))

    return autotune.choose(kernel, key, candidates, tensors[0].device, time_ms)


def _allows_vectors(x: Tensor) -> bool:
    """Whether Triton knows that rows of 16 channels lie together and begin at whole vectors."""
    B, T, C = x.stride()
    return C == 1 and not any(number % 16 for number in (B, T, x.shape[2], x.data_ptr()))


def _fake_forward(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


@_bi_wkv.register_fake
def _(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_forward(k, v)


@_bi_wkv_gated.register_fake
def _(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_forward(k, v)


@_bi_wkv_backward.register_fake
def _(
    gy: Tensor, centre: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv = (x.new_empty(x.shape) for x in (decay, first, k, v))
    return gw, gu, gk, gv


@_bi_wkv_gated_backward.register_fake
def _(
    gy: Tensor, centre: Tensor, decay: Tensor, first: Tensor, k: Tensor, v: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv, gr = (x.new_empty(x.shape) for x in (decay, first, k, v, r))
    return gw, gu, gk, gv, gr


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gy: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _bi_wkv_backward(gy, *ctx.saved_tensors)


def _differentiate_gated(ctx: Any, gy: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _bi_wkv_gated_backward(gy, *ctx.saved_tensors)


_bi_wkv.register_autograd(_differentiate, setup_context=_save)
_bi_wkv_gated.register_autograd(_differentiate_gated, setup_context=_save)

GATE_FLOPS = 4  # a sigmoid counting as three; its backward twice that


@register_flop_formula([torch.ops.drwkv.bi_wkv_triton, torch.ops.drwkv.bi_wkv_gated_triton])
def _forward_flops(decay: Any, first: Any, k: Any, v: Any, r: Any = None, **_: Any) -> int:
    return (FORWARD_FLOPS + (GATE_FLOPS if r else 0)) * k[0] * k[1] * k[2]


@register_flop_formula([torch.ops.drwkv.bi_wkv_triton_backward, torch.ops.drwkv.bi_wkv_gated_triton_backward])
def _backward_flops(
    gy: Any, centre: Any, decay: Any, first: Any, k: Any, v: Any, r: Any = None, **_: Any
) -> int:
    return (BACKWARD_FLOPS + (2 * GATE_FLOPS if r else 0)) * k[0] * k[1] * k[2]
