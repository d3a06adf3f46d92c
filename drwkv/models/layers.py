"""What every backbone shares: embeddings, positions, modulation and the output layer.

The blocks live in the backbone's own file (`drwkv.py`), the values they start from in `initial.py`, names and
sizes in `__init__.py`.

Shape suffixes, here and in the backbones: B batch; H, W rows and columns of the image (or latent); C its
channels; p patch size; h, w rows and columns of the token grid; T = h w tokens; D hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class PatchProjection(nn.Module):
    """The linear map of flattened patches; its weight has the (D, C, p, p) shape of a strided convolution."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) -> tokens (B, T, D) in row-major order, one per p x p patch.

    A matrix product over flattened patches: the same numbers as a convolution of stride p, and several
    times quicker than one on a CPU.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, hidden_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        p = self.patch_size
        x = x_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(x.reshape(B, (H // p) * (W // p), C * p * p))


def unpatchify(x: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Tokens (B, T, p p C), each a patch with its channels last -> image (B, C, h p, w p)."""
    h, w = grid
    B, p = x.shape[0], patch_size
    x = x.reshape(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, h * p, w * p)


def timestep_frequencies(t_B: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(t f_i), sin(t f_i)], f_i = max_period^(-2 i / dim): (B, dim) float32, dim even, t any real."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device)
    frequencies = torch.exp(exponents * (-math.log(max_period) / half))
    angles = t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbed(nn.Module):
    """Timesteps (B,) on the scale 0..999 -> (B, D): sinusoids through a two-layer perceptron."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        first, second = nn.Linear(num_frequencies, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t_B: Tensor) -> Tensor:
        frequencies = timestep_frequencies(t_B, self.num_frequencies)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


class LabelEmbed(nn.Module):
    """Labels (B,) -> (B, D). The table's last row, `num_classes`, stands for "no label".

    Nothing is dropped here: which labels are dropped in training is the trainer's draw.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


def sincos_positions(hidden_size: int, grid: Grid) -> Tensor:
    """2-D sine-cosine positions (1, T, D) float32 of a grid of h rows and w columns.

    Quarters of the channels hold, in order, sin and cos of the column, sin and cos of the row. Channels
    beyond a multiple of four stay zero.
    """
    h, w = grid
    quarter = hidden_size // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / max(quarter, 1))
    rows = torch.arange(h, dtype=torch.float64, device="cpu").repeat_interleave(w)[:, None] * omega
    columns = torch.arange(w, dtype=torch.float64, device="cpu").repeat(h)[:, None] * omega
    waves = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return F.pad(waves, (0, hidden_size - 4 * quarter)).float()[None]


def resize_positions(positions_1TD: Tensor, native: Grid, grid: Grid) -> Tensor:
    """Positions of the trained grid on another one by bicubic interpolation; on the same grid unchanged."""
    if grid == native:
        return positions_1TD
    field = positions_1TD.unflatten(1, native).permute(0, 3, 1, 2)
    field = F.interpolate(field.float(), size=grid, mode="bicubic", align_corners=False)
    return field.flatten(2).transpose(1, 2).to(positions_1TD.dtype)


def modulate(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """x (1 + scale) + shift, the adaptive half of adaLN (DiT, arXiv 2212.09748, section 3.2)."""
    return torch.addcmul(shift_B1D, x_BTD, 1 + scale_B1D)


class FinalLayer(nn.Module):
    """Tokens (B, T, D) -> patches (B, T, p p C_out). Without conditioning, a plain norm and a linear map."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, conditioned: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        if conditioned:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor | None = None) -> Tensor:
        x_BTD = self.norm_final(x_BTD)
        if c_BD is not None:
            shift, scale = self.adaLN_modulation(c_BD).unsqueeze(1).chunk(2, dim=-1)
            x_BTD = modulate(x_BTD, shift, scale)
        return self.linear(x_BTD)
