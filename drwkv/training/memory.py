"""What a run needs of each rank's memory, before it runs:

    python -m drwkv.training.memory --ranks 64 --config configs/NAME.yaml key.sub=value ...

Weights, gradients, moments and averages are counted by the rules of the engine. What the forward keeps for the
backward, and the most that both have at once, come from the model's own operations on tensors without values, by
torch's tracker, for the samples of one micro-batch. Not counted: the allocator's gaps, NCCL's buffers, and what CUDA
and its libraries take (about 1 GiB a GPU).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from drwkv import command
from drwkv.compose import load
from drwkv.config import TrainConfig, check_ranks, check_train
from drwkv.models.config import without_values
from drwkv.parallel.activations import checkpoint_blocks
from drwkv.parallel.engine import ParallelConfig

FLOAT, HALF = 4, 2  # bytes
GIB = 1 << 30


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
    """The memory of the fullest of `ranks` ranks. Raises ValueError where the config cannot be.

    Takes some seconds: the largest models have some thousand operations.
    """
    check_train(config)
    check_ranks(config, ranks)
    model = without_values(config.model)
    sizes = [parameter.numel() for parameter in model.parameters()]
    weights, gradients, moments, average, gathered = _states(
        config.parallel, ranks, sum(sizes), _units(model, config.parallel)
    )
    averages = average * (1 + len(config.ema.widths))
    piece = -(-config.run.largest_batch // ranks)
    micro_batch = -(-piece // config.run.accumulate)
    activations = _activations(model, config, micro_batch)
    return Memory(weights, gradients, moments, averages, gathered, activations)


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


def _activations(model: nn.Module, config: TrainConfig, micro_batch: int) -> int:
    """The most bytes at once of what the forward keeps and what is computed with, in forward and backward."""
    checkpoint_blocks(model.blocks_in_order(), config.parallel.activations)  # type: ignore[operator]
    model._check_inputs = lambda *_: None  # type: ignore[assignment]  # it looks at the labels, which have no values
    channels, height, width = config.model.shape
    with FakeTensorMode():
        _give_fake_parameters(model)
        x = torch.empty(micro_batch, channels, height, width)
        t, y = torch.empty(micro_batch), torch.empty(micro_batch, dtype=torch.int64)
        labels = None if config.model.num_classes is None else y
        tracker = MemTracker()
        tracker.track_external(model, x, t, y)
        with tracker:
            bf16 = config.parallel.precision != "fp32"
            with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
                out = model(x, t, labels)
            out.float().square().mean().backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    kinds = {str(kind).rpartition(".")[2]: size for kind, size in peak.items()}
    return int(kinds["ACT"] + kinds["TEMP"])


def _give_fake_parameters(model: nn.Module) -> None:
    """Parameters, and their gradients, of the fake mode that is on, in the place of those on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(parameter.shape))
            fake.grad = torch.empty(parameter.shape)
            setattr(module, name, fake)


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
