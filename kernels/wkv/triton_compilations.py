"""What `drwkv.kernels.resources` compiles of Bi-WKV: every kernel in every configuration that a launch may have.

Gated, the heavier form; launches and configurations are those of `triton.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drwkv.kernels.resources import Compilation
from drwkv.kernels.wkv import triton_backward, triton_forward
from drwkv.kernels.wkv.triton import (
    BACKWARD,
    CARRIED_TILE,
    CARRIED_WARPS,
    EXCHANGE,
    EXCHANGE_WARPS,
    FORWARD,
    ODD,
    SMALL,
    WHOLE_ROWS,
    Config,
)

FLAGS = ("GATED", "WHOLE", "READERS", "GRADIENTS", "EVEN", "CENTRED", "HAS_MAXIMUM")
_FLOAT32 = ("p_w", "p_u", "p_centre", "p_sums", "p_grad_sums", "p_gw", "p_gu", "p_states")


def compilations() -> Iterator[Compilation]:
    """Every kernel in every configuration.

    In bfloat16 with tiles that divide the sequence, in float32 with tiles that do not, and cut along the sequence; and
    with odd strides, of which nothing is known.
    """
    forwards = [
        (config, case) for config in FORWARD for case in ("bf16 whole even", "fp32 whole", "bf16 even")
    ]
    forwards += [(config, case) for config in SMALL for case in ("bf16 whole even", "fp32 whole odd")]
    forwards += [
        (config, case) for config in ODD for case in ("bf16 whole odd", "fp32 whole odd", "fp32 odd")
    ]
    for config, case in forwards:
        yield _compilation(triton_forward.forward_kernel, config, f"{case} gated", {"ROWS": WHOLE_ROWS})

    every = "readers gradients"
    cut = ("bf16 readers even", "bf16 gradients even")
    backwards = [
        (config, case)
        for config in BACKWARD
        for case in (f"bf16 whole {every} even", f"fp32 whole {every}", *cut)
    ]
    odd = (f"bf16 whole {every} odd", f"fp32 whole {every} odd")
    backwards += [(config, case) for config in SMALL for case in (f"bf16 whole {every} even", odd[1])]
    backwards += [
        (config, case) for config in ODD for case in (*odd, "fp32 readers odd", "fp32 gradients odd")
    ]
    for config, case in backwards:
        yield _compilation(triton_backward.backward_kernel, config, f"{case} gated", {"ROWS": WHOLE_ROWS})

    for config in dict.fromkeys((*FORWARD, *BACKWARD, *ODD)):
        case = "fp32 centred odd" if config in ODD else "fp32 centred"
        yield _compilation(triton_forward.sums_kernel, config, case, {})
    for case in ("fp32 has_maximum", "fp32"):
        sizes = {"LENGTH": FORWARD[0].tile, **EXCHANGE}
        yield _compilation(triton_forward.exchange_kernel, EXCHANGE_WARPS, case, sizes)
    for kernel in (triton_forward.forward_carried_kernel, triton_backward.backward_carried_kernel):
        for case in ("bf16", "fp32", "fp32 odd"):
            yield _compilation(kernel, CARRIED_WARPS, f"{case} gated", CARRIED_TILE)


def _compilation(kernel: Any, config: Config | int, case: str, sizes: dict[str, int]) -> Compilation:
    """`case` is a dtype, "odd" or not, and the flags that are set; the kernel's other flags are not."""
    names = list(kernel.arg_names)
    dtype, *told = case.split()
    is_odd = "odd" in told
    constants: dict[str, object] = {
        **{name: name.lower() in told for name in names if name in FLAGS},
        **sizes,
    }
    name = ""
    if isinstance(config, Config):
        constants |= config.constants
        name = f" {config.N}x{config.R}x{config.BC}"
    if not is_odd:
        constants |= {n: 1 for n in names if n.startswith("stride_") and n.endswith("c")}
    signature = {}
    for n in names:
        if n not in constants and n.startswith("p_"):
            signature[n] = "*fp64" if n == "p_scale" else "*fp32" if n in _FLOAT32 else f"*{dtype}"
        elif n not in constants:
            signature[n] = "i32"
    wide = [n for n in signature if n.startswith(("p_", "stride_")) or n in ("C", "plane")]
    return Compilation(
        operator="bi_wkv",
        name=f"{kernel.__name__.removesuffix('_kernel')}{name} {case}",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        num_warps=config.num_warps if isinstance(config, Config) else config,
        divisible_by_16=[] if is_odd else wide,
        is_lighter=not _is_heaviest(kernel, config, case),
    )


def _is_heaviest(kernel: Any, config: Config | int, case: str) -> bool:
    """Whether a configuration takes most in this case, as the whole list showed when it was measured."""
    if kernel is triton_forward.sums_kernel or kernel is triton_forward.exchange_kernel:
        return "odd" in case or "has_maximum" in case
    if isinstance(config, int):
        return "odd" in case
    return "whole" in case and ("fp32" in case if config in (*SMALL, *ODD) else "even" in case)
