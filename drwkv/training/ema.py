"""An exponential moving average of the weights, sharded where they are. Storing it is checkpoint.py's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from drwkv.parallel.engine import Engine


@dataclass
class EmaConfig:
    """The average that is sampled from."""

    decay: float = 0.9999  # weight of the old average in each step
    warmup: bool = (
        False  # True: decay min(decay, (1 + step) / (10 + step)), for runs shorter than 1 / (1 - decay)
    )


def decay_at(config: EmaConfig, step: int) -> float:
    """The decay of optimizer step `step` (0 is the first)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Ema:
    """ema <- decay * ema + (1 - decay) * weights, in float32, on this rank's parts (`parts`, by name)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.parts = {name: part.detach().clone() for name, part in engine.parts.items()}

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((average, self._engine.parts[name].detach()) for name, average in self.parts.items())

    @torch.no_grad()
    def update(self, decay: float, found_inf: torch.Tensor) -> None:
        """One step at `decay`, left out on the device where `found_inf` (0-dim float) is 1."""
        device = next(iter(self.parts.values())).device
        weight = (1.0 - decay) * (1.0 - found_inf.to(device))
        for average, value in self._pairs():
            average.lerp_(value, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The engine's module computes with the averages inside, and with the trained weights again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in self._pairs():
            held = value.clone()
            value.copy_(average)
            average.copy_(held)
        self._engine.refresh()
