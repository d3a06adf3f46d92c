"""How fast this machine encodes: images a second through decoding, VAE and writing, and how busy that keeps a GPU.

    python -m data_prep.bench_encode [--device cuda] [--resolutions 256 512] [--images N] [--workers N]

The VAE has the size of Stable Diffusion's (83.7 M parameters) and random weights, the images are JPEGs of noise of
about ImageNet's size. Busy is the time in which some kernel ran, by torch's profiler, over the time of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from data_prep.encode import EncodeConfig, encode
from drwkv import command

SIDES = (375, 500)  # of the median image of ImageNet, in pixels
NUM_DIFFERENT = 64  # images that are really different; the rest are copies


def save_sd_size_vae(folder: Path) -> None:
    """An AutoencoderKL of the size of Stable Diffusion's, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder)


def write_images(folder: Path, num_images: int) -> None:
    """JPEGs of smooth noise, in one class."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    height, width = SIDES
    files = []
    for _ in range(min(NUM_DIFFERENT, num_images)):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=92
        )
        files.append(file.getvalue())
    for i in range(num_images):
        (folder / f"{i:06d}.jpg").write_bytes(files[i % len(files)])


def measure(folder: Path, resolution: int, options: argparse.Namespace, dtype: str) -> str:
    """One row of the table: resolution, images a second, share of the time in which the GPU was busy."""
    config = EncodeConfig(
        source=str(folder / "images"),
        vae=str(folder / "vae"),
        out=str(folder / f"warm-{resolution}"),
        resolution=resolution,
        samples_per_shard=256,
        batch=options.batch,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        workers=options.workers,
        device=options.device,
        limit=2 * options.batch,
    )
    encode(config)
    profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
    on_gpu = options.device.startswith("cuda")
    with profiler if on_gpu else nullcontext():
        begin = time.monotonic()
        encode(dataclasses.replace(config, out=str(folder / f"set-{resolution}"), limit=None))
        wall_sec = time.monotonic() - begin
    busy = f"{100 * _busy_sec(profiler) / wall_sec:.0f} %" if on_gpu else "-"
    speed = options.images / wall_sec
    return f"| {resolution} | {dtype} | {options.batch} | {options.workers} | {speed:.1f} | {busy} |"


def _busy_sec(profiler: profile) -> float:
    """Seconds in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy * 1e-6


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.bench_encode", description="measure encoding")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--images", type=int, default=None, help="default: 8,192 on a GPU, 16 on a CPU")
    parser.add_argument("--batch", type=int, default=None, help="default: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--workers", type=int, default=None, help="default: 14 on a GPU, 1 on a CPU")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    options.images = options.images or (8192 if on_gpu else 16)
    options.batch = options.batch or (64 if on_gpu else 4)
    options.workers = (14 if on_gpu else 1) if options.workers is None else options.workers
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"encoding with the mirror image too, VAE of Stable Diffusion's size, {name}\n")
    print("| px | dtype | batch | decoding processes | images/s | GPU busy |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", options.images)
        save_sd_size_vae(Path(folder) / "vae")
        for resolution in options.resolutions:
            print(measure(Path(folder), resolution, options, "bfloat16" if on_gpu else "float32"), flush=True)


if __name__ == "__main__":
    command.run(main)
