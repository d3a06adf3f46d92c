"""Ways to run one model on many ranks, behind one interface (engine.py). What is trained is in drwkv.training."""

from torch import nn

from drwkv.parallel.distributed import World, session
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig

__all__ = ["Engine", "ParallelConfig", "World", "session", "wrap"]


def wrap(model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World) -> Engine:
    """The engine that `config.engine` names, around `model`, which is moved and wrapped in place."""
    # Imported when one is chosen: FSDP alone takes half a second, in every process, of data_prep too.
    if config.engine == "ddp":
        from drwkv.parallel.ddp import DdpEngine

        return DdpEngine(model, make_optimizer, config, world)
    from drwkv.parallel.fsdp import FsdpEngine

    return FsdpEngine(model, make_optimizer, config, world)
