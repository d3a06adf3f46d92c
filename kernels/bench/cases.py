"""What is timed: an operator's backend at one shape (`Case`), its tensors (`Call`), and the lists of cases.

A further operator is a further line in `_FUNCTIONS` and `_inputs`. How cases are timed is in `measure.py`.
Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drwkv.kernels.bench.loop import bi_wkv_loop, bi_wkv_loop_unbind
from drwkv.kernels.shift_mix import shift_mix
from drwkv.kernels.wkv import bi_wkv, bi_wkv_gated

OPERATORS = ("bi_wkv", "bi_wkv_gated", "shift_mix_3", "shift_mix_2")  # shift_mix with 3 mixes and with 2
ATTENTION = "attention"  # torch's, for comparison
HEAD_SIZE = 64


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    operator: str  # one of OPERATORS, or ATTENTION
    backend: str  # of the operator; "loop" and "loop-unbind" for bi_wkv; "sdpa" for attention
    shape: tuple[int, int, int]  # (B, T, C)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Call:
    """A case with its tensors on a device."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]  # all of them want a gradient
    grads: tuple[Tensor, ...]  # one an output, of its shape and dtype

    @property
    def forward_bytes(self) -> int:
        """The least that a forward can move: each input read once, each output written once."""
        return sum(x.nbytes for x in (*self.inputs, *self.grads))

    @property
    def backward_bytes(self) -> int:
        """The same for a backward: each input and each output's gradient read, each input's gradient written."""
        return sum(x.nbytes for x in (*self.inputs, *self.inputs, *self.grads))


def build(case: Case, device: torch.device) -> Call:
    """Tensors for a case on a device. Raises ValueError for an operator that is not known."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    B, T, C = case.shape
    sequences = [normal(B, T, C, dtype=case.dtype) for _ in range(6)]
    vectors = [normal(C) / T, normal(C) / T]
    inputs: Sequence[Tensor]
    function: Callable[..., Any]
    num_outputs = 1
    match case.operator:
        case "bi_wkv":
            loops = {"loop": bi_wkv_loop, "loop-unbind": bi_wkv_loop_unbind}
            function = loops.get(case.backend) or functools.partial(bi_wkv, backend=case.backend)
            inputs = [*vectors, *sequences[:2]]
        case "bi_wkv_gated":
            function = functools.partial(bi_wkv_gated, backend=case.backend)
            inputs = [*vectors, *sequences[:3]]
        case "shift_mix_2" | "shift_mix_3":
            num_outputs = int(case.operator[-1])
            function = functools.partial(shift_mix, grid=grid(T), backend=case.backend)
            inputs = [sequences[0], normal(num_outputs, C)]
        case "attention":
            function, heads = F.scaled_dot_product_attention, (B, T, max(1, C // HEAD_SIZE), -1)
            sequences = [x.view(heads).transpose(1, 2).contiguous() for x in sequences]
            inputs = sequences[:3]
        case _:
            raise ValueError(f"no operator is called {case.operator!r}")
    return Call(function, tuple(x.requires_grad_() for x in inputs), tuple(sequences[3 : 3 + num_outputs]))


def grid(num_tokens: int) -> tuple[int, int]:
    """(h, w) of an image of that many tokens, as near to a square as divides."""
    h = next(h for h in range(math.isqrt(num_tokens), 0, -1) if num_tokens % h == 0)
    return h, num_tokens // h


@dataclass(frozen=True)
class Plan:
    """Which sizes are timed."""

    named: tuple[Case, ...]  # at sizes of the model, in any order
    tokens: int  # B T of the series over T
    channels: int
    lengths: tuple[int, ...]  # T of the series, rising
    longest_attention: int  # the last T for which attention, whose time grows with T, is timed
    rounds: int = 2  # through all cases, on a CPU
    budget_sec: float = 0.6  # for one time, on a CPU

    def series(self, device: torch.device) -> list[Case]:
        """Every operator and backend, and attention, at each length with B T fixed."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cases = []
        for T in self.lengths:
            shape = (self.tokens // T, T, self.channels)
            for operator in OPERATORS[:3]:
                cases += [Case(operator, backend, shape, dtype) for backend in backends(device)]
            if self.longest_attention >= T:
                cases.append(Case(ATTENTION, "sdpa", shape, dtype))
        return cases

    def cases(self, device: torch.device) -> list[Case]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.named, *self.series(device)]))


def backends(device: torch.device) -> tuple[str, ...]:
    """Those worth timing on a device."""
    return ("triton", "torch") if device.type == "cuda" else ("torch",)


LOOP = Case("bi_wkv", "loop", (8, 256, 384))
LOOPS_MATCH = Case("bi_wkv", "torch", (8, 256, 384))
SHORT, LONG = Case("bi_wkv", "torch", (8, 1024, 128)), Case("bi_wkv", "torch", (8, 4096, 128))
LARGE = Case("bi_wkv", "triton", (32, 1024, 1024), torch.bfloat16)

CPU = Plan(
    named=(
        LOOP,
        Case("bi_wkv", "loop-unbind", (8, 256, 384)),
        LOOPS_MATCH,
        Case("bi_wkv", "torch", (8, 256, 384), torch.bfloat16),
        Case("bi_wkv", "torch", (64, 16, 128)),
        Case("bi_wkv", "torch", (64, 64, 192)),
        SHORT,
        LONG,
        Case("bi_wkv", "torch", (8, 1024, 384)),
        Case("bi_wkv", "torch", (8, 4096, 384)),
        *(Case(operator, "torch", (8, 256, 384)) for operator in OPERATORS[1:]),
        *(Case(operator, "torch", (8, 1024, 384)) for operator in OPERATORS[1:]),
    ),
    tokens=65536,
    channels=128,
    lengths=(256, 1024, 4096, 8192, 16384, 65536),
    longest_attention=8192,
)
GPU = Plan(
    named=tuple(
        Case(operator, backend, LARGE.shape, LARGE.dtype)
        for operator in OPERATORS
        for backend in ("triton", "torch")
    ),
    tokens=65536,
    channels=1024,
    lengths=(256, 1024, 4096, 8192, 16384, 65536),
    longest_attention=65536,
)
TINY = Plan(
    named=(Case("bi_wkv", "loop", (2, 16, 64)), Case("shift_mix_2", "torch", (2, 16, 64))),
    tokens=256,
    channels=64,
    lengths=(16, 64, 256),
    longest_attention=64,
    rounds=1,
    budget_sec=0,
)
