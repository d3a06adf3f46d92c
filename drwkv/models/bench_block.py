"""What one block costs beside its matmuls: `python -m drwkv.models.bench_block [--device cuda] [--markdown FILE]`.

Counts what a block launches and moves, eagerly and under torch.compile(fullgraph=True), and times both; on a GPU also
a table of where the microseconds go. The block is a deep one, which takes a skip: it does all that any block does but
LN_0. How launches are counted is in `launches.py`; the operators alone are measured by `drwkv.kernels.bench`.
Shapes: B batch, T tokens, D channels.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drwkv.kernels.bench.measure import time_ms
from drwkv.kernels.bench.report import machine, markdown_table, versions, write_section
from drwkv.models import create, options
from drwkv.models.launches import Moved, count_compiled, count_eager

BLOCKS = ("DRWKV-S/2", "DRWKV-H/2")
BUDGET_SEC = 2.0  # for one time, on a CPU
HEAD = ("block", "", "matmuls", "our operators", "rest, eager", "rest, compiled", "ms, eager", "ms, compiled")
# Of a kernel's name; the first that fits counts. Our own kernels are known by the operator that launched them.
GROUPS = (
    ("matmul", r"gemm|gemv|cutlass|xmma|nvjet|splitk|cublas"),
    ("norms and pointwise", r"layer_norm|LayerNorm|elementwise|reduce|^triton_|CatArray|softmax|fill"),
)


@dataclass(frozen=True)
class Size:
    """One block and what goes through it."""

    name: str  # of a model
    batch: int
    grid: tuple[int, int]  # T = h w
    dtype: torch.dtype

    def __str__(self) -> str:
        told = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, B={self.batch} T={self.grid[0] * self.grid[1]} {told}"


def make(size: Size, device: torch.device) -> tuple[nn.Module, tuple[Any, ...]]:
    """(block, its inputs): a deep block with gates open, so that every gradient counts."""
    width = options(size.name)["hidden_size"]
    h, w = size.grid
    with device:
        model: Any = create(
            "DRWKV", input_size=(2 * h, 2 * w), in_channels=4, patch_size=2, hidden_size=width, depth=3
        )
        block: nn.Module = model.blocks_in_order()[-1].to(size.dtype)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.05)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=size.dtype).requires_grad_()

        x, skip, c = leaf(size.batch, h * w, width), leaf(size.batch, h * w, width), leaf(size.batch, width)
    return block, (x, c, size.grid, skip)


def training_step(function: Callable[..., Tensor], block: nn.Module, inputs: Sequence[Any]) -> None:
    """Forward and backward, the gradients dropped."""
    wanted = [x for x in (*inputs, *block.parameters()) if isinstance(x, Tensor)]
    y = function(*inputs)
    torch.autograd.grad(y, wanted, y)


def compiled_block(block: nn.Module) -> Callable[..., Tensor]:
    """The block under torch.compile, one graph, with what was compiled before forgotten."""
    torch._dynamo.reset()
    function: Callable[..., Tensor] = torch.compile(block, fullgraph=True)
    return function


def rows(size: Size, device: torch.device) -> list[list[str]]:
    """The table's two rows of one block."""
    block, inputs = make(size, device)
    eager, compiled = count_eager(block, inputs), count_compiled(block, inputs)

    ms = []
    for run in (block, compiled_block(block)):
        training_step(run, block, inputs)  # compiles
        ms.append(time_ms(functools.partial(training_step, run, block, inputs), device, BUDGET_SEC))
    return [
        [str(size), "forward", *_cells(eager.forward, compiled.forward), "", ""],
        ["", "backward", *_cells(eager.backward, compiled.backward), *(f"{x:.1f}" for x in ms)],
    ]


def _cells(eager: Moved, compiled: Moved) -> list[str]:
    """Kernels and megabytes: of the matmuls and of our operators, which compiling leaves alone, and of the rest."""

    def cell(moved: Moved, kind: str) -> str:
        return f"{moved.kernels[kind]}: {moved.num_bytes[kind] / 1e6:.1f} MB"

    return [cell(compiled, "matmul"), cell(compiled, "operator"), cell(eager, "rest"), cell(compiled, "rest")]


def profile(size: Size, device: torch.device) -> str:
    """A table of where the microseconds of a compiled forward and backward go. CUDA devices alone."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    block, inputs = make(size, device)
    function = compiled_block(block)
    num_steps = 10
    for _ in range(3):
        training_step(function, block, inputs)
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(num_steps):
            training_step(function, block, inputs)
        torch.cuda.synchronize(device)
    microseconds, launches = group_times(recorded.events() or [])
    total = sum(microseconds.values())
    cells = [
        [group, f"{launches[group] / num_steps:.0f}", f"{us / num_steps:.0f}", f"{us / total:.0%}"]
        for group, us in microseconds.most_common()
    ]
    return markdown_table((str(size), "launches", "us", "share"), cells)


def group_times(events: Iterable[Any]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and launches by group, of the profiler's events.

    A kernel that one of our operators launched belongs to that operator, any other to the group of its name.
    """
    microseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()

    def add(group: str, us: float, count: int = 1) -> None:
        microseconds[group] += us  # type: ignore[assignment]
        launches[group] += count

    for event in events:
        if event.is_user_annotation:
            continue  # a span of others
        if event.device_type == torch.autograd.DeviceType.CUDA:
            add(group_of(event.name), event.time_range.elapsed_us())
        elif (operator := _our_operator(event)) is not None:
            for kernel in event.kernels:  # is also an event of the device by itself
                add(group_of(kernel.name), -kernel.duration, -1)
                add(operator, kernel.duration)
    groups = {group: us for group, us in microseconds.items() if launches[group]}
    return Counter(groups), +launches


def _our_operator(event: Any) -> str | None:
    """The operator of ours that an event of the CPU runs under, forward or backward."""
    while event is not None:
        if found := re.match(r"drwkv::(bi_wkv|shift_mix)", event.name):
            return found[1]
        event = event.cpu_parent
    return None


def group_of(kernel: str) -> str:
    """The group that a kernel's name tells of."""
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel)), "other")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write them into a page if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m drwkv.models.bench_block", description="Measure one block."
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument(
        "--model", nargs="+", default=BLOCKS, help=f"models by name (default: {' '.join(BLOCKS)})"
    )
    parser.add_argument("--batch", type=int, default=None, help="samples (default: 2, on a GPU 32)")
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="tokens, rows and columns")
    parser.add_argument(
        "--markdown", type=Path, help="put the tables into this page, in place of this machine's"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    sizes = [
        Size(
            name,
            given.batch or (32 if on_gpu else 2),
            tuple(given.grid),
            torch.bfloat16 if on_gpu else torch.float32,
        )
        for name in given.model
    ]
    name = machine(device)
    print(f"{name}; {versions()}\n")
    tables = [markdown_table(HEAD, [row for size in sizes for row in rows(size, device)], num_words=2)]
    print(tables[0])
    if on_gpu:
        tables.append(profile(sizes[-1], device))
        print(f"\n{tables[1]}")
    if given.markdown is not None:
        write_section(given.markdown, f"One block: {name}", "\n\n".join([f"{versions()}.", *tables]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
