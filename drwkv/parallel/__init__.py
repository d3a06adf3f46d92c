"""Ways to run one model on many ranks, behind one interface (engine.py). What is trained is in drwkv.training."""

from torch import nn

from drwkv.parallel.activations import ActivationConfig, checkpoint_blocks
from drwkv.parallel.compilation import compile_blocks
from drwkv.parallel.distributed import World, session
from drwkv.parallel.engine import Engine, MakeOptimizer, ParallelConfig

__all__ = ["ActivationConfig", "Engine", "ParallelConfig", "World", "session", "wrap"]


def wrap(model: nn.Module, make_optimizer: MakeOptimizer, config: ParallelConfig, world: World) -> Engine:
    """The engine that `config.engine` names, around `model`, which is moved and wrapped in place.

    The model has `blocks_in_order()`: the units to checkpoint, compile and shard.
    """
    blocks: list[nn.Module] = model.blocks_in_order()  # type: ignore[operator]
    checkpoint_blocks(blocks, config.activations)
    if config.compile:
        compile_blocks(blocks)
    # Imported when one is chosen: FSDP alone takes half a second, in every process, of data_prep too.
    if config.engine == "ddp":
        from drwkv.parallel.ddp import DdpEngine

        return DdpEngine(model, make_optimizer, config, world)
    if config.engine.startswith("zero"):
        from drwkv.parallel.deepspeed import ZeroEngine

        return ZeroEngine(model, make_optimizer, config, world)
    from drwkv.parallel.fsdp import FsdpEngine

    return FsdpEngine(model, make_optimizer, config, world)
