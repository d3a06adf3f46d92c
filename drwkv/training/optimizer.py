"""The optimizer and its learning rate by step. What is optimised, and on how many ranks, is drwkv.parallel's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from drwkv.parallel.engine import start_moments


@dataclass
class Stage:
    """One stage of the learning rate."""

    from_step: int  # first optimizer step of the stage
    lr: float  # rate at that step


@dataclass
class OptimizerConfig:
    """AdamW as in the paper, and the learning rate by step."""

    lr: float = 1e-4  # rate from step 0 until the first stage
    stages: list[Stage] = field(default_factory=list)  # by rising from_step; empty: constant
    between: Literal["hold", "linear"] = "hold"  # hold a stage's rate until the next, or move linearly to it
    warmup_steps: int = 0  # steps of linear rise from 0 to the scheduled rate; 0: none
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled; the paper uses none
    max_grad_norm: float | None = 1.0  # clip the global L2 norm to this; None: measure, do not clip


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of optimizer step `step` (0 is the first): stages, times the warm-up's linear rise."""
    knots = [(0, config.lr)] + [(stage.from_step, stage.lr) for stage in config.stages]
    index = max(i for i, (start, _) in enumerate(knots) if start <= step)
    start, rate = knots[index]
    if config.between == "linear" and index + 1 < len(knots):
        end, target = knots[index + 1]
        rate += (target - rate) * (step - start) / (end - start)
    return rate * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else rate


def build(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW with its moments made at once, zero, so that a checkpoint can be loaded into them."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        start_moments(optimizer, group["params"])
    return optimizer
