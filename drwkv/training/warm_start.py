"""The weights that a new run starts from, where another run or a release has left them.

Only weights: the new run has its own steps and samples from 0, no moments, and an average that starts from the same
weights. Opening them is trained.py's; going on with a run of one's own is state.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drwkv.config import RunConfig
from drwkv.diffusion.gaussian import GaussianConfig
from drwkv.models.layers import resize_positions
from drwkv.parallel.distributed import World
from drwkv.storage import is_remote, open_storage
from drwkv.training.checkpoint import MARK, CheckpointConfig, folder_of, latest
from drwkv.training.trained import find, open_trained

KEY = "run.start_from"
POSITIONS = "pos_embed"
# What two models may differ in though one takes the other's weights.
FREE = {"input_size", "drop_path_rate"}
ADVICE = "set model.* to what it was trained with"


@dataclass(frozen=True)
class Origin:
    """Where a run's first weights came from, for starts.jsonl."""

    path: str  # the file, or the checkpoint, that was read
    weights: str  # "ema" or "model"
    sha256: str  # of the file; of a checkpoint's mark, which holds a checksum of each of its files
    input_size: tuple[int, int]  # (H, W) that its positions were made for
    vae_hash: str | None  # of the VAE that made its latents; None: pixels, or a file that does not tell
    process: GaussianConfig | None  # that it was trained for; None: a file that does not tell


def begin(model: nn.Module, run: RunConfig, checkpoint: CheckpointConfig, world: World) -> Origin | None:
    """Put the weights that `run.start_from` names into `model`, which is not wrapped yet. Collective.

    None, and nothing is read, where it names none or the run has a checkpoint of its own. Raises ValueError or
    FileNotFoundError in one line where there are no such weights, or they are another model's.
    """
    if run.start_from is None:
        return None
    if world.from_first(world.is_first and latest(folder_of(Path(run.folder), checkpoint)) is not None):
        return None

    # All ranks read what the first has found: a run that still goes on may have saved another one since.
    place = _found_by_first(run.start_from, world)
    try:
        trained = open_trained(place, run.start_weights)
    except ValueError as error:
        raise ValueError(f"config key {KEY!r}: {error}") from None
    take(model, trained.model, where=trained.name)
    return Origin(
        path=place if is_remote(place) else str(Path(place).resolve()),
        weights=run.start_weights,
        sha256=world.from_first(_sha256(place) if world.is_first else None),
        input_size=trained.shape[1:],
        vae_hash=trained.manifest.vae_hash if trained.manifest else None,
        process=trained.process if trained.tells_process else None,
    )


def _found_by_first(path: str, world: World) -> str:
    """What `find` gives on rank 0, or raises there, on every rank."""
    found: str | Exception | None = None
    if world.is_first:
        try:
            found = str(find(path, KEY))
        except (ValueError, OSError) as error:
            found = error
    found = world.from_first(found)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found


@torch.no_grad()
def take(model: nn.Module, source: nn.Module, *, where: str) -> None:
    """Copy all parameters of `source` into `model`; positions of another input size are interpolated.

    As the model itself does it for an image of another size, so that on the new size it gives what `source` gives.
    Raises ValueError, and `model` is as it was, where any other shape differs.
    """
    mine: dict[str, Tensor] = dict(model.named_parameters())
    its: dict[str, Tensor] = dict(source.named_parameters())
    if POSITIONS in its and POSITIONS in mine:
        its[POSITIONS] = resize_positions(its[POSITIONS], _grid(source), _grid(model))
    everything = {**mine, **its}
    differing = [name for name in everything if _shape(its, name) != _shape(mine, name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"config key {KEY!r}: {where} holds another model: {len(differing)} of {len(everything)} tensors differ, "
            f"the first is {name}, {_shape(its, name)} there and {_shape(mine, name)} in this config: {ADVICE}"
        )
    its_settings = _settings(source)
    for key, value in _settings(model).items():
        if its_settings.get(key) != value:
            raise ValueError(
                f"config key {KEY!r}: {where} holds another model: {key} is {its_settings.get(key)!r} there and "
                f"{value!r} in this config: {ADVICE}"
            )
    for name, parameter in mine.items():
        parameter.copy_(its[name])


def _grid(model: nn.Module) -> tuple[int, int]:
    return model.grid  # type: ignore[return-value]


def _settings(model: nn.Module) -> dict[str, Any]:
    """What a model was made with, as far as another must have it too."""
    config: dict[str, Any] = model.config  # type: ignore[assignment]
    return {key: value for key, value in config.items() if key not in FREE}


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "missing"


def _sha256(place: str) -> str:
    """Of a file, or of a checkpoint's mark."""
    if not is_remote(place) and Path(place).is_file():
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(open_storage(place).read(MARK)).hexdigest()
