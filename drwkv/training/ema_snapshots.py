"""Snapshots of the power-function averages while a run goes on, and an average of any width out of them afterwards:

    python -m drwkv.training.ema RUN width=0.13 out=weights.safetensors [step=N]

The checkpoints of the run serve as snapshots too, so its last state always does. The maths is power_ema.py's; how
tensors are written and read, whole or not at all, is checkpoint.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from tqdm import tqdm

from drwkv.compose import load, read_dumped, require
from drwkv.config import TrainConfig
from drwkv.convert import save_weights
from drwkv.models.config import ModelConfig
from drwkv.parallel.distributed import World
from drwkv.training.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    Place,
    folder_of,
    read_full,
    read_scalars,
    step_of,
    whole_checkpoints,
)
from drwkv.training.ema import kind_of
from drwkv.training.power_ema import WIDEST, Profile, fit
from drwkv.training.run_folder import CONFIG
from drwkv.training.state import TrainState

FOLDER = "ema_snapshots"
NEGLIGIBLE = 1e-9  # coefficients below the rounding of float32: their averages are not read


class Snapshots:
    """Saves the power-function averages of a run every `ema.snapshot_every_steps` steps, all of which are kept."""

    def __init__(self, folder: Path, config: TrainConfig, world: World, *, step: int) -> None:
        self._kept: Checkpoints | None = None
        if config.ema.widths:
            keep_all = CheckpointConfig(
                every_steps=config.ema.snapshot_every_steps,
                keep_every_steps=1,
                asynchronous=config.checkpoint.asynchronous,
            )
            self._kept = Checkpoints(folder / FOLDER, keep_all, world)
            self.rewind(step)

    def due(self, step: int) -> bool:
        """Whether the averages after `step` steps are to be saved."""
        return self._kept is not None and self._kept.due(step)

    def save(self, state: TrainState) -> None:
        """Save the averages after `state.step` steps; returns once they are staged. Collective."""
        if self._kept is not None:
            tensors = state.tensors(map(kind_of, state.ema.widths))
            self._kept.save(state.step, tensors, state.snapshot_scalars(), wait=False)

    def failure(self) -> OSError | None:
        """The error of a save that has ended on this rank, without waiting for one under way."""
        return self._kept.failure() if self._kept is not None else None

    def rewind(self, step: int) -> None:
        """Remove the snapshots of later steps: they belong to a history that the run has left. Collective."""
        if self._kept is not None:
            self._kept.finish()
            self._kept.discard_after(step)

    def finish(self) -> None:
        """Wait for the save under way. Collective."""
        if self._kept is not None:
            self._kept.finish()


@dataclass(frozen=True)
class Snapshot:
    """Averages on disk."""

    path: Place
    updates: int
    widths: tuple[float, ...]


def stored(run: Path, config: CheckpointConfig) -> list[Snapshot]:
    """All whole snapshots, and checkpoints with such averages, of a run, by rising count of applied updates."""
    found: dict[int, Snapshot] = {}
    for folder in (folder_of(run, config), run / FOLDER):
        for path in whole_checkpoints(folder):
            scalars = read_scalars(path)
            widths, updates = scalars.get("widths", []), scalars["updates"]
            if widths and updates:
                found[updates] = Snapshot(path, updates, tuple(widths))
    return [found[updates] for updates in sorted(found)]


@dataclass
class ReconstructConfig:
    """All of `python -m drwkv.training.ema`."""

    run: str = MISSING  # run folder; `run=` may be left out in front
    width: float = MISSING  # sigma_rel of the average that is wanted
    out: str = MISSING  # .safetensors to write; sample_dist.py and drwkv.convert open it
    step: int | None = None  # the average as it was after this step, one that has a snapshot; None: the last
    max_error: float = 0.05  # refuse if the weighting of the steps differs more; 0.05: as if 7 % wider


def reconstruct(config: ReconstructConfig) -> str:
    """Write the average of `config.width`, a linear combination of those stored; returns what is to be said of it.

    Holds 12 bytes a parameter, however many snapshots there are. Raises ValueError where the snapshots cannot give it.
    """
    run, out = Path(config.run), Path(config.out)
    require(0 < config.width <= WIDEST, "width", config.width, f"give 0 < width <= {WIDEST:.4f}")
    require(out.suffix == ".safetensors", "out", config.out, "weights are written as .safetensors")
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run}: is no run folder, it has no {CONFIG}")
    trained = read_dumped(TrainConfig, run / CONFIG)
    snapshots = _up_to(config.step, stored(run, trained.checkpoint), run)
    coefficients, error = _coefficients(config, snapshots, run)
    weights = combine(coefficients)
    save_weights(out, weights, _model_arguments(trained.model), process=asdict(trained.diffusion))
    last = snapshots[-1]
    return (
        f"{out}: width {config.width:g} after step {step_of(last.path)} ({last.updates} updates), of "
        f"{len(coefficients)} averages from {len(snapshots)} snapshots; error of the profile {error:.1e}"
    )


def _up_to(step: int | None, snapshots: list[Snapshot], run: Path) -> list[Snapshot]:
    """The snapshots until that of `step`, which is the last one."""
    if not snapshots:
        raise ValueError(
            f"{run}: holds no power-function averages: train with ema.widths=[0.05,0.1] "
            "and ema.snapshot_every_steps, 30 or more times a run"
        )
    if step is None:
        return snapshots
    steps = [step_of(snapshot.path) for snapshot in snapshots]
    nearest = ", ".join(map(str, sorted(sorted(steps, key=lambda other: abs(other - step))[:3])))
    require(step in steps, "step", step, f"give one with a snapshot, the nearest are {nearest}")
    return snapshots[: steps.index(step) + 1]


def _coefficients(
    config: ReconstructConfig, snapshots: Sequence[Snapshot], run: Path
) -> tuple[dict[tuple[Place, float], float], float]:
    """(snapshot, width) -> its coefficient, and the error of the profile. ValueError if that is too large."""
    places = [(snapshot, width) for snapshot in snapshots for width in snapshot.widths]
    profiles = [Profile(snapshot.updates, width) for snapshot, width in places]

    def tried(width: float) -> tuple[np.ndarray, float]:
        return fit(profiles, Profile(snapshots[-1].updates, width))

    found, error = tried(config.width)
    if error > config.max_error:
        # Those stored at the last step are met exactly: between the nearest of them and the one asked for is the edge.
        reached = min(snapshots[-1].widths, key=lambda width: abs(width - config.width))
        asked = config.width
        for _ in range(10):
            middle = (reached + asked) / 2
            reached, asked = (middle, asked) if tried(middle)[1] <= config.max_error else (reached, middle)
        raise ValueError(
            f"{run}: {len(snapshots)} snapshots up to step {step_of(snapshots[-1].path)} give no average of width "
            f"{config.width:g} there: their best sum is off by {error:.3f}, max_error is {config.max_error:g}; "
            f"the nearest width in reach is {reached:.3f}, more snapshots (ema.snapshot_every_steps) reach farther"
        )
    used = {
        (snapshot.path, width): float(coefficient)
        for (snapshot, width), coefficient in zip(places, found, strict=True)
        if abs(coefficient) > NEGLIGIBLE
    }
    return used, error


def combine(coefficients: Mapping[tuple[Place, float], float]) -> dict[str, torch.Tensor]:
    """The sum of averages, each by (snapshot, width) times its coefficient, one in memory at a time; float32."""
    total: dict[str, torch.Tensor] = {}
    for (path, width), coefficient in tqdm(coefficients.items(), unit="average", disable=None):
        for name, tensor in read_full(path, kind_of(width)).items():
            if name not in total:
                total[name] = torch.zeros_like(tensor, dtype=torch.float64)
            total[name].add_(tensor, alpha=coefficient)
    return {name: tensor.float() for name, tensor in total.items()}


def _model_arguments(config: ModelConfig) -> dict[str, object]:
    """What `drwkv.models.create` takes, as a .safetensors says it; who computes is not part of it."""
    given = json.loads(json.dumps(asdict(config)))
    chosen = {key: value for key, value in given.pop("options").items() if key != "kernel_backend"}
    return {**given, **chosen}


def main(arguments: Sequence[str]) -> int:
    """The command line: returns the exit code."""
    first, *rest = arguments or [""]
    named = [f"run={first}", *rest] if first and "=" not in first and first[0] != "-" else arguments
    print(reconstruct(load(ReconstructConfig, named)))
    return 0
