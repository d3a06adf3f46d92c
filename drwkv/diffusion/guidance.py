"""Classifier-free guidance (arXiv 2207.12598), limited to an interval of noise levels (arXiv 2404.07724).

Here: turning a conditional model into the `denoise(x_t, t)` of the samplers. Not here: the samplers, the
models, label drop in training (the trainer draws it).

Shapes: B batch, C channels of x, D channels of the output (2C with a learned variance, else C), H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drwkv.diffusion.samplers import Denoise


@dataclass
class Guidance:
    """Settings of guidance; checked when made. Scale 1 is the plain conditional model."""

    scale: float = 1.0  # s in eps_uncond + s (eps_cond - eps_uncond); 1 = off, 0 = unconditional
    channels: int | None = 3  # leading channels of eps to guide (3: the paper's lineage); None = all
    interval: list[float] = field(default_factory=lambda: [0.0, 1000.0])  # [t_low, t_high] of 0..999, ends in

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale={self.scale}: give a finite number, 1 for none")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels={self.channels}: give at least 1, or null for all")
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance interval={list(self.interval)}: give [t_low, t_high] in order")


def guided(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    y: Tensor | None,
    null_label: int | None,
    guidance: Guidance,
) -> Denoise:
    """The guided `denoise(x_t, t)` of `model(x, t, y)`: labels y (B,) int64, `null_label` = "no label".

    Rows inside the interval run conditional and unconditional in one batched pass, conditional rows first.
    At scale 1, or outside the interval, only the conditional half runs. A learned variance stays the
    conditional one. With y None (an unconditional model) guidance must be off; else ValueError. Deciding
    reads t on the host, once a step.
    """
    if y is None:
        if guidance.scale != 1:
            raise ValueError(f"guidance scale={guidance.scale} without labels: set scale=1")
        return lambda x_t, t: model(x_t, t, None)
    if guidance.scale != 1 and null_label is None:
        raise ValueError(f"guidance scale={guidance.scale} needs a model with a null label (num_classes set)")
    t_low, t_high = guidance.interval

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W), t (B,) -> guided model output (B, D, H, W)."""
        if guidance.scale == 1:
            return model(x_BCHW, t, y)
        inside = (t >= t_low) & (t <= t_high)
        rows = inside.nonzero().squeeze(1)
        if len(rows) == 0:
            return model(x_BCHW, t, y)
        assert null_label is not None
        everywhere = len(rows) == len(t)  # the usual case: all rows share one t
        x_more, t_more = (x_BCHW, t) if everywhere else (x_BCHW[rows], t[rows])
        y_more = torch.full_like(t_more, null_label, dtype=y.dtype)
        both = model(torch.cat([x_BCHW, x_more]), torch.cat([t, t_more]), torch.cat([y, y_more]))
        cond, uncond = both[: len(t)], both[len(t) :]
        if everywhere:
            return guide(cond, uncond, guidance.scale, guided_channels(guidance, x_BCHW))
        out = cond.clone()
        out[rows] = guide(cond[rows], uncond, guidance.scale, guided_channels(guidance, x_BCHW))
        return out

    return denoise


def guided_channels(guidance: Guidance, x_BCHW: Tensor) -> int:
    """How many leading channels of eps are guided: never more than eps has, so that v stays conditional."""
    channels = x_BCHW.shape[1]
    return channels if guidance.channels is None else min(guidance.channels, channels)


def guide(cond_BDHW: Tensor, uncond_BDHW: Tensor, scale: float, channels: int) -> Tensor:
    """eps_uncond + scale (eps_cond - eps_uncond) in the first `channels`; the rest is conditional.

    CFG eq. 6, whose w is scale - 1.
    """
    eps_cond, eps_uncond = cond_BDHW[:, :channels], uncond_BDHW[:, :channels]
    return torch.cat([eps_uncond + scale * (eps_cond - eps_uncond), cond_BDHW[:, channels:]], dim=1)
