"""Pixels and latents between disk and model: the exact maps, and a real small AutoencoderKL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drwkv import latents


def test_every_pixel_value_survives_decoding_and_encoding():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    decoded = latents.decode_pixels(x)
    assert decoded.dtype == torch.float32 and decoded.min() == -1.0 and decoded.max() == 1.0
    torch.testing.assert_close(latents.encode_pixels(decoded), x, rtol=0, atol=0)


def test_encoding_follows_adm_clamp_of_127_5_x_plus_128():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0]).reshape(1, 1, 2, 4)
    expected = torch.tensor([0, 0, 64, 128, 191, 255, 255, 255], dtype=torch.uint8)
    torch.testing.assert_close(latents.encode_pixels(x).flatten(), expected, rtol=0, atol=0)
    assert latents.encode_pixels(torch.tensor([[[[float("inf")]]]])).item() == 255


def test_posterior_is_mean_plus_std_times_noise_shifted_then_scaled():
    mean, log_variance, eps = torch.randn(3, 5, 4, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    moments = torch.cat([mean, log_variance], dim=1)
    z = latents.sample_posterior(moments.half(), eps, scale=0.13, shift=0.7)
    halves = moments.half().double()
    expected = (halves[:, :4] + (0.5 * halves[:, 4:]).exp() * eps.double() - 0.7) * 0.13
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, expected.float(), rtol=1e-6, atol=1e-7)
    assert latents.sample_posterior(
        torch.full((1, 2, 1, 1), -1e4), eps[:1, :1, :1, :1], scale=1.0, shift=0.0
    ).isfinite()
    with pytest.raises(ValueError, match="8 channels need noise of 4, got 3"):
        latents.sample_posterior(moments, eps[:, :3], scale=1.0, shift=0.0)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def test_scale_and_shift_come_from_the_vaes_own_config(vae_folder):
    vae = latents.load_vae(str(vae_folder))
    assert latents.vae_scaling(vae) == (0.13025, 0.25)
    vae.register_to_config(shift_factor=None)
    assert latents.vae_scaling(vae) == (0.13025, 0.0)


def test_decoding_undoes_scale_and_shift_before_the_vae(vae_folder):
    vae = latents.load_vae(str(vae_folder))
    moments = vae.encode(torch.rand(2, 3, 16, 24) * 2 - 1).latent_dist.parameters
    mean = moments.chunk(2, dim=1)[0]
    z = latents.sample_posterior(moments, torch.zeros_like(mean), scale=0.13, shift=0.5)
    images = latents.decode_latents(vae, z, scale=0.13, shift=0.5)
    assert images.shape == (2, 3, 16, 24) and images.dtype == torch.float32 and not images.requires_grad
    torch.testing.assert_close(images, vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_weight_hash_tells_any_changed_weight(vae_folder):
    vae, again = latents.load_vae(str(vae_folder)), latents.load_vae(str(vae_folder))
    assert latents.hash_weights(vae) == latents.hash_weights(again)
    next(again.parameters()).flatten()[3] += 1e-7
    assert latents.hash_weights(vae) != latents.hash_weights(again)


def test_a_vae_that_cannot_be_loaded_is_named_in_one_line(tmp_path, vae_folder):
    for path in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            latents.load_vae(path)
        assert path in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="float16 overflows"):
        latents.load_vae(str(vae_folder), dtype=torch.float16)


def test_another_vae_than_the_one_that_made_the_latents_is_refused(vae_folder):
    vae = latents.load_vae(str(vae_folder))
    right = latents.hash_weights(vae)
    latents.check_weights(vae, right, path="vae", where="runs/x")
    with pytest.raises(
        ValueError, match="VAE other: its weights have sha256 .* latents of runs/x .* give vae=FOLDER"
    ):
        latents.check_weights(vae, "0" * 64, path="other", where="runs/x")
