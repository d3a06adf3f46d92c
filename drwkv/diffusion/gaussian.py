"""The Gaussian diffusion process: its tables, the forward process, the losses and one reverse step.

Here: everything that is a function of the beta schedule (DDPM, Ho et al. 2020, arXiv 2006.11239; Improved
DDPM, Nichol and Dhariwal 2021, arXiv 2102.09672; Min-SNR, Hang et al. 2023, arXiv 2303.09556). Not here:
loops over steps (samplers.py), classifier-free guidance (guidance.py), random numbers (the caller hands in
eps and noise), the network (drwkv.models).

Shapes: B batch, C channels of x, D channels of the model's output (2C with a learned variance, else C), H, W.
Names: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; v is the model's variance output, in [-1, 1]
by training though not by construction; t is an original timestep, i a step of this (perhaps respaced)
process. Tables are computed in float64 and used in the tensor's dtype; anything narrower than float32 (a bf16
model output) is widened to float32 first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PIXEL_STEP = 1 / 127.5  # the distance of neighbouring uint8 levels once mapped to [-1, 1]


@dataclass
class GaussianConfig:
    """Settings of the process; `GaussianProcess(**vars(config))` builds it."""

    num_timesteps: int = 1000  # steps of the forward process, at least 2
    beta_start: float = 1e-4  # first beta of the linear schedule
    beta_end: float = 2e-2  # last beta of the linear schedule
    learn_variance: bool = True  # the model gives eps and v (2C channels); False: eps alone (C channels)
    fixed_variance: Literal["small", "large"] = "small"  # reverse variance if not learned: posterior, or beta


class GaussianProcess:
    """The process over `num_timesteps` steps with linear betas and epsilon-prediction.

    Without a learned variance the reverse variance is fixed (DDPM section 3.2): "small" is the posterior
    variance beta_tilde_t, the default because it stays right with few sampling steps; "large" is beta_t,
    which wins at the full 1000 steps only (DDIM, arXiv 2010.02502, table 1).

    Example: `process = GaussianProcess(); x_t = process.q_sample(x0, t, eps);`
    `loss = process.losses(model(x_t, t, y), x0, x_t, t, eps)["loss"].mean()`
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        learn_variance: bool = True,
        fixed_variance: Literal["small", "large"] = "small",
    ) -> None:
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps={num_timesteps}: a diffusion process needs at least 2 steps")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: need 0 < start <= end < 1")
        if fixed_variance not in ("small", "large"):
            raise ValueError(f"fixed_variance={fixed_variance!r}: choose 'small' or 'large'")
        self.learn_variance = learn_variance
        self.fixed_variance = fixed_variance
        self._set(np.linspace(beta_start, beta_end, num_timesteps), list(range(num_timesteps)))

    def _set(self, betas: np.ndarray, timesteps: list[int]) -> None:
        self.timesteps = timesteps  # timesteps[i] is what the model is told at step i
        self.num_timesteps = len(timesteps)
        self.tables = schedule_tables(betas)
        self._on_device: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def respaced(self, timesteps: Sequence[int]) -> GaussianProcess:
        """The process that visits only `timesteps` (ascending steps of this one), with this one's alpha_bar.

        Its own steps are 0..len-1; `model_t` turns them into original timesteps. Improved DDPM eq. 19.
        """
        kept = list(timesteps)
        if not kept or any(b <= a for a, b in itertools.pairwise(kept)):
            raise ValueError(f"respaced timesteps must be ascending and not empty, got {kept[:8]}")
        if kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(f"respaced timesteps {kept[0]}..{kept[-1]} leave 0..{self.num_timesteps - 1}")
        alpha_bar = self.tables["alpha_bar"][kept]
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        process = object.__new__(GaussianProcess)
        process.learn_variance = self.learn_variance
        process.fixed_variance = self.fixed_variance
        process._set(betas, [self.timesteps[i] for i in kept])
        return process

    def model_t(self, i: Tensor) -> Tensor:
        """Steps i (B,) of this process -> the original timesteps (B,) int64, which the model is told."""
        return torch.as_tensor(self.timesteps, dtype=torch.int64, device=i.device)[i]

    def at(self, name: str, i: Tensor, like: Tensor) -> Tensor:
        """Table `name` at steps i (B,) as (B, 1, 1, ...), in the dtype of `like`, to broadcast against it."""
        key = (like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = {
                table: torch.from_numpy(values).to(dtype=like.dtype).to(like.device)
                for table, values in self.tables.items()
            }
        return self._on_device[key][name][i].view(-1, *[1] * (like.dim() - 1))

    # The forward process.

    def q_sample(self, x0_BCHW: Tensor, t: Tensor, eps_BCHW: Tensor) -> Tensor:
        """x_t for x_0, timesteps t (B,) and standard normal eps. DDPM eq. 4."""
        x0_BCHW, eps_BCHW = _wide(x0_BCHW), _wide(eps_BCHW)
        signal = self.at("sqrt_alpha_bar", t, x0_BCHW)
        return signal * x0_BCHW + self.at("sqrt_one_minus_alpha_bar", t, x0_BCHW) * eps_BCHW

    def q_posterior(self, x0_BCHW: Tensor, x_t_BCHW: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and clipped log-variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0). DDPM eq. 6, 7."""
        x_t = x_t_BCHW
        mean = self.at("posterior_x0", i, x_t) * x0_BCHW + self.at("posterior_x_t", i, x_t) * x_t
        return mean, self.at("log_posterior_variance", i, x_t)

    # The reverse process.

    def predict_x0(self, x_t_BCHW: Tensor, i: Tensor, eps_BCHW: Tensor) -> Tensor:
        """x_0 from x_t and eps. DDPM eq. 4 solved for x_0."""
        return (
            self.at("sqrt_recip_alpha_bar", i, x_t_BCHW) * x_t_BCHW
            - self.at("sqrt_recip_alpha_bar_minus_one", i, x_t_BCHW) * eps_BCHW
        )

    def predict_eps(self, x_t_BCHW: Tensor, i: Tensor, x0_BCHW: Tensor) -> Tensor:
        """eps from x_t and x_0, the inverse of `predict_x0`: needed once x_0 has been clipped."""
        noisy = self.at("sqrt_recip_alpha_bar", i, x_t_BCHW) * x_t_BCHW - x0_BCHW
        return noisy / self.at("sqrt_recip_alpha_bar_minus_one", i, x_t_BCHW)

    def p_mean_variance(
        self, out_BDHW: Tensor, x_t_BCHW: Tensor, i: Tensor, clip_denoised: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mean, variance, log_variance, pred_xstart), each (B, C, H, W), of p(x_{t-1} | x_t) at step i (B,).

        `out_BDHW` is the model's output for (x_t, model_t(i)). `clip_denoised` clamps pred_xstart to [-1, 1],
        which is right for pixels and wrong for latents. DDPM eq. 11 and 15, Improved DDPM eq. 15.
        Raises ValueError if the output's channels do not fit `learn_variance`.
        """
        x_t = _wide(x_t_BCHW)
        eps, v = self._split(out_BDHW, x_t)
        log_variance = self._log_variance(v, x_t, i)
        pred_xstart = self.predict_x0(x_t, i, eps)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _ = self.q_posterior(pred_xstart, x_t, i)
        return mean, log_variance.exp(), log_variance, pred_xstart

    def _split(self, out_BDHW: Tensor, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = x_BCHW.shape[1]
        expected = (x_BCHW.shape[0], 2 * channels if self.learn_variance else channels, *x_BCHW.shape[2:])
        if tuple(out_BDHW.shape) != expected:
            raise ValueError(
                f"model output of shape {tuple(out_BDHW.shape)}: x of shape {tuple(x_BCHW.shape)} with "
                f"learn_variance={self.learn_variance} needs {expected}; make model and process agree"
            )
        out_BDHW = out_BDHW.to(x_BCHW.dtype)
        return out_BDHW[:, :channels], out_BDHW[:, channels:] if self.learn_variance else None

    def _log_variance(self, v_BCHW: Tensor | None, x_BCHW: Tensor, i: Tensor) -> Tensor:
        small, large = self.at("log_posterior_variance", i, x_BCHW), self.at("log_beta", i, x_BCHW)
        if v_BCHW is not None:
            return learned_range_log_variance(v_BCHW, small, large)
        if self.fixed_variance == "small":
            return small.expand_as(x_BCHW)
        return self.at("log_beta_clipped", i, x_BCHW).expand_as(x_BCHW)

    # Training.

    def losses(
        self, out_BDHW: Tensor, x0_BCHW: Tensor, x_t_BCHW: Tensor, t: Tensor, eps_BCHW: Tensor, *,
        min_snr_gamma: float | None = None, vlb_weight: float = 1.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Per-sample losses {loss, mse, vb}, each (B,), float32 or wider, for the model's output at (x_t, t).

        mse is the mean of (eps - eps_theta)^2 over C, H, W (DDPM eq. 14). vb is this timestep's term of the
        variational bound in bits per dimension (DDPM eq. 5), with the mean detached, so that it trains the
        variance alone (Improved DDPM section 3.1). loss = weight(t) mse + vlb_weight vb: vb is one term, not the
        sum over T that the bound is, so the bound's weight is vlb_weight / T: by default, where T is 1000, the
        0.001 of Improved DDPM eq. 16. weight(t) is 1, or with `min_snr_gamma` that of `min_snr_weight`. With a fixed
        variance loss = weight(t) mse; there, and where vlb_weight is 0, vb is without gradient, to look at.
        """
        x0, x_t, eps = _wide(x0_BCHW), _wide(x_t_BCHW), _wide(eps_BCHW)
        eps_theta, _ = self._split(out_BDHW, x_t)
        mse = _mean_over_sample((eps - eps_theta) ** 2)
        weighted = mse
        if min_snr_gamma is not None:
            weighted = min_snr_weight(self.at("snr", t, mse), min_snr_gamma) * mse
        if not self.learn_variance or vlb_weight == 0:
            with torch.no_grad():
                vb = self.vb_terms(out_BDHW, x0, x_t, t)
            return {"loss": weighted, "mse": mse, "vb": vb}
        channels = x_t.shape[1]
        frozen_mean = torch.cat([out_BDHW[:, :channels].detach(), out_BDHW[:, channels:]], dim=1)
        vb = self.vb_terms(frozen_mean, x0, x_t, t)
        return {"loss": weighted + vlb_weight * vb, "mse": mse, "vb": vb}

    def vb_terms(
        self, out_BDHW: Tensor, x0_BCHW: Tensor, x_t_BCHW: Tensor, i: Tensor, clip_denoised: bool = False
    ) -> Tensor:
        """The bound's term in bits/dim (B,): a KL, or the discretised likelihood at i = 0. DDPM eq. 5."""
        x0, x_t = _wide(x0_BCHW), _wide(x_t_BCHW)
        true_mean, true_log_variance = self.q_posterior(x0, x_t, i)
        mean, _, log_variance, _ = self.p_mean_variance(out_BDHW, x_t, i, clip_denoised)
        kl = _mean_over_sample(normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll = -_mean_over_sample(discretised_gaussian_log_likelihood(x0, mean, 0.5 * log_variance))
        return torch.where(i == 0, nll, kl) / math.log(2.0)


def schedule_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """All float64 tables (T,) of a schedule: DDPM eq. 4 (alpha_bar), eq. 7 (posterior), both by step."""
    betas = np.asarray(betas, dtype=np.float64)
    alpha_bar = np.cumprod(1 - betas)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)  # eq. 7, 0 at the first step
    first_positive = posterior_variance[1] if len(betas) > 1 else betas[0]  # its log is clipped there instead
    return {
        "beta": betas,
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "snr": alpha_bar / (1 - alpha_bar),
        "sqrt_alpha_bar": np.sqrt(alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
        "sqrt_recip_alpha_bar": np.sqrt(1 / alpha_bar),
        "sqrt_recip_alpha_bar_minus_one": np.sqrt(1 / alpha_bar - 1),
        "posterior_x0": betas * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
        "posterior_x_t": (1 - alpha_bar_prev) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "log_posterior_variance": np.log(np.append(first_positive, posterior_variance[1:])),
        "log_beta": np.log(betas),
        "log_beta_clipped": np.log(np.append(first_positive, betas[1:])),  # "large": at step 0 as "small"
    }


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """The weight min(SNR, gamma) / SNR of (eps - eps_theta)^2: Min-SNR-gamma of arXiv 2303.09556 for eps-prediction."""
    return (gamma / snr).clamp(max=1.0)


def learned_range_log_variance(v: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """Log-variance from beta_tilde (v = -1) to beta (v = 1). Improved DDPM eq. 15, its v as (v + 1) / 2."""
    fraction = (v + 1) / 2
    return fraction * log_large + (1 - fraction) * log_small


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) elementwise, in nats; the arguments broadcast. The L_{t-1} of DDPM eq. 5."""
    spread = torch.exp(log_variance1 - log_variance2) + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + spread)


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, under N(mean, exp(log_scale)^2), of the uint8 level that x in [-1, 1] is.

    The integral over the level's bin, whose outer edge is infinite at -1 and 1. DDPM eq. 13. The cdf is the
    usual tanh approximation (Page 1977), which released models were trained with.
    """
    inverse = torch.exp(-log_scale)
    below = normal_cdf((x - mean - PIXEL_STEP / 2) * inverse)
    above = normal_cdf((x - mean + PIXEL_STEP / 2) * inverse)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal cdf, tanh approximation (Page 1977), absolute error under 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean_over_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
