"""Which backend an operator runs on: `choose`, what this machine offers to it, and what all Triton launches need.

The choice is a pure function of the name asked for, the tensor's device and dtype, and the machine. It is
logged once for each (operator, backend, device type) on the logger `drwkv.kernels`. The launch configuration
of a Triton kernel is chosen in `autotune.py`; the backends themselves are in the operators' folders.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
MIN_CAPABILITY = (8, 0)  # the kernels are compiled and checked for sm_80 and sm_90
MAX_TOKENS = 1 << 30  # tokens of a sample, and channels, are counted in int32 (addresses are int64)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the state is float32, too little for float64

_log = logging.getLogger("drwkv.kernels")
_logged: set[tuple[str, str, str, bool]] = set()

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def _constant_to_compile(function: FunctionT) -> FunctionT:
    """torch.compiler.assume_constant_result, without the second that importing the compiler takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choose(operator: str, asked: str | None, x: Tensor, known: Collection[str]) -> str:
    """The name in `known` of the backend on which `operator` runs x.

    asked: the caller's wish; None means "triton" for a CUDA tensor of float16, bfloat16 or float32 where
    triton is installed and the GPU has compute capability 8.0 or more, and "torch" everywhere else.
    x: the operator's leading tensor, any shape. Safe under torch.compile(fullgraph=True).
    Raises ValueError for a name that is not in `known`, and for "triton" where it cannot run, with the reason.
    """
    if asked is not None and asked not in known:
        raise ValueError(f"{operator}: unknown backend {asked!r}; known are {', '.join(map(repr, known))}")
    backend, fault = asked or "torch", ""
    if asked == "triton" or (asked is None and "triton" in known and x.device.type == "cuda"):
        fault = _triton_fault(x.device.type, x.device.index, x.dtype)
        backend = "torch" if fault else "triton"
    if fault and asked == "triton":
        raise ValueError(f"{operator}: backend 'triton' cannot run here: {fault}")
    _log_once(operator, backend, x.device.type, fault if x.dtype in TRITON_DTYPES else "")
    return backend


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 before they are imported), on any device."""
    if not HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check_size(operator: str, name: str, x: Tensor) -> None:
    """Raise ValueError for more tokens or channels, (B, T, C), than the Triton kernels count."""
    if max(x.shape[1:]) > MAX_TOKENS:
        raise ValueError(
            f"{operator}: backend 'triton' takes up to {MAX_TOKENS} tokens and channels; "
            f"got {name} {tuple(x.shape)}"
        )


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which Triton launches on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@_constant_to_compile
def _triton_fault(device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    """Why Triton cannot run a tensor of this device and dtype; empty if it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if interpreting():
        return "" if device_type in ("cpu", "cuda") else f"its interpreter takes no {device_type} tensors"
    if device_type != "cuda":
        return f"it takes CUDA tensors, not {device_type} ones, unless TRITON_INTERPRET=1 is set at import"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < MIN_CAPABILITY:
        return "the GPU has compute capability {}.{}, it needs {}.{}".format(*capability, *MIN_CAPABILITY)
    return ""


@_constant_to_compile
def _log_once(operator: str, backend: str, device_type: str, lost: str) -> bool:
    """Say which backend was chosen, once a process; `lost`, why Triton could not be it, makes that a warning.

    Under torch.compile it speaks while the graph is traced. Returns whether it spoke (a constant is needed).
    """
    key = (operator, backend, device_type, bool(lost))
    if key in _logged:
        return False
    _logged.add(key)
    if lost:
        _log.warning("%s: backend %s for %s tensors, for triton cannot run: %s", *key[:3], lost)
    else:
        _log.info("%s: backend %s for %s tensors", *key[:3])
    return True
