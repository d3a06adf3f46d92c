"""One interface to every way of training a model on many ranks. The ways themselves are in ddp.py and fsdp.py.

An engine owns the wrapped model and its optimizer. Gradients of a global batch are the plain sum over its samples of
what `backward` is given, whatever the number of ranks: each engine undoes the averaging of its own collectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from drwkv.parallel.distributed import World

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class ParallelConfig:
    """How one model runs on many ranks."""

    engine: Literal["ddp", "fsdp"] = "fsdp"  # ddp: whole model on each rank; fsdp: sharded by FSDP2
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; parameters, optimizer and EMA stay float32
    reshard_after_forward: bool = True  # fsdp: free the gathered weights between forward and backward
    blocks_per_unit: int = (
        1  # fsdp: blocks whose weights are gathered together; more for models of small blocks
    )
    fixed_buckets: bool = (
        False  # ddp: one bucket layout from the first step on, so that a resume is bit for bit
    )
    tf32: bool = True  # GPU: float32 matmuls may use TF32
    cpu_threads: int | None = None  # threads of each process on a CPU; None: torch's own choice
    timeout_sec: float = 600.0  # longest that a collective may take before the run stops


class Engine(ABC):
    """A wrapped model with its optimizer.

    Optimizer and averages work on plain tensors, the parts that this rank holds: arithmetic on DTensors costs more in
    their dispatch than in itself. `whole` turns a part back into what a checkpoint stores.

    Attributes:
        module: what the loop calls; same arguments and results as the model.
        parts: name in the plain model -> this rank's part of the parameter (all of it where nothing is sharded).
        optimizer: of `parts`.
    """

    module: nn.Module
    parts: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(self, config: ParallelConfig, world: World) -> None:
        self.config, self.world = config, world

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """`part`, shaped and placed like `parts[name]`, as the tensor of which it is a part (a DTensor if sharded)."""
        return part

    @abstractmethod
    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Let the backward inside reduce gradients over ranks when `last`, else keep them on this rank."""

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch belong inside; gradients are reduced in the last one of a step."""
        bf16 = self.config.precision == "bf16"
        autocast = torch.autocast(self.world.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
        with self._synchronised(last), autocast:
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this rank's share of the global loss. Collectives average: undo that."""
        (loss * self.world.size).backward()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        """L2 norm of the global gradient before clipping, 0-dim on the device, the same on each rank. Collective."""
        grads = [grad for part in self._with_gradients() if (grad := part.grad) is not None]
        norm = self._global_norm(torch.nn.utils.get_total_norm(grads, foreach=True))
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _with_gradients(self) -> list[nn.Parameter]:
        """The parts, each with its `.grad`."""
        return list(self.parts.values())

    def _global_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of the whole gradient, from that of this rank's part (here: the whole gradient)."""
        return norm

    def step(self, lr: float, found_inf: torch.Tensor) -> None:
        """One optimizer step at rate `lr`, left out on the device where `found_inf` (0-dim float) is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by torch's fused step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)

    def refresh(self) -> None:  # noqa: B027  # most engines hold one copy of the weights and have nothing to do
        """Called after `parts` were written in place: drop gathered copies of the old values."""
