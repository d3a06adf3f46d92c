"""Grids of samples while a run goes on: of latents too, decoded by the VAE that made them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Applications
from small_vae import save_small_vae
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.writer import ShardSetWriter
from drwkv.compose import load
from drwkv.config import TrainConfig, check_train
from drwkv.data.manifest import Manifest
from drwkv.latents import hash_weights, load_vae, vae_scaling

LATENT = [
    "model.input_size=[8, 8]", "model.in_channels=4", "model.num_classes=10", "model.name=DRWKV",
    "model.options={patch_size: 2, hidden_size: 32, depth: 3}", "run.batch_size=8", "run.total_steps=1",
    "monitor.progress=false", "monitor.grid_every_steps=1", "monitor.grid_columns=2", "checkpoint.every_steps=0",
    "monitor.grid_sampler.steps=2", "run.seed=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def latents(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 20 latents of random numbers, which says that `vae` made them."""
    loaded = load_vae(str(vae))
    scale, shift = vae_scaling(loaded)
    manifest = Manifest(
        kind="moments", num_classes=10, channels=4, height=8, width=8, resolution=32, crop="none",
        dtype="float16", seed=0, samples_per_shard=10, vae_id=str(vae), vae_hash=hash_weights(loaded), scale=scale,
        shift=shift,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("latents") / "set"
    writer = ShardSetWriter(
        folder, names=[f"{i:02d}" for i in range(20)], labels=np.arange(20) % 10, manifest=manifest
    )
    moments = np.random.default_rng(0).normal(size=(20, 8, 8, 8)).astype(np.float16)
    writer.write_arrays({"moments.npy": moments})
    return folder


def grid_of(folder: Path) -> np.ndarray:
    """The only grid of a run, (H, W, 3)."""
    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    (event,) = shown.Images("samples/ema")
    with Image.open(BytesIO(event.encoded_image_string)) as image:
        return np.asarray(image)


def test_latents_are_shown_as_the_pictures_that_they_stand_for_the_same_on_any_number_of_ranks(
    applications: Applications, latents: Path, vae: Path, tmp_path: Path
) -> None:
    grids = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        run = [*LATENT, f"run.folder={folder}", f"data.paths=[{latents}]", f"monitor.vae={vae}"]
        applications.run("train_dist.py", *run, world_size=world_size)
        grids.append(grid_of(folder).astype(int))
    assert grids[0].shape[0] >= 10 * 32 and grids[0].shape[1] >= 2 * 32  # ten classes, two of each
    assert grids[0].std() > 1 and not np.array_equal(grids[0][..., 0], grids[0][..., 1])  # in colour
    assert np.abs(grids[0] - grids[1]).max() <= 1  # the last bit of a forward of another shape


def test_a_vae_that_is_missing_wrong_or_not_needed_is_named(
    applications: Applications, latents: Path, digits: Path, tmp_path: Path
) -> None:
    run = [*LATENT, f"run.folder={tmp_path / 'run'}", f"data.paths=[{latents}]"]
    with pytest.raises(ValueError, match="'monitor.grid_every_steps'.*give monitor.vae=FOLDER"):
        check_train(load(TrainConfig, run))
    other = save_small_vae(tmp_path / "other", seed=1)
    line = applications.refused("train_dist.py", *run, f"monitor.vae={other}")
    assert f"VAE {other}: its weights have sha256" in line
    pixels = ["--config", "configs/digits.yaml", f"run.folder={tmp_path / 'pixels'}"]
    line = applications.refused(
        "train_dist.py", *pixels, f"data.paths=[{digits / 'train'}]", f"monitor.vae={other}"
    )
    assert "'monitor.vae'" in line and "the data are pixels" in line
