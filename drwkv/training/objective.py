"""From a batch to its loss: everything random about a sample is drawn here, from (seed, n) alone.

The maths of the loss is drwkv.diffusion's, the random numbers are rng.py's, the samples come from drwkv.data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from drwkv import latents, rng
from drwkv.data.loader import Batch
from drwkv.data.manifest import Manifest
from drwkv.diffusion.gaussian import GaussianProcess

# Steps of rng.Purpose.VALIDATION; validation.py has the one below.
HELD_OUT_POSTERIOR, HELD_OUT_NOISE = 2, 3


@dataclass
class ObjectiveConfig:
    """How much each timestep, and the learned variance, count in the loss."""

    # What weighs a timestep's squared error; min_snr: min(SNR, gamma) / SNR
    weight: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = 5.0  # the gamma of min_snr, above 0: errors at SNRs above it count less
    vlb_weight: float = 1.0  # of the learned variance's term; 1: the bound counts 1/T; 0: v is not trained


@dataclass(frozen=True)
class Inputs:
    """What one micro-batch of B samples asks of the model."""

    x0: Tensor  # (B, C, H, W) clean pixels in [-1, 1] or scaled latents
    x_t: Tensor  # (B, C, H, W) noised to t
    t: Tensor  # (B,) int64 timesteps
    eps: Tensor  # (B, C, H, W) standard normal
    y: Tensor | None  # (B,) int64 labels, num_classes where dropped; None without classes
    # (L, B) stochastic depth: 0 or 1 / keep probability; None if no block is ever dropped
    keep: Tensor | None


def check_variance(model: nn.Module, process: GaussianProcess) -> None:
    """ValueError if the one gives a variance and the other does not expect it."""
    if model.learn_variance != process.learn_variance:
        raise ValueError(
            f"config key 'diffusion.learn_variance' is {process.learn_variance}, and model.options.learn_variance "
            f"is {model.learn_variance}: set both alike"
        )


class Objective:
    """Draws the inputs of a batch and computes its per-sample losses."""

    def __init__(
        self,
        process: GaussianProcess,
        model: nn.Module,
        manifest: Manifest,
        config: ObjectiveConfig,
        *,
        seed: int,
        label_drop: float,
        device: torch.device,
    ) -> None:
        self._process, self._seed, self._label_drop, self._device = process, seed, label_drop, device
        self._min_snr_gamma = config.min_snr_gamma if config.weight == "min_snr" else None
        self._vlb_weight = config.vlb_weight
        self._num_classes: int | None = model.num_classes  # type: ignore[assignment]
        self._scale, self._shift = manifest.scale, manifest.shift
        rates = torch.tensor(model.drop_path_rates, dtype=torch.float32, device=device)
        self._keep_probability = (1.0 - rates)[:, None] if bool((rates > 0).any()) else None

    def inputs(self, batch: Batch) -> Inputs:
        """Clean samples, timesteps, noise, labels and keep masks of `batch`, on the device."""
        n = batch.n.to(self._device, non_blocking=True)
        x0 = self._clean(batch, lambda shape: rng.normal(self._seed, rng.Purpose.POSTERIOR, n, shape))
        t = rng.integers(self._seed, rng.Purpose.TIMESTEP, n, self._process.num_timesteps)
        eps = rng.normal(self._seed, rng.Purpose.NOISE, n, x0.shape[1:])
        x_t = self._process.q_sample(x0, t, eps)
        return Inputs(x0, x_t, t, eps, self._labels(batch, n), self._keep(n))

    def held_out_inputs(self, batch: Batch, t: Tensor, *, seed: int) -> Inputs:
        """Inputs of samples that are measured, not trained on, at timesteps t (B,): no label or block is dropped.

        Their noise is a function of (seed, n) under a purpose of its own, so that none of it is trained on either.
        """
        n, t = batch.n.to(self._device, non_blocking=True), t.to(self._device, non_blocking=True)
        draw = partial(rng.normal, seed, rng.Purpose.VALIDATION, n)
        x0 = self._clean(batch, partial(draw, step=HELD_OUT_POSTERIOR))
        eps = draw(x0.shape[1:], step=HELD_OUT_NOISE)
        y = None if self._num_classes is None else batch.y.to(self._device, non_blocking=True)
        return Inputs(x0, self._process.q_sample(x0, t, eps), t, eps, y, None)

    def losses(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Per-sample losses (B,) float32 of `model` on `inputs`."""
        return self.terms(model, inputs)["loss"]

    def terms(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """The losses and what they are made of: {loss, mse, vb}, each (B,) float32."""
        out = model(inputs.x_t, inputs.t, inputs.y, keep=inputs.keep)
        return self._process.losses(
            out, inputs.x0, inputs.x_t, inputs.t, inputs.eps,
            min_snr_gamma=self._min_snr_gamma, vlb_weight=self._vlb_weight,
        )  # fmt: skip

    def _clean(self, batch: Batch, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Clean samples on the device; `draw` gives the posterior's noise of a shape, where there is one."""
        x = batch.x.to(self._device, non_blocking=True)
        if self._scale is None or self._shift is None:
            return latents.decode_pixels(x)
        eps = draw((x.shape[1] // 2, *x.shape[2:]))
        return latents.sample_posterior(x, eps, scale=self._scale, shift=self._shift)

    def _labels(self, batch: Batch, n: Tensor) -> Tensor | None:
        if self._num_classes is None:
            return None
        y = batch.y.to(self._device, non_blocking=True)
        dropped = rng.uniform(self._seed, rng.Purpose.LABEL_DROP, n, 1)[:, 0] < self._label_drop
        return torch.where(dropped, self._num_classes, y)

    def _keep(self, n: Tensor) -> Tensor | None:
        if self._keep_probability is None:
            return None
        num_blocks = len(self._keep_probability)
        u_LB = rng.uniform(self._seed, rng.Purpose.STOCHASTIC_DEPTH, n, num_blocks).T
        return (u_LB < self._keep_probability) / self._keep_probability
