"""A small AutoencoderKL with random weights, saved as diffusers saves one: for tests of what goes through a VAE."""

from __future__ import annotations

from pathlib import Path

import torch


def save_small_vae(folder: Path, *, seed: int = 0, scale: float = 0.18215, num_levels: int = 3) -> Path:
    """`num_levels` resolutions, so one latent pixel is of 2**(num_levels - 1); 4 latent channels. Returns `folder`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(16,) * num_levels,
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            norm_num_groups=8,
            latent_channels=4,
            scaling_factor=scale,
        )
    vae.save_pretrained(folder)
    return folder
