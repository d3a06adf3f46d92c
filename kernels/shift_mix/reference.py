"""shift_mix as its equation, for reading and for testing the other backends against.

Argument checks are in `op.py`, the backends in `torch.py` and `triton.py`.
Shapes: B batch, N = K + h w tokens (K conditions, then the image row by row), D channels, M mixes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_mix_reference(
    x_BND: Tensor, mixes_MD: Tensor, grid: tuple[int, int], out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return out_m = x mix_m + xx (1 - mix_m) with xx = q_shift(x) (Vision-RWKV, arXiv 2403.02308, section 3.2).

    Any float64 input makes the arithmetic float64, else it is float32; one rounding to `out_dtype`.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(x_BND.dtype, mixes_MD.dtype))
    x_BND, mixes_MD = x_BND.to(dtype), mixes_MD.to(dtype)
    tokens = x_BND.shape[1] - grid[0] * grid[1]
    q = x_BND.shape[2] // 4

    # Each token's four neighbours in the image, zeros beyond its border.
    z_BhwD = x_BND[:, tokens:].unflatten(1, grid)
    left, right = F.pad(z_BhwD, (0, 0, 1, 0))[:, :, :-1], F.pad(z_BhwD, (0, 0, 0, 1))[:, :, 1:]
    above, below = F.pad(z_BhwD, (0, 0, 0, 0, 1, 0))[:, :-1], F.pad(z_BhwD, (0, 0, 0, 0, 0, 1))[:, 1:]

    # A quarter of the channels looks each way; the D % 4 left over, and the conditions, at themselves.
    looks = (left[..., :q], right[..., q : 2 * q], above[..., 2 * q : 3 * q], below[..., 3 * q : 4 * q])
    zz_BhwD = torch.cat([*looks, z_BhwD[..., 4 * q :]], dim=-1)
    xx_BND = torch.cat([x_BND[:, :tokens], zz_BhwD.flatten(1, 2)], dim=1)
    return tuple((x_BND * mix_D + xx_BND * (1 - mix_D)).to(out_dtype) for mix_D in mixes_MD)
