"""The two Triton kernels of shift_mix. They are launched from `triton.py`; the derivation is in `README.md`.

A program owns tiles of BT tokens and BC channels, a token block never crossing from one sample into the next.
What a tile's neighbours hold is loaded as a second tile of its own, at addresses that differ by channel; it is in
the L1 or L2 cache, for the same or a nearby program reads it as its own.
Shapes: B batch, N = K + h w tokens, D channels, M mixes, P programs that share a channel block.
"""

# mypy: disable-error-code="no-untyped-def"
# What Triton passes for an argument has no Python type; each is described where it is named.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ways(o_c, quarter):
    """By channel, as one bit: 1, 2, 4, 8 for the quarter that looks left, right, above, below; 16 for the rest."""
    horizontal = tl.where(o_c < quarter, 1, 2)
    vertical = tl.where(o_c < 3 * quarter, 4, 8)
    return tl.where(o_c < 2 * quarter, horizontal, tl.where(o_c < 4 * quarter, vertical, 16))


@triton.jit
def _steps(o_c, w, quarter):
    """By channel: how many tokens behind itself a token reads. A reader stands as far ahead."""
    horizontal = tl.where(o_c < quarter, -1, 1)
    vertical = tl.where(o_c < 3 * quarter, -w, w)
    return tl.where(o_c < 2 * quarter, horizontal, tl.where(o_c < 4 * quarter, vertical, 0))


@triton.jit
def _open_ways(o_t, N, K, w, READERS: tl.constexpr):
    """By token, as bits like those of `_ways`: where it has a neighbour, or (READERS) is one.

    All are set for a conditioning token, which is its own.
    """
    o_s = o_t - K
    column = o_s % w
    has_left, has_right = column > 0, column < w - 1
    has_above, has_below = o_s >= w, o_t < N - w
    if READERS:  # who reads this token in the quarter that looks left stands on its right
        has_left, has_right = has_right, has_left
        has_above, has_below = has_below, has_above
    bits = tl.where(has_left, 1, 0) + tl.where(has_right, 2, 0)
    bits += tl.where(has_above, 4, 0) + tl.where(has_below, 8, 0) + 16
    return tl.where(o_s >= 0, bits, 31)


@triton.jit
def _lerp_to(p_out, p_mix, b_x, b_xx, o_out, o_mix, m_c, m):
    """Store xx + (x - xx) mix, rounded once."""
    mix = tl.load(p_mix + o_mix, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_out + o_out, (b_xx + (b_x - b_xx) * mix[None, :]).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def forward_kernel(
    p_x,  # (B, N, D), any strides
    p_mixes,  # (M, D), any strides
    p_out0,  # (B, N, D), contiguous; of the four the first M are written
    p_out1,
    p_out2,
    p_out3,
    N,  # tokens of a sample
    D,  # channels
    K,  # conditioning tokens among the N
    w,  # columns of the grid
    quarter,  # D // 4
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mm,
    stride_md,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """out_m = x mix_m + xx (1 - mix_m) on one tile; programs (b, token block, channel block), the last fastest."""
    channel_blocks, token_blocks = tl.cdiv(D, BC), tl.cdiv(N, BT)
    i_program = tl.program_id(0)
    i_c, i_row = i_program % channel_blocks, i_program // channel_blocks
    i_t, i_b = i_row % token_blocks, (i_row // token_blocks).to(tl.int64)

    o_t, o_c = i_t * BT + tl.arange(0, BT), i_c * BC + tl.arange(0, BC)
    o_n, o_d = o_t.to(tl.int64), o_c.to(tl.int64)
    m_c = o_c < D
    m = (o_t < N)[:, None] & m_c[None, :]
    m_near = m & ((_open_ways(o_t, N, K, w, False)[:, None] & _ways(o_c, quarter)[None, :]) != 0)

    p_row = p_x + i_b * stride_xb + o_n[:, None] * stride_xn
    o_near = o_d * stride_xd + _steps(o_c, w, quarter).to(tl.int64) * stride_xn
    o_own = o_d * stride_xd
    o_near = tl.where((o_t < K)[:, None], o_own[None, :], o_near[None, :])
    b_x = tl.load(p_row + o_own[None, :], mask=m, other=0.0).to(tl.float32)
    b_xx = tl.load(p_row + o_near, mask=m_near, other=0.0).to(tl.float32)

    o_out = i_b * N * D + o_n[:, None] * D + o_d[None, :]
    o_mix = o_d * stride_md
    _lerp_to(p_out0, p_mixes, b_x, b_xx, o_out, o_mix, m_c, m)
    if M > 1:
        _lerp_to(p_out1, p_mixes + stride_mm, b_x, b_xx, o_out, o_mix, m_c, m)
    if M > 2:
        _lerp_to(p_out2, p_mixes + tl.cast(stride_mm, tl.int64) * 2, b_x, b_xx, o_out, o_mix, m_c, m)
    if M > 3:
        _lerp_to(p_out3, p_mixes + tl.cast(stride_mm, tl.int64) * 3, b_x, b_xx, o_out, o_mix, m_c, m)


@triton.jit
def _add_gradient(p_g, b_mix, o_own, o_near, m, m_near, b_delta, b_gx, b_sum):
    """One output's share of grad x, and of the sum that is its mix's gradient."""
    b_g = tl.load(p_g + o_own, mask=m, other=0.0).to(tl.float32)
    b_near = tl.load(p_g + o_near, mask=m_near, other=0.0).to(tl.float32)
    return b_gx + (b_near + (b_g - b_near) * b_mix), b_sum + b_g * b_delta


@triton.jit
def backward_kernel(
    p_x,  # (B, N, D), any strides
    p_mixes,  # (M, D), any strides
    p_g0,  # (B, N, D), any strides, all of one set; of the four the first M are read
    p_g1,
    p_g2,
    p_g3,
    p_gx,  # (B, N, D), contiguous
    p_partial,  # (P, M, D), contiguous, float32
    B,  # samples
    N,  # tokens of a sample
    D,  # channels
    K,  # conditioning tokens among the N
    w,  # columns of the grid
    quarter,  # D // 4
    loop,  # token blocks of one program
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mm,
    stride_md,
    stride_gb,
    stride_gn,
    stride_gd,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """grad x of `loop` tiles, and their sums of g_m (x - xx); programs (p, channel block), the last fastest."""
    channel_blocks, token_blocks = tl.cdiv(D, BC), tl.cdiv(N, BT)
    i_program = tl.program_id(0)
    i_c, i_p = i_program % channel_blocks, (i_program // channel_blocks).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    o_d = o_c.to(tl.int64)
    m_c = o_c < D
    b_way, b_step = _ways(o_c, quarter), _steps(o_c, w, quarter).to(tl.int64)
    o_x, o_x_near = o_d * stride_xd, o_d * stride_xd + b_step * stride_xn
    o_g, o_g_near = o_d * stride_gd, o_d * stride_gd - b_step * stride_gn

    # Mixes of this channel block, and the sums for their gradients.
    p_mix, step_m = p_mixes + o_d * stride_md, tl.cast(stride_mm, tl.int64)
    b_mix0 = tl.load(p_mix, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_sum0 = tl.zeros([BT, BC], tl.float32)
    if M > 1:
        b_mix1 = tl.load(p_mix + step_m, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_sum1 = tl.zeros([BT, BC], tl.float32)
    if M > 2:
        b_mix2 = tl.load(p_mix + step_m * 2, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_sum2 = tl.zeros([BT, BC], tl.float32)
    if M > 3:
        b_mix3 = tl.load(p_mix + step_m * 3, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_sum3 = tl.zeros([BT, BC], tl.float32)

    for i_loop in range(loop):
        i_row = i_p * loop + i_loop
        i_b = i_row // token_blocks
        o_t = (i_row % token_blocks).to(tl.int32) * BT + tl.arange(0, BT)
        o_n = o_t.to(tl.int64)[:, None]
        m = (o_t < tl.where(i_b < B, N, 0))[:, None] & m_c[None, :]  # the last program may have fewer tiles
        is_own = (o_t < K)[:, None]

        # x - xx, nothing for a token that is its own neighbour.
        m_near = m & ((_open_ways(o_t, N, K, w, False)[:, None] & b_way[None, :]) != 0)
        p_row = p_x + i_b * stride_xb + o_n * stride_xn
        b_x = tl.load(p_row + o_x[None, :], mask=m, other=0.0).to(tl.float32)
        o_near = tl.where(is_own, o_x[None, :], o_x_near[None, :])
        b_delta = b_x - tl.load(p_row + o_near, mask=m_near, other=0.0).to(tl.float32)

        # A token's own share of its gradients, and its reader's of the reader's.
        m_near = m & ((_open_ways(o_t, N, K, w, True)[:, None] & b_way[None, :]) != 0)
        o_row = i_b * stride_gb + o_n * stride_gn
        o_own, o_near = o_row + o_g[None, :], o_row + tl.where(is_own, o_g[None, :], o_g_near[None, :])
        b_gx = tl.zeros([BT, BC], tl.float32)
        b_gx, b_sum0 = _add_gradient(p_g0, b_mix0, o_own, o_near, m, m_near, b_delta, b_gx, b_sum0)
        if M > 1:
            b_gx, b_sum1 = _add_gradient(p_g1, b_mix1, o_own, o_near, m, m_near, b_delta, b_gx, b_sum1)
        if M > 2:
            b_gx, b_sum2 = _add_gradient(p_g2, b_mix2, o_own, o_near, m, m_near, b_delta, b_gx, b_sum2)
        if M > 3:
            b_gx, b_sum3 = _add_gradient(p_g3, b_mix3, o_own, o_near, m, m_near, b_delta, b_gx, b_sum3)
        tl.store(p_gx + i_b * N * D + o_n * D + o_d[None, :], b_gx.to(p_gx.dtype.element_ty), mask=m)

    p_sum = p_partial + i_p * M * D + o_d
    tl.store(p_sum, tl.sum(b_sum0, 0), mask=m_c)
    if M > 1:
        tl.store(p_sum + D, tl.sum(b_sum1, 0), mask=m_c)
    if M > 2:
        tl.store(p_sum + tl.cast(D, tl.int64) * 2, tl.sum(b_sum2, 0), mask=m_c)
    if M > 3:
        tl.store(p_sum + tl.cast(D, tl.int64) * 3, tl.sum(b_sum3, 0), mask=m_c)
