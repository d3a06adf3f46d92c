"""The Bi-RWKV block of Diffusion-RWKV (arXiv 2404.04478): its two mixes and its conditioning.

The model made of these blocks is in `drwkv.py`, the operators shift_mix (q_shift and the lerps) and bi_wkv in
`drwkv.kernels`. Shape suffixes as in `layers.py`, and K conditioning tokens.

Block. With c = time embedding + label embedding, a skip from the mirrored shallow block, and the residual
branches f_1 = SpatialMix and f_2 = ChannelMix:

    x <- Linear([x, skip])                       skip="concat"; x + skip for "add"; x for "none"
    x <- LN_0(x)                                 in the first block alone
    x <- x + keep * gate_i * f_i(LN_i(x) * (1 + scale_i) + shift_i)                        i = 1, 2

Conditioning (paper section 2.2):

* "adaln-zero": shift, scale, gate = Linear(SiLU(c)), starting from zero, so each branch starts closed.
* "adaln": shift and scale likewise but starting from Xavier's values; no gate (gate = 1).
* "in-context": plain norms (shift = scale = 0, gate = 1), and the conditions are tokens of the sequence. The
  sequence is [time, label, image row by row], or [time, image] without classes; conditioning tokens
  have no position embedding, pass through skips, norms and the channel mix as image tokens do, and are
  dropped before the final norm. In the spatial mix they are taken out: q_shift and bi_wkv see the
  h x w image tokens and T = h w alone. To be heard at all they come back as a broadcast value,
      image:   W_o (sigmoid(r) * (bi_wkv(k, v) + mean_j W_v z_j))       z_j: the conditioning tokens
      token j: W_o (sigmoid(W_r z_j) * W_v z_j)                         bi_wkv of one token is its value
  and in both mixes a conditioning token is its own shifted neighbour. (To take them out and do no more
  would leave the image without conditions: no other step carries anything between tokens and image.)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drwkv.kernels.shift_mix import shift_mix
from drwkv.kernels.wkv import bi_wkv, bi_wkv_gated
from drwkv.models.layers import Grid, modulate

Conditioning = Literal["adaln-zero", "adaln", "in-context"]
Skip = Literal["concat", "add", "none"]


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer makes of x: written at once by the operator before it, no cast is needed."""
    device = x.device.type
    # Autocast leaves float64 alone, and has no meta device. (is_autocast_available would end the graph on torch 2.11.)
    if x.dtype == torch.float64 or device == "meta":
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class SpatialMix(nn.Module):
    """Tokens mix along the two raster directions: W_o (sigmoid(r) * bi_wkv(w / T, u / T, k, v))."""

    def __init__(self, hidden_size: int, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        self.spatial_decay = nn.Parameter(torch.empty(hidden_size))
        self.spatial_first = nn.Parameter(torch.empty(hidden_size))
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_v = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, grid: Grid, num_tokens: int = 0) -> Tensor:
        """x (B, T, D) on `grid` (h, w), its first `num_tokens` tokens conditions -> (B, T, D)."""
        mixes_MD = torch.cat([self.spatial_mix_r, self.spatial_mix_k, self.spatial_mix_v], dim=1)[0]
        x_r_BTD, x_k_BTD, x_v_BTD = shift_mix(
            x_BTD, mixes_MD, grid, num_tokens=num_tokens, out_dtype=_matmul_dtype(x_BTD), backend=self.backend
        )
        r_BTD, k_BTD, v_BTD = self.receptance(x_r_BTD), self.key(x_k_BTD), self.value(x_v_BTD)

        T = grid[0] * grid[1]
        decay, first = self.spatial_decay.float() / T, self.spatial_first.float() / T
        if not num_tokens:
            return self.output(bi_wkv_gated(decay, first, k_BTD, v_BTD, r_BTD, backend=self.backend))
        # Conditioning tokens step aside for the operator.
        z_BKD, k_BTD, v_BTD = v_BTD[:, :num_tokens], k_BTD[:, num_tokens:], v_BTD[:, num_tokens:]
        wkv_BTD = bi_wkv(decay, first, k_BTD, v_BTD, backend=self.backend)
        wkv_BTD = torch.cat([z_BKD, wkv_BTD + z_BKD.mean(dim=1, keepdim=True)], dim=1)
        return self.output(torch.sigmoid(r_BTD) * wkv_BTD)


class ChannelMix(nn.Module):
    """Channels mix in each token: sigmoid(W_r x_r) * W_v relu(W_k x_k)^2."""

    def __init__(self, hidden_size: int, hidden_rate: int, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_rate * hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_rate * hidden_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, grid: Grid, num_tokens: int = 0) -> Tensor:
        mixes_MD = torch.cat([self.spatial_mix_k, self.spatial_mix_r], dim=1)[0]
        x_k_BTD, x_r_BTD = shift_mix(
            x_BTD, mixes_MD, grid, num_tokens=num_tokens, out_dtype=_matmul_dtype(x_BTD), backend=self.backend
        )
        value_BTD = self.value(F.relu(self.key(x_k_BTD)).square())
        return torch.sigmoid(self.receptance(x_r_BTD)) * value_BTD


class Block(nn.Module):
    """One Bi-RWKV block; its equations are in this file's docstring."""

    def __init__(
        self,
        hidden_size: int,
        *,
        first: bool,
        takes_skip: bool,
        conditioning: Conditioning,
        skip: Skip,
        hidden_rate: int,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.conditioning = conditioning
        self.adds_skip = takes_skip and skip == "add"
        self.ln0 = nn.LayerNorm(hidden_size) if first else None
        self.ln1 = nn.LayerNorm(hidden_size)
        self.ln2 = nn.LayerNorm(hidden_size)
        self.att = SpatialMix(hidden_size, backend)
        self.ffn = ChannelMix(hidden_size, hidden_rate, backend)
        if conditioning != "in-context":
            width = (6 if conditioning == "adaln-zero" else 4) * hidden_size
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, width))
        concatenates = takes_skip and skip == "concat"
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if concatenates else None

    def forward(
        self,
        x_BTD: Tensor,
        c_BD: Tensor | None,
        grid: Grid,
        skip_BTD: Tensor | None = None,
        keep_B: Tensor | None = None,
        num_tokens: int = 0,
    ) -> Tensor:
        """x (B, T, D), condition c (B, D), skip like x, keep (B,) -> (B, T, D); the first `num_tokens` condition."""
        if self.skip_linear is not None:
            assert skip_BTD is not None
            x_BTD = self.skip_linear(torch.cat([x_BTD, skip_BTD], dim=-1))
        elif self.adds_skip:
            assert skip_BTD is not None
            x_BTD = x_BTD + skip_BTD
        if self.ln0 is not None:
            x_BTD = self.ln0(x_BTD)

        keep_B11 = None if keep_B is None else keep_B[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c_BD, keep_B11)
        x_BTD = _residual(x_BTD, gate1, self.att(_norm(self.ln1, x_BTD, shift1, scale1), grid, num_tokens))
        return _residual(x_BTD, gate2, self.ffn(_norm(self.ln2, x_BTD, shift2, scale2), grid, num_tokens))

    def _modulation(self, c_BD: Tensor | None, keep_B11: Tensor | None) -> tuple[Tensor | None, ...]:
        """shift, scale, gate of both branches, (B, 1, D) or None; `keep` goes into the gates."""
        if self.conditioning == "in-context":
            return None, None, keep_B11, None, None, keep_B11
        assert c_BD is not None
        vectors = self.adaLN_modulation(c_BD).unsqueeze(1)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = vectors.chunk(4, dim=-1)
            return shift1, scale1, keep_B11, shift2, scale2, keep_B11
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        if keep_B11 is not None:
            gate1, gate2 = gate1 * keep_B11, gate2 * keep_B11
        return shift1, scale1, gate1, shift2, scale2, gate2


def _norm(norm: nn.LayerNorm, x_BTD: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    x_BTD = norm(x_BTD)
    return x_BTD if shift is None or scale is None else modulate(x_BTD, shift, scale)


def _residual(x_BTD: Tensor, gate: Tensor | None, branch_BTD: Tensor) -> Tensor:
    return x_BTD + branch_BTD if gate is None else torch.addcmul(x_BTD, branch_BTD, gate)
