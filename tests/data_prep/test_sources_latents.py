"""Latents in the layouts of DiT's and LightningDiT's scripts, written by numpy and by safetensors itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import assert_refused
from safetensors.torch import save_file

from data_prep.sources import BadSampleError, StoredLatents, open_source
from drwkv.latents import sample_posterior

SCALE = 0.18215


def write_dit(root: Path, latents: list[np.ndarray], labels: list[list[int]] | None = None) -> None:
    """imagenet256_features/N.npy and, with `labels`, imagenet256_labels/N.npy."""
    for folder, arrays in (("features", latents), ("labels", labels or [])):
        for i, array in enumerate(arrays):
            (root / f"imagenet256_{folder}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"imagenet256_{folder}/{i}.npy", np.asarray(array))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_scaled_samples_become_moments_from_which_the_trainer_draws_them_again(tmp_path):
    stored = [normal(1, 4, 4, 6, seed=i) for i in range(12)]
    write_dit(tmp_path, stored, [[i % 5] for i in range(12)])
    source = open_source(str(tmp_path), latents=StoredLatents(scale=SCALE))
    assert source.kind == "moments" and not source.has_flip
    assert source.labels.tolist() == [i % 5 for i in range(12)] and source.class_names == list("01234")
    assert list(source.names) == [f"imagenet256_features/{i}.npy" for i in range(12)]  # 2 before 10
    for item, array in zip(source.items, stored, strict=True):
        moments = item.load_latents()
        assert moments.dtype == np.float16 and moments.shape == (8, 4, 6)
        drawn = sample_posterior(
            torch.from_numpy(moments)[None], torch.randn(1, 4, 4, 6), scale=SCALE, shift=0.0
        )
        np.testing.assert_allclose(drawn.numpy(), array, rtol=2e-3, atol=2e-3)
    with pytest.raises(TypeError, match="holds latents, not an image"):
        source.items[0].load()


def test_moments_are_repacked_as_they_are_and_files_may_hold_batches(tmp_path):
    stored = [normal(3, 8, 4, 4), normal(8, 4, 4, seed=1), normal(1, 8, 4, 4, seed=2)]
    write_dit(tmp_path, stored)
    source = open_source(str(tmp_path))
    assert source.class_names == [] and len(source.items) == 5
    assert list(source.names)[:3] == [f"imagenet256_features/0.npy#{i}" for i in range(3)]
    assert source.names[4] == "imagenet256_features/2.npy"
    expected = np.concatenate([stored[0], stored[1][None], stored[2]]).astype(np.float16)
    np.testing.assert_array_equal(np.stack([item.load_latents() for item in source.items]), expected)


def test_what_the_numbers_are_is_asked_where_the_files_do_not_say(tmp_path):
    write_dit(tmp_path / "four", [normal(1, 4, 4, 4)])
    assert_refused(tmp_path / "four", "give that scale as latents.scale, latents.scale=0.18215 for")
    assert_refused(
        tmp_path / "four", "latents.scale is 0.0, give more than 0", latents=StoredLatents(scale=0.0)
    )
    assert_refused(tmp_path / "four#train", "holds no train split", latents=StoredLatents(scale=1.0))
    write_dit(tmp_path / "many", [normal(1, 32, 4, 4)])
    assert_refused(
        tmp_path / "many", "32 channels may be samples or moments (form 'auto'); say which, latents.form="
    )
    assert_refused(
        tmp_path / "many", "moments are of unscaled latents", latents=StoredLatents(form="moments", scale=0.3)
    )
    source = open_source(str(tmp_path / "many"), latents=StoredLatents(form="moments"))
    np.testing.assert_array_equal(source.items[0].load_latents(), normal(32, 4, 4).astype(np.float16))
    source = open_source(str(tmp_path / "many"), latents=StoredLatents(form="sampled", scale=2.0, shift=0.5))
    np.testing.assert_array_equal(
        source.items[0].load_latents()[:32], (normal(32, 4, 4) / 2 + 0.5).astype(np.float16)
    )
    write_dit(tmp_path / "flat", [normal(4, 4)])
    assert_refused(tmp_path / "flat", "has shape (4, 4), expected (B, C, h, w) or (C, h, w)")


@pytest.mark.parametrize("top", ["", "train/"])
def test_class_folders_of_latents_are_labels_as_those_of_images_are(tmp_path, top):
    for name, seed in (("b/0", 0), ("a/10", 1), ("a/2", 2)):
        (tmp_path / top / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / top / f"{name}.npy", normal(2, 8, 4, 4, seed=seed))
    source = open_source(str(tmp_path))
    assert [name.removeprefix(top) for name in source.names] == [
        f"{name}.npy#{row}" for name in ("a/2", "a/10", "b/0") for row in (0, 1)
    ]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1] and source.class_names == ["a", "b"]
    np.testing.assert_array_equal(
        source.items[3].load_latents(), normal(2, 8, 4, 4, seed=1)[1].astype(np.float16)
    )
    np.save(tmp_path / top / "0.npy", normal(2, 8, 4, 4))
    assert_refused(tmp_path, "holds .npy files beside folders of .npy files")


def test_bad_files_of_latents_are_named(tmp_path):
    latents = [normal(1, 8, 4, 4) for _ in range(4)]
    latents[1][0, 0, 0, 0] = np.nan
    latents[2] = normal(1, 8, 4, 5)
    latents[3] *= 1e5
    write_dit(tmp_path, latents, [[0]] * 4)
    items = open_source(str(tmp_path)).items
    for i, message in (
        (1, "not finite"),
        (2, r"has shape \(8, 4, 5\), the first"),
        (3, "not finite in float16"),
    ):
        with pytest.raises(BadSampleError, match=f"^imagenet256_features/{i}.npy: .*{message}"):
            items[i].load_latents()
    file = tmp_path / "imagenet256_features/0.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BadSampleError, match="^imagenet256_features/0.npy: cannot be read"):
        items[0].load_latents()
    file.write_bytes(b"junk")
    assert_refused(tmp_path, "imagenet256_features/0.npy: not a .npy file")
    np.save(tmp_path / "imagenet256_labels/2.npy", np.array([0.5]))
    np.save(file, latents[0])
    assert_refused(tmp_path, "imagenet256_labels/2.npy: holds float64 (1,), expected integers")
    (tmp_path / "imagenet256_labels/2.npy").unlink()
    assert_refused(tmp_path, "imagenet256_features/2.npy: has no labels, imagenet256_labels/2.npy is missing")


def write_lightningdit(
    root: Path, counts: tuple[int, ...] = (5, 3), channels: int = 4, **dtype: object
) -> torch.Tensor:
    """Shards of latents, latents_flip and labels; returns (N, 2, C, h, w): each latent and its mirror's."""
    root.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(sum(counts), 2, channels, 4, 4, generator=generator).to(dtype.get("dtype", torch.float32))
    first = 0
    for i, count in enumerate(counts):
        part = z[first : first + count]
        tensors = {"latents": part[:, 0].contiguous(), "latents_flip": part[:, 1].contiguous()}
        tensors["labels"] = torch.arange(first, first + count) % 3
        save_file(tensors, root / f"latents_rank00_shard{i:03d}.safetensors", metadata={"x": "y"})
        first += count
    (root / "latents_stats.pt").write_bytes(b"of no use here")
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lightningdits_shards_give_both_mirrors_unscaled(tmp_path, dtype):
    z = write_lightningdit(tmp_path, dtype=dtype)
    source = open_source(str(tmp_path))
    assert source.has_flip and source.kind == "moments"
    assert source.labels.tolist() == [i % 3 for i in range(8)] and source.class_names == ["0", "1", "2"]
    assert source.names[5] == "latents_rank00_shard001.safetensors#0"
    for item, pair in zip(source.items, z, strict=True):
        for flip in (False, True):
            moments = item.load_latents(flip=flip)
            assert moments.dtype == np.float16 and (moments[4:] == -30).all()
            np.testing.assert_array_equal(moments[:4], pair[int(flip)].to(torch.float16).numpy())


def test_lightningdits_shards_may_hold_moments_and_lack_mirrors_and_labels(tmp_path):
    z = torch.randn(3, 32, 4, 4)
    save_file({"latents": z}, tmp_path / "a.safetensors")
    source = open_source(str(tmp_path), latents=StoredLatents(form="moments"))
    assert not source.has_flip and source.class_names == []
    np.testing.assert_array_equal(source.items[2].load_latents(), z[2].half().numpy())


def test_shards_that_are_broken_or_do_not_fit_are_refused(tmp_path):
    write_lightningdit(tmp_path)
    shard = tmp_path / "latents_rank00_shard001.safetensors"
    data, source = shard.read_bytes(), open_source(str(tmp_path))
    shard.write_bytes(data[:-100])
    with pytest.raises(BadSampleError, match="^latents_rank00_shard001.safetensors#2: is cut short"):
        source.items[7].load_latents(flip=True)
    assert_refused(tmp_path, "shard001.safetensors: not a whole safetensors file (it is cut short)")
    shard.write_bytes(b"\xff" * 100)
    assert_refused(
        tmp_path, "shard001.safetensors: not a whole safetensors file (its header is longer than the file)"
    )
    save_file({"latents": torch.zeros(2, 4, 4, 4), "labels": torch.zeros(2, dtype=torch.int64)}, shard)
    assert_refused(
        tmp_path,
        "shard001.safetensors: holds ['labels', 'latents'], expected ['labels', 'latents', 'latents_flip']",
    )
    save_file({f"layers.{i}.weight": torch.zeros(1) for i in range(300)}, tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", "'layers.10.weight'] and 297 more, expected latents")
    (tmp_path / "model.safetensors").unlink()
    both = torch.zeros(2, 4, 4, 5)
    save_file(
        {"latents": both, "latents_flip": both.clone(), "labels": torch.zeros(2, dtype=torch.int64)}, shard
    )
    assert_refused(tmp_path, "latents are F32 [2, 4, 4, 5], expected [2, 4, 4, 4]")
    both = torch.zeros(2, 4, 4, 4)
    save_file(
        {"latents": both, "latents_flip": both.clone(), "labels": torch.zeros(3, dtype=torch.int64)}, shard
    )
    assert_refused(tmp_path, "labels are I64 [3], expected I64 [2]")
