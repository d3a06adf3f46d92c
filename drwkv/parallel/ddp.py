"""DistributedDataParallel behind the engine interface: the whole model on each rank. Sharding is in fsdp.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from drwkv.parallel.distributed import World
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig


class DdpEngine(Engine):
    """Gradients are averaged by DDP in buckets while the backward runs."""

    module: DistributedDataParallel

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World
    ) -> None:
        super().__init__(config, world)
        model.to(world.device)
        # DDP re-cuts its buckets after the first step, in the order in which gradients came: a resumed run then adds
        # in another order than the unbroken one. It keeps the first layout when it looks for unused parameters.
        self.module = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.fixed_buckets,
        )
        self.parts = dict(model.named_parameters())
        self.optimizer = make_optimizer(self.parts.values())

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()
