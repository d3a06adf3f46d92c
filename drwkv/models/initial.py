"""The values that parameters start from: each a pure function of (seed, parameter name) and its shape.

So every engine, and every order of creation, starts from the same weights. Which parameter takes which value
is the backbone's to say (`DiffusionRWKV.initial_value` in `drwkv.py`); random bits come from `drwkv/rng.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drwkv import rng


def draw_uniform(seed: int, name: str, shape: Sequence[int], bound: float, device: torch.device) -> Tensor:
    """Uniform in [-bound, bound), float32."""
    n = torch.tensor([rng.name_key(name)], dtype=torch.int64, device=device)
    u = rng.uniform(seed, rng.Purpose.PARAMETER, n, math.prod(shape))
    return u.reshape(tuple(shape)).mul_(2 * bound).sub_(bound)


def draw_normal(seed: int, name: str, shape: Sequence[int], std: float, device: torch.device) -> Tensor:
    """Normal with mean 0, float32."""
    n = torch.tensor([rng.name_key(name)], dtype=torch.int64, device=device)
    return rng.normal(seed, rng.Purpose.PARAMETER, n, tuple(shape)).reshape(tuple(shape)).mul_(std)


def draw_xavier(seed: int, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform within sqrt(6 / (fan_in + fan_out)) (Xavier); all dimensions but the first are fan_in."""
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    return draw_uniform(seed, name, shape, math.sqrt(6.0 / (fan_in + fan_out)), device)


def usual_value(seed: int, name: str, parameter: Tensor) -> Tensor:
    """What a parameter starts from unless its backbone says otherwise: biases 0, gains 1, matrices Xavier."""
    shape, device = parameter.shape, parameter.device
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if parameter.ndim == 1:
        return torch.ones(shape, device=device)
    return draw_xavier(seed, name, shape, device)


def rwkv_vector(name: str, layer: int, num_layers: int, hidden_size: int) -> Tensor:
    """RWKV's "fancy" start of a decay, bonus or mix vector, (D,) float32, by its place in the stack.

    `name` is the end of the parameter's: "att.spatial_decay", "ffn.spatial_mix_k", ...; layer 0 comes first.
    """
    channels = torch.arange(hidden_size, dtype=torch.float64, device="cpu")
    rising = layer / max(num_layers - 1, 1)  # 0 in the first block, 1 in the last
    falling = 1 - layer / num_layers  # 1 in the first block, nearly 0 in the last
    mix = channels / hidden_size
    if name == "att.spatial_decay":
        vector = -5 + 8 * (channels / max(hidden_size - 1, 1)) ** (0.7 + 1.3 * rising)
    elif name == "att.spatial_first":
        vector = math.log(0.3) + 0.5 * ((channels + 1) % 3 - 1)
    elif name == "att.spatial_mix_v":
        vector = mix**falling + 0.3 * rising
    elif name == "att.spatial_mix_r":
        vector = mix ** (0.5 * falling)
    else:
        vector = mix**falling
    return vector.float()
