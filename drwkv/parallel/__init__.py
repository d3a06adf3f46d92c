"""Ways to run one model on many ranks, behind one interface (engine.py). What is trained is in drwkv.training."""

from torch import nn

from drwkv.parallel.ddp import DdpEngine
from drwkv.parallel.distributed import World, session
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig
from drwkv.parallel.fsdp import FsdpEngine

__all__ = ["Engine", "ParallelConfig", "World", "session", "wrap"]


def wrap(model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World) -> Engine:
    """The engine that `config.engine` names, around `model`, which is moved and wrapped in place."""
    engines: dict[str, type[DdpEngine] | type[FsdpEngine]] = {"ddp": DdpEngine, "fsdp": FsdpEngine}
    return engines[config.engine](model, make_optimizer, config, world)
