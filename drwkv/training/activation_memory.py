"""What the forward of a model keeps for the backward, foreseen; and how many blocks to checkpoint for a budget of it.

The most bytes at once come from the model's own operations on tensors without values, by torch's tracker, for the
samples of one micro-batch. All of a rank's memory is added up in memory.py; checkpointing itself is
drwkv.parallel.activations'.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drwkv.config import TrainConfig
from drwkv.models.config import without_values
from drwkv.parallel.activations import ActivationConfig, checkpoint_blocks, chosen_blocks
from drwkv.parallel.engine import ParallelConfig

GIB = 1 << 30
SHORTER, SHORT = 5, 7  # blocks of models from which deeper ones are foreseen
TO_SPARE = 0.97  # of a budget: the forecast is off by up to 3 %

log = logging.getLogger("drwkv")


def within_budget(config: TrainConfig, ranks: int) -> ParallelConfig:
    """`config.parallel` with as few blocks checkpointed as `activations.budget_gib` takes; unchanged without one.

    The same on every rank: of the config and the number of ranks alone. Raises ValueError where all are not enough.
    """
    if config.parallel.activations.budget_gib is None:
        return config.parallel
    return choose_blocks(config.parallel, Activations(config, ranks))


def choose_blocks(parallel: ParallelConfig, activations: Activations) -> ParallelConfig:
    """`parallel` with the fewest blocks that keep the forecast within the budget, which is set; ValueError else."""
    chosen, depth = parallel.activations, activations.depth
    assert chosen.budget_gib is not None
    for blocks in range(depth + 1):
        found = replace(chosen, blocks=blocks)
        size = activations.of(found)
        if size <= TO_SPARE * chosen.budget_gib * GIB:
            log.info(
                "activations: %d of %d blocks are checkpointed (%s); %.3g GiB of %.3g GiB are foreseen",
                blocks, depth, chosen.checkpoint, size / GIB, chosen.budget_gib,
            )  # fmt: skip
            return replace(parallel, activations=found)
    raise ValueError(
        f"config key 'parallel.activations.budget_gib': {chosen.budget_gib!r} is not possible: with all {depth} "
        f"blocks checkpointed ({chosen.checkpoint}) a micro-batch of {activations.micro_batch} needs "
        f"{size / TO_SPARE / GIB:.3g} GiB: give so much, or raise run.accumulate"
    )


class Activations:
    """The most bytes at once of what the forward keeps and what is computed with, in forward and backward.

    Two models of few blocks tell it for any depth in seconds: each pair of blocks adds as much.
    """

    def __init__(self, config: TrainConfig, ranks: int) -> None:
        piece = -(-config.run.largest_batch // ranks)
        self.micro_batch = -(-piece // config.run.accumulate)
        self._config = config
        self.depth = len(without_values(config.model).blocks_in_order())  # type: ignore[operator]

    def of(self, chosen: ActivationConfig) -> int:
        """Bytes with the blocks checkpointed that `chosen` says."""
        if not (indices := chosen_blocks(self.depth, chosen)):
            return self._none
        # The block whose backward comes first makes once more, while all is there, what it would have kept.
        num_saving = len(indices) - (self.depth - 1 in indices)
        saved = (self._none - self._all) / max(1, self.depth - 1)
        return int(self._none - saved * num_saving)

    @cached_property
    def _none(self) -> int:
        return self._by_depth(ActivationConfig("none"))

    @cached_property
    def _all(self) -> int:
        return self._by_depth(ActivationConfig(self._config.parallel.activations.checkpoint))

    def _by_depth(self, chosen: ActivationConfig) -> int:
        if self.depth <= SHORT:
            return self._tracked(self.depth, chosen)
        shorter, short = (self._tracked(depth, chosen) for depth in (SHORTER, SHORT))
        return short + (short - shorter) * (self.depth - SHORT) // (SHORT - SHORTER)

    def _tracked(self, depth: int, chosen: ActivationConfig) -> int:
        """Of the model with so many blocks, each of its operations done on tensors without values."""
        from torch.distributed._tools.mem_tracker import MemTracker  # half a second, and most runs need none

        config = self._config
        # Tensors without values are the CPU's, whose backend keeps what a GPU's keeps.
        options = {**config.model.options, "depth": depth, "kernel_backend": "torch"}
        model = without_values(replace(config.model, options=options))
        checkpoint_blocks(model.blocks_in_order(), chosen)  # type: ignore[operator]
        model._check_inputs = lambda *_: None  # type: ignore[assignment]  # it looks at labels, which have no values
        channels, height, width = config.model.shape
        with FakeTensorMode():
            _give_fake_parameters(model)
            x = torch.empty(self.micro_batch, channels, height, width)
            t, y = torch.empty(self.micro_batch), torch.empty(self.micro_batch, dtype=torch.int64)
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
