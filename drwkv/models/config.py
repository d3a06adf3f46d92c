"""The settings of a backbone in a config file, and the backbone that they describe. Names and sizes: __init__.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from drwkv.models import create


@dataclass
class ModelConfig:
    """Arguments of `drwkv.models.create`."""

    name: str = "DRWKV-S/2"  # FAMILY-SIZE/PATCH, or the bare FAMILY with its sizes under options
    input_size: list[int] = field(default_factory=lambda: [32, 32])  # height and width of what the model sees
    in_channels: int = 4  # channels of what the model sees: 4 for most latents, 1 or 3 for pixels
    num_classes: int | None = None  # labels are 0..num_classes-1; None: unconditional
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the family, e.g. depth, skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        height, width = self.input_size
        return (self.in_channels, height, width)


def without_values(config: ModelConfig) -> nn.Module:
    """The backbone that `config` describes with shapes alone, on the meta device. ValueError as `create` raises it."""
    with torch.device("meta"):
        return from_config(config, seed=0)


def from_config(config: ModelConfig, *, seed: int) -> nn.Module:
    """The backbone that `config` describes, initialised from `seed`. ValueError as `create` raises it."""
    if len(config.input_size) != 2:
        raise ValueError(f"config key 'model.input_size' is {list(config.input_size)}: give [height, width]")
    clash = sorted(set(config.options) & {"input_size", "in_channels", "num_classes", "seed"})
    if clash:
        raise ValueError(f"config key 'model.options.{clash[0]}': give it as model.{clash[0]}, or run.seed")
    height, width = config.input_size
    return create(
        config.name,
        input_size=(height, width),
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        seed=seed,
        **config.options,
    )
