"""A trained model from wherever it lies: a run folder, one of its checkpoints, a released `.pt`, a `.safetensors`.

Checkpoints may lie on S3; what is needed of one is fetched and held to its checksums.
"""

from __future__ import annotations

import json
import tempfile
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
from drwkv.storage import Storage, is_remote, open_storage, split_path
from drwkv.training.checkpoint import MARK, Place, folder_of, latest, read_full
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
    tells_process: bool = True  # False: a file that does not tell, `process` is the usual one

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


def find(path: str, key: str = "checkpoint") -> Place:
    """The file, or the whole checkpoint, that `path` names: a file, a checkpoint, or a run's folder and its newest.

    Raises FileNotFoundError or ValueError that says what `path`, given as config key `key`, should have been.
    """
    return _find(path, key)[0]


def open_trained(path: str, weights: str) -> TrainedModel:
    """The `weights` ("ema" or "model") at `path`, read without running any code of the file.

    Raises FileNotFoundError or ValueError that says what `path` should have been.
    """
    place, run = _find(path, "checkpoint")
    if run is None:
        model = build(cast(Path, place), weights)
        told = read_process(cast(Path, place))
        process = GaussianConfig(**(told or {"learn_variance": cast(Any, model).learn_variance}))
        return TrainedModel(model, process, None, str(place), None, tells_process=told is not None)
    config = _read_config(run)
    model = without_values(config.model)
    model.load_state_dict(read_full(place, "ema" if weights == "ema" else "model"), assign=True)
    manifest = Manifest(**json.loads(run.read(DATA)))
    folder = None if is_remote(run.path) else Path(run.path)
    return TrainedModel(model, config.diffusion, manifest, str(place), folder)


def _find(path: str, key: str) -> tuple[Place, Storage | None]:
    """What is meant by a path, and where its run's config and manifest stand; None for a file, which has no run."""
    place: Place = path if is_remote(path) else Path(path)
    if isinstance(place, Path) and place.is_file():
        return place, None
    if isinstance(place, Path) and not place.is_dir():
        raise FileNotFoundError(f"{key} {place}: no such file or folder")
    here = open_storage(place)
    if here.exists(MARK):
        of_folder = split_path(here.path)[0]  # checkpoint.folder; else RUN/checkpoints
        parents = [of_folder, split_path(of_folder)[0]]
        found = next((folder for folder in parents if open_storage(folder).exists(CONFIG)), parents[-1])
        return place, open_storage(found)
    folder: Place = place if is_remote(place) else Path(place) / "checkpoints"
    if not is_remote(place) and here.exists(CONFIG):
        folder = folder_of(Path(place), _read_config(here).checkpoint)
    newest = latest(folder)
    if newest is None and not is_remote(place):  # it may be a checkpoint.folder itself
        newest = latest(place)
    if newest is None:
        raise ValueError(
            f"{key} {place}: holds no whole checkpoint; give a run folder, or step_N where its checkpoints are"
        )
    return newest, here


def _read_config(run: Storage) -> TrainConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        path.write_bytes(run.read(CONFIG))
        return read_dumped(TrainConfig, path)
