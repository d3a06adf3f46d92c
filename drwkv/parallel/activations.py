"""Activation checkpointing: which blocks keep what for the backward, and compute the rest again there.

A block that is checkpointed in full keeps its input alone. Selectively, it keeps what its matrix products gave and
computes again what only moves bytes: norms, lerps, gates, bi_wkv. Apply before a model is compiled or sharded. How many
blocks a budget of memory asks for is foreseen in drwkv/training/activation_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
MATMULS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})


@dataclass
class ActivationConfig:
    """What the forward keeps for the backward."""

    # What is kept of a block: all, its input, or its input and what its matrix products gave
    checkpoint: Literal["none", "full", "selective"] = "none"
    every: int = 1  # the first of every so many blocks is checkpointed, the others keep all
    blocks: int | None = None  # how many blocks are checkpointed, evenly spread; None: by `every`
    # Most GiB of activations a rank, as foreseen; as few blocks as will do are checkpointed; None: no limit
    budget_gib: float | None = None


def chosen_blocks(depth: int, config: ActivationConfig) -> list[int]:
    """Which of `depth` blocks are checkpointed."""
    if config.checkpoint == "none":
        return []
    if config.blocks is None:
        return list(range(0, depth, config.every))
    count = min(config.blocks, depth)
    return [i * depth // count for i in range(count)]


def checkpoint_blocks(blocks: list[nn.Module], config: ActivationConfig) -> int:
    """Checkpoint `blocks` in place as `config` says, their parameters' names unchanged; returns how many are.

    The blocks must draw no random numbers: none are put back for the second computation.
    """
    chosen = chosen_blocks(len(blocks), config)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.checkpoint == "selective":
        options["context_fn"] = _keep_matmuls
    for block in (blocks[index] for index in chosen):
        block.forward = partial(checkpoint, block.forward, **options)
    return len(chosen)


def _keep_matmuls() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE
