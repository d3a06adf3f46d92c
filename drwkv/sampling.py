"""Images by their number: image i of a sample set is a function of (seed, i), whatever process draws it.

Here: the settings of sampling and drawing one micro-batch. The loops over steps are in diffusion/samplers.py, the work
of a whole set in sample_dist.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from drwkv import rng
from drwkv.diffusion import samplers
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.diffusion.guidance import Guidance, guided


@dataclass
class SamplerConfig:
    """How noise becomes an image."""

    name: Literal["ddpm", "ddim"] = "ddpm"  # ddpm: ancestral, as in the paper; ddim: deterministic
    steps: int = 250  # model evaluations an image, guidance's second half not counted
    clip_denoised: bool = False  # clamp the predicted x_0 to [-1, 1]: for pixels, not for latents
    guidance: Guidance = field(default_factory=Guidance)


def check_sampler(config: SamplerConfig, num_timesteps: int, num_classes: int | None) -> None:
    """ValueError, before anything is drawn, for steps that the sampler has not or guidance that the model cannot."""
    visited = {"ddpm": samplers.even_timesteps, "ddim": samplers.strided_timesteps}[config.name]
    visited(num_timesteps, config.steps)
    labels = None if num_classes is None else torch.zeros(1, dtype=torch.int64)
    guided(lambda x, t, y: x, labels, num_classes, config.guidance)


def labels_of(ids: Tensor, num_classes: int | None) -> Tensor | None:
    """Label of image i: i mod num_classes, so that every prefix is balanced to one image. ids (B,) -> (B,) int64."""
    return None if num_classes is None else ids % num_classes


@torch.no_grad()
def draw(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    process: GaussianProcess,
    config: SamplerConfig,
    *,
    ids: Tensor,
    labels: Tensor | None,
    num_classes: int | None,
    shape: tuple[int, int, int],
    seed: int,
) -> Tensor:
    """x_0 of the images `ids` (B,) int64, with `labels` (B,) int64 or None -> (B, *shape) float32.

    The rows are independent, but small matmuls round by their shape: the same bytes need the same B and threads.
    """
    denoise = guided(model, labels, num_classes, config.guidance)
    x_T = rng.normal(seed, rng.Purpose.SAMPLE_NOISE, ids, shape)
    return {"ddpm": samplers.ddpm, "ddim": samplers.ddim}[config.name](
        process,
        denoise,
        x_T,
        lambda s: rng.normal(seed, rng.Purpose.SAMPLE_STEP, ids, shape, step=s),
        steps=config.steps,
        clip_denoised=config.clip_denoised,
    )
