"""What a run needs of each rank's memory, before it runs:

    python -m drwkv.training.memory --ranks 64 --config configs/NAME.yaml key.sub=value ...

Weights, gradients, moments and averages are counted here, by the rules of the engine; what the forward keeps for the
backward is activation_memory.py's. Not counted: the allocator's gaps, NCCL's buffers, and what CUDA and its libraries
take (about 1 GiB a GPU).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import nn

from drwkv import command
from drwkv.compose import load
from drwkv.config import TrainConfig, check_ranks, check_train
from drwkv.models.config import without_values
from drwkv.parallel.engine import ParallelConfig
from drwkv.training.activation_memory import GIB, Activations, choose_blocks

FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most; what lies in the CPU's memory by `parallel.offload` is counted too."""

    weights: int  # that the optimizer changes, and copies that compute
    gradients: int
    moments: int
    averages: int
    gathered: int  # weights of other ranks, while they compute
    activations: int  # the most of what the forward keeps and what is computed with at once

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)] + [("total", self.total)]
        return "\n".join(f"{name:<12} {size / GIB:9.3f} GiB" for name, size in rows)


def predict(config: TrainConfig, ranks: int) -> Memory:
    """The memory of the fullest of `ranks` ranks. Raises ValueError where the config cannot be. Takes some seconds."""
    check_train(config)
    check_ranks(config, ranks)
    activations = Activations(config, ranks)
    if config.parallel.activations.budget_gib is not None:
        config = replace(config, parallel=choose_blocks(config.parallel, activations))
    model = without_values(config.model)
    sizes = [parameter.numel() for parameter in model.parameters()]
    weights, gradients, moments, average, gathered = _states(
        config.parallel, ranks, sum(sizes), _units(model, config.parallel)
    )
    averages = average * (1 + len(config.ema.widths))
    kept = activations.of(config.parallel.activations)
    return Memory(weights, gradients, moments, averages, gathered, activations=kept)


def _units(model: nn.Module, parallel: ParallelConfig) -> list[int]:
    """Parameters of each unit that FSDP2 gathers, the last one what is in no block."""
    blocks: list[nn.Module] = model.blocks_in_order()  # type: ignore[operator]
    counts = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    together = parallel.blocks_per_unit
    units = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    return [*units, sum(parameter.numel() for parameter in model.parameters()) - sum(counts)]


def _states(
    parallel: ParallelConfig, ranks: int, count: int, units: list[int]
) -> tuple[int, int, int, int, int]:
    """Bytes of weights, gradients, moments, average and gathered weights, of a model of `count` parameters."""
    computes = HALF if parallel.precision == "bf16_params" else FLOAT
    if parallel.engine == "ddp":
        return FLOAT * count, FLOAT * count, 2 * FLOAT * count, FLOAT * count, 0
    share = -(-count // (ranks // parallel.replicas))
    moments, average = 2 * FLOAT * share, FLOAT * share
    if parallel.engine == "fsdp":
        *blocks, rest = units
        # One unit computes while the next one is fetched.
        held = 2 * max(blocks) if parallel.reshard_after_forward else sum(blocks)
        return FLOAT * share, FLOAT * share, moments, average, computes * (held + rest)
    # ZeRO keeps float32 weights beside those that compute, be these float32 too.
    if parallel.engine == "zero3":
        return (computes + FLOAT) * share, computes * share, moments, average, computes * 2 * max(units)
    gradients = computes * (count if parallel.engine == "zero1" else share)
    return computes * count + FLOAT * share, gradients, moments, average, 0


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m drwkv.training.memory", description="what a run needs of each rank's memory"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run (1)")
    options, rest = parser.parse_known_args(arguments)
    if options.ranks < 1:
        raise ValueError(f"--ranks is {options.ranks}: give 1 or more")
    print(predict(load(TrainConfig, rest), options.ranks))


if __name__ == "__main__":
    command.run(main)
