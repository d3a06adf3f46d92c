"""Averages of the weights by a power of the training time, and how a set of them gives one of another width.

The maths alone, after Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv
2312.02696), section 3 and appendix C. The averages that run beside the weights are in ema.py, their snapshots in
ema_snapshots.py.

Symbols: tau counts applied updates from 1 to t; theta(tau) are the weights after update tau; the average at t is the
integral of p(tau) theta(tau), with the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (section 3.1).
Its width sigma_rel is the standard deviation of p as a share of t, and so means the same in a short run and a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

WIDEST = 12**-0.5  # the plain mean of all weights, gamma = 0; beyond it the oldest weights would count most
ROUNDING = 1e-13  # directions among the profiles that float64 does not tell apart, as a share of the largest


@dataclass(frozen=True)
class Profile:
    """That of the average of width `width` (sigma_rel) after `updates` applied updates."""

    updates: int
    width: float


def sigma_rel(gamma: float) -> float:
    """Width of the profile of exponent `gamma`: (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-(1/2) (section 3.1)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def exponent(width: float) -> float:
    """The gamma of a width `sigma_rel` in (0, WIDEST], by bisection: from gamma = 0 on the width falls."""
    low, high = 0.0, 1 / width  # sigma_rel(gamma) < 1 / (gamma + 2)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sigma_rel(middle) > width else (low, middle)
    return low


def step_weight(gamma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Weight of theta(t) in update t = 1, 2, ...: 1 - beta(t), beta(t) = (1 - 1/t)^(gamma + 1) (section 3.1).

    The average is then exactly the sum of theta(tau) times the integral of the profile over [tau - 1, tau]. In
    float64, for beta is close to 1; t = 0 is taken as 1.
    """
    return -torch.expm1((gamma.double() + 1) * torch.log1p(-1 / t.double().clamp(min=1)))


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integrals of the products of two profiles each, broadcast, in closed form (appendix C)."""
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_last = np.where(t_a > t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** gamma_last / last


def fit(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Coefficients of the stored averages whose sum comes nearest to the target, and how near it comes.

    Least squares of the profiles (appendix C) in float64. Beyond the paper the coefficients add up to 1, so that
    weights that never moved come out as they were; without it they shrink by per cents where snapshots are few. The
    error is the L2 norm of the difference of the profiles over that of the target.
    """
    t = np.array([profile.updates for profile in stored], dtype=np.float64)
    gamma = np.array([exponent(profile.width) for profile in stored])
    t_target, gamma_target = np.array(float(target.updates)), np.array(exponent(target.width))
    products = inner_products(t[:, None], gamma[:, None], t, gamma)
    with_target = inner_products(t, gamma, t_target, gamma_target)
    square = inner_products(t_target, gamma_target, t_target, gamma_target)

    # Profiles are scaled to length 1; the last row and column hold the Lagrange multiplier of the sum.
    scale, n = np.sqrt(square / np.diag(products)), len(stored)
    system, right = np.zeros((n + 1, n + 1)), np.empty(n + 1)
    system[:n, :n] = products * np.outer(scale, scale) / square
    system[n, :n] = system[:n, n] = scale / scale.max()
    right[:n], right[n] = with_target * scale / square, 1 / scale.max()
    coefficients = np.linalg.lstsq(system, right, rcond=ROUNDING)[0][:n] * scale
    left = square - 2 * coefficients @ with_target + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(left, 0.0) / square))
