"""FSDP2 behind the engine interface: parameters, gradients, moments and EMA sharded over ranks. DDP is in ddp.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from drwkv.parallel.distributed import World
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig


class FsdpEngine(Engine):
    """One FSDP unit a block, in the order that the model names them, and one for what is left."""

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World
    ) -> None:
        super().__init__(config, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        model.to(world.device)
        for block in model.blocks_in_order():  # type: ignore[operator]
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        self.module = model
        self.parameters = dict(model.named_parameters())
        self.optimizer = make_optimizer(self.parameters.values())

    def _units(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        @contextmanager
        def scope() -> Iterator[None]:
            assert isinstance(self.module, FSDPModule)
            self.module.set_requires_gradient_sync(last)
            yield

        return scope()

    def refresh(self) -> None:
        for unit in self._units():
            unit.reshard()
