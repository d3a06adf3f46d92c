"""Bi-WKV as its equation, for reading and for testing the other backends against.

Time and memory grow with T^2. The linear-time backend is in `torch.py`, argument checks are in `op.py`.
Shapes: B batch, T tokens (t the reader, i the source), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bi_wkv_reference(decay_C: Tensor, first_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Return y_t = sum_i p_ti v_i / sum_i p_ti (Diffusion-RWKV, arXiv 2404.04478, section 2.2).

    p_ti = exp(k_i - (|t - i| - 1) w) for i != t and p_tt = exp(u + k_t), with w = decay, u = first.
    The p of one t are divided by their sum, which is a softmax over i; so no raw k is exponentiated.
    float64 inputs are computed in float64, all others in float32; the output has v's dtype.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(k_BTC.dtype, v_BTC.dtype))
    w_C, u_C, k, v = (x.to(dtype) for x in (decay_C, first_C, k_BTC, v_BTC))

    token_T = torch.arange(k.shape[1], device=k.device)
    distance_TT1 = (token_T[:, None] - token_T[None, :]).abs()[:, :, None]
    log_weight_TTC = torch.where(distance_TT1 == 0, u_C, (1 - distance_TT1) * w_C)

    p_BTTC = torch.softmax(k[:, None, :, :] + log_weight_TTC, dim=2)
    y_BTC = torch.einsum("btic,bic->btc", p_BTTC, v)
    return y_BTC.to(v_BTC.dtype)
