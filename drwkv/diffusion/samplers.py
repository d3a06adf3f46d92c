"""Samplers: from noise x_T to x_0 in few steps, DDPM (ancestral) and DDIM, and which timesteps they visit.

Here: the loops over steps. Not here: one step's maths (gaussian.py), guidance (guidance.py wraps `denoise`),
random numbers. All samplers share one signature, and all are pure: the same arguments give the same x_0.

    sampler(process, denoise, x_T, noise, *, steps, clip_denoised=False, on_step=None) -> x_0

    process         a GaussianProcess over all its timesteps; the sampler respaces it to `steps`
    denoise(x_t, t) the model: x_t (B, C, H, W), t (B,) int64 original timesteps -> (B, C or 2C, H, W)
    x_T             (B, C, H, W) standard normal
    noise(s)        standard normal like x_T for the s-th step, s = 0 at the largest timestep; called only
                    for the steps that use it
    on_step(s, x)   called after the s-th step with the new x; s = steps - 1 gives x_0

Shapes: B batch, C channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drwkv.diffusion.gaussian import GaussianProcess

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
OnStep = Callable[[int, Tensor], None]


def even_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps spread evenly from 0 to num_timesteps - 1, both ends in. Improved DDPM section 4."""
    _check_steps(num_timesteps, steps)
    return [round(k * (num_timesteps - 1) / (steps - 1)) for k in range(steps)]


def strided_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps 0, c, 2c, ... with an integer stride c, the linear choice of DDIM appendix D.2.

    Raises ValueError, naming the nearest counts that exist, if no stride gives exactly `steps`.
    """
    _check_steps(num_timesteps, steps)
    stride = -(-num_timesteps // steps)
    timesteps = list(range(0, num_timesteps, stride))
    if len(timesteps) != steps:
        fewer, more = len(timesteps), len(range(0, num_timesteps, stride - 1))
        raise ValueError(
            f"steps={steps}: no integer stride over {num_timesteps} timesteps gives {steps} DDIM steps; "
            f"the nearest counts are {fewer} and {more}"
        )
    return timesteps


@torch.no_grad()
def ddpm(
    process: GaussianProcess,
    denoise: Denoise,
    x_T: Tensor,
    noise: Noise,
    *,
    steps: int,
    clip_denoised: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling over evenly spaced timesteps: x_{t-1} = mean + sigma z. DDPM algorithm 2."""
    respaced = process.respaced(even_timesteps(process.num_timesteps, steps))
    x = x_T
    for s, i in enumerate(_steps(respaced, x_T)):
        out = denoise(x, respaced.model_t(i))
        mean, _, log_variance, _ = respaced.p_mean_variance(out, x, i, clip_denoised)
        last = s == steps - 1
        x = mean if last else mean + torch.exp(0.5 * log_variance) * noise(s)
        if on_step is not None:
            on_step(s, x)
    return x


@torch.no_grad()
def ddim(
    process: GaussianProcess,
    denoise: Denoise,
    x_T: Tensor,
    noise: Noise,
    *,
    steps: int,
    clip_denoised: bool = False,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM over strided timesteps: eta = 0 is deterministic and never asks for noise, eta = 1 is DDPM-like.

    DDIM eq. 12 (the step) and eq. 16 (sigma).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: DDIM needs 0 <= eta <= 1")
    respaced = process.respaced(strided_timesteps(process.num_timesteps, steps))
    x = x_T
    for s, i in enumerate(_steps(respaced, x_T)):
        out = denoise(x, respaced.model_t(i))
        _, _, _, pred_xstart = respaced.p_mean_variance(out, x, i, clip_denoised)
        x = ddim_step(respaced, x, pred_xstart, i, eta, noise(s) if eta > 0 and s < steps - 1 else None)
        if on_step is not None:
            on_step(s, x)
    return x


def ddim_step(
    process: GaussianProcess, x_t: Tensor, pred_xstart: Tensor, i: Tensor, eta: float, noise: Tensor | None
) -> Tensor:
    """x_{t-1} from x_t and the predicted x_0; `noise` None stands for zeros. DDIM eq. 12, sigma by eq. 16."""
    eps = process.predict_eps(x_t, i, pred_xstart)
    alpha_bar = process.at("alpha_bar", i, x_t)
    alpha_bar_prev = process.at("alpha_bar_prev", i, x_t)
    sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
    mean = torch.sqrt(alpha_bar_prev) * pred_xstart + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
    return mean if noise is None else mean + sigma * noise


def _steps(process: GaussianProcess, x: Tensor) -> list[Tensor]:
    """The step indices (B,), largest first."""
    order = reversed(range(process.num_timesteps))
    return [torch.full((x.shape[0],), i, dtype=torch.int64, device=x.device) for i in order]


def _check_steps(num_timesteps: int, steps: int) -> None:
    if not 2 <= steps <= num_timesteps:
        raise ValueError(f"steps={steps}: sampling needs 2..{num_timesteps} steps")
