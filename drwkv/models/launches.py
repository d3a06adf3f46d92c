"""What a function launches and moves, eagerly and compiled: `count_eager`, `count_compiled`.

Bytes are those of the tensors that a kernel reads and writes, each once, views none: what goes through memory when
nothing stays in a cache. Compiled bytes come from Inductor's schedule, compiled kernels are the calls in its code; one
of our operators counts as one, whatever it launches. Who prints them is `bench_block.py`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "_mkl_linear")
MOVES_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
OURS = "drwkv."  # namespace of our operators
FUSED = "fused"  # for loops that Inductor made
_GENERATED_CALL = re.compile(r"^\s+(?:\w+ = )?(?:triton|cpp|cpu)_\w+(?:\.run)?\(", re.MULTILINE)


@dataclass
class Moved:
    """Kernels and bytes by kind: "matmul", "operator" (ours), "rest"."""

    kernels: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, num_bytes: int, num_kernels: int = 1) -> None:
        """Count kernels of an operator called `name`, such as "mm" or "drwkv.bi_wkv"."""
        kind = "operator" if name.startswith(OURS) else "matmul" if name in MATMULS else "rest"
        self.kernels[kind] += num_kernels
        self.num_bytes[kind] += num_bytes


@dataclass(frozen=True)
class Counts:
    """Both directions of one function."""

    forward: Moved = field(default_factory=Moved)
    backward: Moved = field(default_factory=Moved)


def count_eager(function: Callable[..., Tensor], inputs: Sequence[Any]) -> Counts:
    """What ATen runs, forward and for the gradient of all that wants one."""
    counts = Counts()
    with _Count(counts.forward):
        y = function(*inputs)
    grad = torch.ones_like(y)
    with _Count(counts.backward):
        y.backward(grad)
    return counts


class _Count(TorchDispatchMode):
    """Counts operators that move bytes."""

    def __init__(self, moved: Moved) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = list(_tensors((args, kwargs))), list(_tensors(out))
        name, mutates = str(func.overloadpacket).removeprefix("aten."), func._schema.is_mutable
        storages = {x.untyped_storage().data_ptr() for x in read}
        is_view = not mutates and any(x.untyped_storage().data_ptr() in storages for x in written)
        if not is_view and name not in MOVES_NOTHING:
            self.moved.add(name, sum(map(_size, read)) + (0 if mutates else sum(map(_size, written))))
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _size(x: Tensor) -> int:
    """Bytes of the elements that x addresses, broadcast ones once."""
    num_elements = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        num_elements *= length if stride else 1
    return num_elements * x.element_size()


def count_compiled(function: Callable[..., Tensor], inputs: Sequence[Any]) -> Counts:
    """What torch.compile(fullgraph=True) runs: it is compiled here, past all caches, and run once.

    Raises RuntimeError if the function does not become one forward and one backward.
    """
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code
    from torch._inductor.virtualized import V

    counts, graphs = Counts(), list[Moved]()

    def look(nodes: list[Any]) -> list[Any]:
        moved = counts.backward if V.graph.is_backward else counts.forward
        graphs.append(moved)
        for node in nodes:
            if (name := _scheduled_name(node)) is not None:
                moved.add(name, node.get_read_write_buffers_sizes(), num_kernels=name != FUSED)
        return nodes

    def run() -> None:
        y = torch.compile(function, fullgraph=True)(*inputs)
        y.backward(torch.ones_like(y))

    torch._dynamo.reset()
    options = {
        "force_disable_caches": True,
        "compile_threads": 1,
        "_post_fusion_custom_pass": look,
    }
    with config.patch(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        _, codes = run_and_get_code(run)
    if len(graphs) != 2 or len(codes) != 2 or graphs[0] is graphs[1]:
        raise RuntimeError(
            f"expected one forward and one backward graph, not {len(graphs)} in {len(codes)} files"
        )
    for moved, code in zip(graphs, codes, strict=True):
        moved.add(FUSED, 0, num_kernels=len(_GENERATED_CALL.findall(code.partition("def call(")[2])))
    return counts


def _scheduled_name(node: Any) -> str | None:
    """An operator's name for a node that calls one, FUSED for loops of Inductor's own, None for what does nothing."""
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    if node.is_template():
        return "mm"
    if not node.is_extern():
        return FUSED
    if (overload := getattr(node.node, "op_overload", None)) is not None:
        return str(overload.overloadpacket).removeprefix("aten.")
    return str(node.node.get_kernel_name()).rpartition(".")[2]
