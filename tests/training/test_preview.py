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
from drwkv.data.manifest import Manifest, read_manifest
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.latents import hash_weights, load_vae, vae_scaling
from drwkv.parallel import session
from drwkv.training.preview import Preview

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


def drawn(applications: Applications, latents: Path, vae: Path, folder: Path, world_size: int) -> np.ndarray:
    """The grid after one step on so many ranks."""
    run = [*LATENT, f"run.folder={folder}", f"data.paths=[{latents}]", f"monitor.vae={vae}"]
    applications.run("train_dist.py", *run, world_size=world_size)
    return grid_of(folder).astype(int)


def test_latents_are_shown_as_the_pictures_that_they_stand_for(
    applications: Applications, latents: Path, vae: Path, tmp_path: Path
) -> None:
    grid = drawn(applications, latents, vae, tmp_path, world_size=2)
    assert grid.shape[0] >= 10 * 32 and grid.shape[1] >= 2 * 32  # ten classes, two of each
    assert grid.std() > 1 and not np.array_equal(grid[..., 0], grid[..., 1])  # in colour


@pytest.mark.proof
def test_the_pictures_are_the_same_on_any_number_of_ranks(
    applications: Applications, latents: Path, vae: Path, tmp_path: Path
) -> None:
    grids = [drawn(applications, latents, vae, tmp_path / str(size), world_size=size) for size in (1, 3)]
    assert np.abs(grids[0] - grids[1]).max() <= 1  # the last bit of a forward of another shape


def test_a_vae_that_is_missing_wrong_or_not_needed_is_named(
    latents: Path, digits: Path, tmp_path: Path
) -> None:
    config = load(TrainConfig, LATENT)
    with pytest.raises(ValueError, match="'monitor.grid_every_steps'.*give monitor.vae=FOLDER"):
        check_train(config)
    other = save_small_vae(tmp_path / "other", seed=1)
    config.monitor.vae = str(other)
    check_train(config)
    for path, words in [
        (latents, f"VAE {other}: its weights have sha256"),
        (digits / "train", "'monitor.vae' is .* the data are pixels"),
    ]:
        with session() as world, pytest.raises(ValueError, match=words):
            Preview(
                GaussianProcess(), config.monitor, config.model, read_manifest(str(path)), seed=0, world=world
            )
