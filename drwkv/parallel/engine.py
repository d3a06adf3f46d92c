"""One interface to every way of training a model on many ranks. The ways themselves are in ddp.py and fsdp.py.

An engine owns the wrapped model and its optimizer. Gradients of a global batch are the plain sum over its samples of
what `backward` is given, whatever the number of ranks: each engine undoes the averaging of its own collectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from drwkv.parallel.activations import ActivationConfig
from drwkv.parallel.distributed import World

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by parameter


@dataclass
class ParallelConfig:
    """How one model runs on many ranks."""

    # ddp: whole model on each rank; fsdp: sharded by FSDP2; zero1 to 3: by DeepSpeed
    engine: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "fsdp"
    # bf16: autocast; bf16_params: weights that compute are bfloat16 too; optimizer and EMA are float32
    precision: Literal["fp32", "bf16", "bf16_params"] = "fp32"
    replicas: int = 1  # fsdp: copies of the sharded model (HSDP); each is sharded over size / replicas ranks
    # What waits in the CPU's memory; optimizer: zero1 to 3; all, weights too: fsdp
    offload: Literal["none", "optimizer", "all"] = "none"
    reshard_after_forward: bool = True  # fsdp: free the gathered weights between forward and backward
    # fsdp: blocks whose weights are gathered together; more for models of small blocks
    blocks_per_unit: int = 1
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    compile: bool = False  # torch.compile each block, once for all blocks of one kind
    # ddp: one bucket layout from the first step on, so that a resume is bit for bit
    fixed_buckets: bool = False
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

    def take(self, name: str, part: torch.Tensor, whole: torch.Tensor) -> None:  # noqa: B027  # most share memory
        """Put what was loaded into `whole`, a result of `whole(name, part)`, into `part`. Collective."""

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        """This rank's part of each of MOMENTS of a parameter, shaped like `parts[name]`."""
        state = self.optimizer.state[self.parts[name]]
        return {kind: state[kind] for kind in MOMENTS}

    @property
    def applied_updates(self) -> torch.Tensor:
        """Optimizer steps that were applied, 0-dim float32 where the parts are."""
        step: torch.Tensor = next(iter(self.optimizer.state.values()))["step"]
        return step

    @property
    def updates(self) -> int:
        """Optimizer steps that were applied; waits for the device."""
        return int(self.applied_updates.item())

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(float(count))

    @abstractmethod
    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Let the backward inside reduce gradients over ranks when `last`, else keep them on this rank."""

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch belong inside; gradients are reduced in the last one of a step."""
        with self._synchronised(last), self.autocast():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """A forward inside computes in the types of training; `micro_step` enters it by itself."""
        bf16 = self.config.precision != "fp32"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()

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
        return norm.to(self.world.device)

    def _with_gradients(self) -> list[nn.Parameter]:
        """The parts, each with its `.grad`."""
        return list(self.parts.values())

    def _global_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of the whole gradient, from that of this rank's part (here: the whole gradient)."""
        return norm

    def step(self, lr: float, found_inf: torch.Tensor) -> None:
        """One optimizer step at rate `lr`, left out on the device where `found_inf` (0-dim float) is 1."""
        self._prepare_step(lr, found_inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)

    def _prepare_step(self, lr: float, found_inf: torch.Tensor) -> None:
        """Hand the rate and the flag to torch's fused step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        device = next(iter(self.parts.values())).device
        self.optimizer.found_inf = found_inf.to(device)  # type: ignore[attr-defined]

    def refresh(self) -> None:  # noqa: B027  # most engines hold one copy of the weights and have nothing to do
        """Called after `parts` were written in place: drop gathered copies of the old values."""


def start_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Make the moments of AdamW at once, zero, so that a checkpoint can be loaded into them."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
        }
