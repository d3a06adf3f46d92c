"""The `triton` backend of shift_mix: launches of the two kernels in `triton_kernels.py`, and what they may be.

Here: outputs, strides, grids, the choice of the launch configuration, and the list of all compilations for
`drwkv.kernels.resources`. Registration is in `registration.py`, the derivation in `README.md`.
Shapes: B batch, N = K + h w tokens, D channels, M mixes, P programs that share a channel block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from drwkv.kernels import autotune, backends
from drwkv.kernels.resources import Compilation
from drwkv.kernels.shift_mix import triton_kernels
from drwkv.kernels.shift_mix.registration import register

LOOP = 8  # token blocks that one program of the backward adds up, so that the partial sums are few bytes
ENOUGH_PROGRAMS = 2048  # shorter loops rather than fewer programs: some 15 for each multiprocessor


@dataclass(frozen=True)
class Config:
    """One launch configuration: a tile of BT tokens and BC channels."""

    BT: int
    BC: int
    num_warps: int


# 16 elements a thread forward; 8 backward, where each brings 2 + 2 M loads and M sums. The first is the default.
FORWARD = (Config(32, 64, 4), Config(16, 128, 4), Config(64, 64, 8))
BACKWARD = (Config(16, 64, 4), Config(32, 32, 4), Config(16, 128, 8))


def shift_mix_triton(
    x: Tensor, mixes: Tensor, grid: tuple[int, int], out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """shift_mix in one kernel, forward and backward; arguments as in `op.shift_mix`, unchecked but for their size.

    Raises ValueError for more than 2^30 tokens a sample, or channels.
    """
    backends.check_size("shift_mix", "x", x)
    return tuple(_shift_mix(x, mixes, *grid, out_dtype))


def _forward(x_BND: Tensor, mixes_MD: Tensor, h: int, w: int, out_dtype: torch.dtype) -> list[Tensor]:
    B, N, D = x_BND.shape
    M = mixes_MD.shape[0]
    outs = [torch.empty((B, N, D), dtype=out_dtype, device=x_BND.device) for _ in range(M)]
    if not x_BND.numel():
        return outs

    def launch(config: Config) -> None:
        """Fill `outs`."""
        programs = B * triton.cdiv(N, config.BT) * triton.cdiv(D, config.BC)
        triton_kernels.forward_kernel[(programs,)](
            x_BND,
            mixes_MD,
            *_four(outs),
            *_sizes(x_BND, h, w),
            *x_BND.stride(),
            *mixes_MD.stride(),
            M=M,
            BT=config.BT,
            BC=config.BC,
            num_warps=config.num_warps,
        )

    with backends.on_device_of(x_BND):
        launch(_choose("shift_mix_forward", FORWARD, launch, x_BND, mixes_MD, out_dtype))
    return outs


def _backward(
    grads: Sequence[Tensor], x_BND: Tensor, mixes_MD: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor]:
    B, N, D = x_BND.shape
    M = mixes_MD.shape[0]
    gx_BND = torch.empty((B, N, D), dtype=x_BND.dtype, device=x_BND.device)
    if not x_BND.numel():
        return gx_BND, torch.zeros((M, D), dtype=mixes_MD.dtype, device=x_BND.device)
    if len({grad_BND.stride() for grad_BND in grads}) > 1:
        grads = [grad_BND.contiguous() for grad_BND in grads]  # one set of strides serves all

    def launch(config: Config) -> Tensor:
        """Fill `gx_BND`; the mixes' gradients in parts (P, M, D)."""
        token_blocks, channel_blocks = B * triton.cdiv(N, config.BT), triton.cdiv(D, config.BC)
        loop = min(LOOP, max(1, token_blocks * channel_blocks // ENOUGH_PROGRAMS))
        P = triton.cdiv(token_blocks, loop)
        partial_PMD = torch.empty((P, M, D), dtype=torch.float32, device=x_BND.device)
        triton_kernels.backward_kernel[(P * channel_blocks,)](
            x_BND,
            mixes_MD,
            *_four(grads),
            gx_BND,
            partial_PMD,
            B,
            *_sizes(x_BND, h, w),
            loop,
            *x_BND.stride(),
            *mixes_MD.stride(),
            *grads[0].stride(),
            M=M,
            BT=config.BT,
            BC=config.BC,
            num_warps=config.num_warps,
        )
        return partial_PMD

    with backends.on_device_of(x_BND):
        config = _choose("shift_mix_backward", BACKWARD, launch, x_BND, mixes_MD, grads[0].dtype)
        return gx_BND, launch(config).sum(0).to(mixes_MD.dtype)


def _four(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The kernels have four places for up to four tensors; those beyond the last are not touched."""
    return [*tensors, *[tensors[0]] * (4 - len(tensors))]


def _sizes(x_BND: Tensor, h: int, w: int) -> tuple[int, int, int, int, int]:
    """N, D, K, w and the channels in a quarter."""
    _, N, D = x_BND.shape
    return N, D, N - h * w, w, D // 4


def _choose(
    kernel: str,
    candidates: Sequence[Config],
    launch: Callable[[Config], object],
    x_BND: Tensor,
    mixes_MD: Tensor,
    dtype: torch.dtype,
) -> Config:
    """The configuration for these sizes; tensors of up to twice the tokens share one."""
    B, N, D = x_BND.shape
    key = (D, (B * N).bit_length(), mixes_MD.shape[0], str(x_BND.dtype), str(mixes_MD.dtype), str(dtype))

    def time_ms(config: Config) -> float:
        return autotune.launch_ms(lambda: launch(config))

    return autotune.choose(kernel, key, candidates, x_BND.device, time_ms)


_shift_mix, _shift_mix_backward = register("shift_mix_triton", _forward, _backward)


def compilations() -> Iterator[Compilation]:
    """Both kernels in every configuration: float32 mixes, contiguous x, D a multiple of 64 as in the models, and not.

    float32 and bfloat16 with outputs in their own, and float32 x with bfloat16 outputs; float16 is as bfloat16.
    """
    types = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16")}
    types["fp32 to bf16"] = ("fp32", "bf16")
    kernels = [(triton_kernels.forward_kernel, FORWARD), (triton_kernels.backward_kernel, BACKWARD)]
    for (kernel, configs), M, (dtypes, (x, out)) in itertools.product(kernels, (2, 3), types.items()):
        for config in configs:
            yield _compilation(kernel, dtypes, x, out, M, config, is_aligned=True)
            # Widths that are no multiple of 16 cannot load vectors; one dtype shows what that takes.
            if dtypes == "bf16":
                yield _compilation(kernel, dtypes, x, out, M, config, is_aligned=False)


def _compilation(
    kernel: Any, dtypes: str, x: str, out: str, M: int, config: Config, *, is_aligned: bool
) -> Compilation:
    names = list(kernel.arg_names)
    pointers = {"p_x": f"*{x}", "p_mixes": "*fp32", "p_gx": f"*{x}", "p_partial": "*fp32"}
    pointers |= {f"p_{kind}{i}": f"*{out}" for kind in ("out", "g") for i in range(4)}
    ones = {"stride_xd": 1, "stride_md": 1, "stride_gd": 1}
    tile = {"M": M, "BT": config.BT, "BC": config.BC}
    constexprs = {name: value for name, value in {**ones, **tile}.items() if name in names}
    signature = {name: pointers.get(name, "i32") for name in names if name not in constexprs}
    wide = ("D", "quarter", "stride_xb", "stride_xn", "stride_mm", "stride_gb", "stride_gn")
    divisible = [name for name in signature if name in pointers or (is_aligned and name in wide)]
    which = kernel.__name__.removesuffix("_kernel")
    return Compilation(
        operator="shift_mix",
        name=f"{which} {dtypes} M{M} {config.BT}x{config.BC}" + ("" if is_aligned else " unaligned"),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        divisible_by_16=divisible,
        is_lighter=M < 3 or dtypes == "fp32",
    )
