"""Moving averages of the weights, sharded where they are: one of fixed decay, and power-function ones by width.

The power functions are power_ema.py's; storing averages is checkpoint.py's. An average of any width, when the run is
over (the command's keys are in ema_snapshots.py):

    python -m drwkv.training.ema RUN width=0.13 out=weights.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from drwkv import command
from drwkv.parallel.engine import Engine
from drwkv.training.power_ema import exponent, step_weight

FIXED = "ema"  # kind of the fixed average among the tensors of a state


@dataclass
class EmaConfig:
    """The average that is sampled from, and those that others are made of afterwards."""

    decay: float = 0.9999  # weight of the old average in each step
    # True: decay min(decay, (1 + step) / (10 + step)), for runs shorter than 1 / (1 - decay)
    warmup: bool = False
    # sigma_rel of EDM2's power-function averages beside it, e.g. [0.05, 0.1]; empty: none
    widths: list[float] = field(default_factory=list)
    snapshot_every_steps: int = 0  # steps between snapshots of these averages, all of which are kept; 0: none


def decay_at(config: EmaConfig, step: int) -> float:
    """The decay of optimizer step `step` (0 is the first)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


def kind_of(width: float) -> str:
    """Kind of the power-function average of a width among the tensors of a state."""
    return f"{FIXED}_{width:.3f}"


class Ema:
    """Averages in float32 of this rank's parts of the weights.

    Attributes:
        parts: ema <- decay * ema + (1 - decay) * weights, by name.
        widths: of the power-function averages.
        kinds: kind of average -> its parts by name; the fixed one first.
    """

    def __init__(self, engine: Engine, widths: Sequence[float] = ()) -> None:
        self._engine, self.widths = engine, list(widths)
        self.kinds = {kind: self._copies() for kind in [FIXED, *map(kind_of, self.widths)]}
        self.parts = self.kinds[FIXED]
        # Those of one part stand together, so that the part is still in the cache.
        self._averages = [parts[name] for name in self.parts for parts in self.kinds.values()]
        gammas = torch.tensor([exponent(width) for width in self.widths], dtype=torch.float64)
        self._gammas = gammas.to(self._averages[0].device)

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: part.detach().clone() for name, part in self._engine.parts.items()}

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((average, self._engine.parts[name].detach()) for name, average in self.parts.items())

    @torch.no_grad()
    def update(self, decay: float, found_inf: torch.Tensor) -> None:
        """One step, after the optimizer's; left out on the device where `found_inf` (0-dim float) is 1.

        The fixed average takes it at `decay`, the others by the count of applied updates, which only the device knows.
        """
        applied = 1.0 - found_inf.to(self._gammas.device)
        weights = [(1.0 - decay) * applied]
        if self.widths:
            by_width = step_weight(self._gammas, self._engine.applied_updates) * applied
            weights += by_width.float().unbind()
        values: list[torch.Tensor] = [part for part in self._engine.parts.values() for _ in weights]
        torch._foreach_lerp_(self._averages, values, weights * len(self._engine.parts))

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


def _main(arguments: Sequence[str]) -> int:
    # Needs the whole configuration, of which EmaConfig is a part.
    from drwkv.training.ema_snapshots import main

    return main(arguments)


if __name__ == "__main__":
    command.run(_main)
