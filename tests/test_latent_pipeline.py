"""The latent road end to end: images and a trained VAE to latents, a model, samples, pictures and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from digits_vae import train_vae, write_digit_trees
from PIL import Image

from drwkv.data.manifest import read_manifest
from drwkv.data.shards import ShardSet
from drwkv.evaluation.protocol import LabelledImages, evaluate
from drwkv.evaluation.sample_set import SampleSet
from drwkv.latents import load_vae, vae_scaling


def small_gray(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 32, 32, 3) -> (N, 8, 8, 1), the size at which the digits are measured."""
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(i).convert("L").resize((8, 8), box)) for i in images])[
        ..., None
    ]


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_digits_are_learnt_as_latents_of_a_trained_vae(tmp_path: Path, applications) -> None:
    trees = write_digit_trees(tmp_path / "digits")
    vae = train_vae(trees[0], tmp_path / "vae", steps=1000)

    # Encode the training digits as latents, and both splits as pixels to measure against.
    latents, run, out = tmp_path / "latents", tmp_path / "run", tmp_path / "samples"
    encode = ["-m", "data_prep.encode", "resolution=32", "flip=false", "samples_per_shard=256", "workers=1"]
    applications.run(*encode, f"source={trees[0]}", f"vae={vae}", f"out={latents}")
    manifest = read_manifest(latents)
    assert manifest.sample_shape == (2, 8, 8) and manifest.num_classes == 10
    assert (manifest.scale, manifest.shift) == vae_scaling(load_vae(str(vae)))
    for tree in trees:
        applications.run(*encode, f"source={tree}", f"out={tmp_path / 'pixels' / tree.name}", "kind=pixels")

    # Train and sample.
    config = ["--config", "configs/digits.yaml", f"run.folder={run}", f"data.paths=[{latents}]"]
    training = ["monitor.grid_every_steps=0", "run.total_steps=1500"]
    applications.run("train_dist.py", *config, *training, world_size=2, timeout_sec=1000)
    sampling = ["--config", "configs/digits_sample.yaml", f"checkpoint={run}", f"out={out}"]
    applications.run(
        "sample_dist.py", *sampling, "sampler.clip_denoised=false", world_size=2, timeout_sec=1000
    )

    # Measure.
    real = []
    for tree in trees:
        pixels = ShardSet.open(tmp_path / "pixels" / tree.name)
        x, y = pixels.read(np.arange(pixels.num_samples))
        real.append(LabelledImages(small_gray(np.ascontiguousarray(x.transpose(0, 2, 3, 1))), y))
    images, labels = SampleSet(out, num_samples=1000, chunk=100).first(1000)
    found = evaluate(LabelledImages(small_gray(images), labels), *real).metrics
    print({name: (round(m.value, 3), round(m.floor, 3)) for name, m in found.items()}, out / "grid.png")
    assert found["class_agreement"].value >= 0.9
    assert found["precision"].value >= 0.7
    assert found["recall"].value >= 0.6
    assert found["identical_images"].value == 0
