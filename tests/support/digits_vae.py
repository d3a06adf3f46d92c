"""The latent road on real data, small: digits as PNG files of 32x32, and an AutoencoderKL trained on them.

One latent channel of 8x8, as many numbers as the digits have before they are made large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from data_prep.digits import load_images, split

SIDE, BATCH, KL_WEIGHT = 32, 32, 1e-3


def write_digit_trees(root: Path) -> tuple[Path, Path]:
    """`root`/train and `root`/test, each a folder of class folders of RGB PNGs. Returns both."""
    images, labels = load_images()
    parts = dict(zip(("train", "test"), split(labels, test_fraction=0.2, seed=0), strict=True))
    for name, positions in parts.items():
        for i in positions.tolist():
            folder = root / name / str(labels[i])
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(images[i, 0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.convert("RGB").save(folder / f"{i:04d}.png")
    return root / "train", root / "test"


def train_vae(tree: Path, out: Path, *, steps: int, seed: int = 0) -> Path:
    """Train on the PNGs of `tree`, save to `out`; scale and shift in its config give latents mean 0 and deviation 1."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(tree.rglob("*.png"))])
    x_all = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=1,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = x_all[torch.randint(len(x_all), (BATCH,))]
        posterior = vae.encode(x).latent_dist
        loss = (
            F.mse_loss(vae.decode(posterior.sample()).sample, x) + KL_WEIGHT * posterior.kl().mean() / SIDE**2
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = vae.encode(x_all[:512]).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    vae.save_pretrained(out)
    return out
