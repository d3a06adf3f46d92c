"""FSDP2 behind the engine interface: parameters, gradients, moments and EMA sharded over ranks. DDP is in ddp.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from drwkv.parallel.distributed import World
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig


class FsdpEngine(Engine):
    """A unit of `blocks_per_unit` blocks after another, in the model's order, and one for what is left."""

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World
    ) -> None:
        super().__init__(config, world)
        options: dict[str, Any] = {"mesh": self._mesh()}
        if config.precision == "bf16_params":
            # Inputs stay as they are: timesteps would be rounded, and autocast sees to the rest.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if config.offload == "all":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        else:
            model.to(world.device)
        blocks: list[nn.Module] = model.blocks_in_order()  # type: ignore[operator]
        for i in range(0, len(blocks), config.blocks_per_unit):
            unit = blocks[i : i + config.blocks_per_unit]
            fully_shard(unit, reshard_after_forward=config.reshard_after_forward, **options)
        fully_shard(model, reshard_after_forward=False, **options)
        self.module = model
        self._sharded = {name: cast(DTensor, parameter) for name, parameter in model.named_parameters()}
        self.parts = {name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()}
        self.optimizer = make_optimizer(self.parts.values())

    def _mesh(self) -> DeviceMesh:
        """One dimension of ranks to shard over, or replicas and the ranks of each."""
        device, replicas, size = self.world.device.type, self.config.replicas, self.world.size
        if replicas == 1:
            return init_device_mesh(device, (size,))
        return init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))

    def whole(self, name: str, part: torch.Tensor) -> DTensor:
        like = self._sharded[name]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _with_gradients(self) -> list[nn.Parameter]:
        for name, sharded in self._sharded.items():
            assert isinstance(sharded.grad, DTensor)
            self.parts[name].grad = sharded.grad.to_local()
        return super()._with_gradients()

    def _units(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        @contextmanager
        def scope() -> Iterator[None]:
            assert isinstance(self.module, FSDPModule)
            self.module.set_requires_gradient_sync(last)
            yield

        return scope()

    def _global_norm(self, norm: torch.Tensor) -> torch.Tensor:
        return (self.world.sum_(norm.square()) / self.config.replicas).sqrt()

    def refresh(self) -> None:
        for unit in self._units():
            unit.reshard()
