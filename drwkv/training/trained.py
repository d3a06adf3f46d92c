"""A trained model from wherever it lies: a run folder, one of its checkpoints, a released `.pt`, a `.safetensors`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from drwkv.compose import read_dumped
from drwkv.config import TrainConfig
from drwkv.convert import build, read_process
from drwkv.data.manifest import Manifest
from drwkv.diffusion.gaussian import GaussianConfig
from drwkv.models.config import without_values
from drwkv.training.checkpoint import MARK, latest, read_full
from drwkv.training.monitor import read_lines
from drwkv.training.run_folder import CONFIG, DATA


@dataclass(frozen=True)
class TrainedModel:
    """Weights with what is needed to sample from them."""

    model: nn.Module  # on the CPU, float32
    process: GaussianConfig  # the process that it was trained for
    manifest: Manifest | None  # of its training data; None for a file that does not tell
    name: str  # where the weights were read from
    run: Path | None  # folder of the run that trained it; None for a file

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model draws."""
        height, width = cast(tuple[int, int], self.model.input_size)
        return (cast(int, self.model.in_channels), height, width)

    @property
    def num_classes(self) -> int | None:
        """Labels are 0..num_classes-1; None: unconditional."""
        return cast(int | None, self.model.num_classes)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of its training, as far as known; read from the run's folder."""
        lines = read_lines(self.run / "metrics.jsonl") if self.run else iter(())
        return [(line["step"], line["loss"]) for line in lines if line.get("loss")]


def find(path: str, key: str = "checkpoint") -> Path:
    """The file, or the whole checkpoint, that `path` names: a file, a checkpoint, or a run's folder and its newest.

    Raises FileNotFoundError or ValueError that says what `path`, given as config key `key`, should have been.
    """
    place = Path(path)
    if place.is_file() or (place / MARK).is_file():
        return place
    if not place.is_dir():
        raise FileNotFoundError(f"{key} {place}: no such file or folder")
    found = latest(place / "checkpoints")
    if found is None:
        raise ValueError(
            f"{key} {place}: holds no whole checkpoint; give a run folder, or step_N in its checkpoints"
        )
    return found


def open_trained(path: str, weights: str) -> TrainedModel:
    """The `weights` ("ema" or "model") at `path`, read without running any code of the file.

    Raises FileNotFoundError or ValueError that says what `path` should have been.
    """
    place = find(path)
    if place.is_file():
        model = build(place, weights)
        process = read_process(place) or {"learn_variance": cast(Any, model).learn_variance}
        return TrainedModel(model, GaussianConfig(**process), None, str(place), None)
    run = place.parent.parent
    config = read_dumped(TrainConfig, run / CONFIG)
    model = without_values(config.model)
    model.load_state_dict(read_full(place, "ema" if weights == "ema" else "model"), assign=True)
    manifest = Manifest(**json.loads((run / DATA).read_text()))
    return TrainedModel(model, config.diffusion, manifest, str(place), run)
