"""The forward kernels of Bi-WKV's Triton backend.

`forward_kernel` computes y: with WHOLE one program takes all tiles of a (batch, block of channels) in turn and there
is no other launch; without it a program takes one tile, after `sums_kernel` has summed the tiles and
`exchange_kernel` has told each what lies outside it. These serve the channels that one maximum holds;
`forward_carried_kernel` serves the rest. Which is which, each kernel sees for itself in w and u, and it leaves the
others alone. Launching is in `triton.py`, the backward in `triton_backward.py`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# What Triton passes for an argument has no Python type; each is described where it is named.

import triton
import triton.language as tl

from drwkv.kernels.wkv import one_maximum
from drwkv.kernels.wkv import triton_carried_maximum as carried
from drwkv.kernels.wkv import triton_one_maximum as one

# Of one maximum: |w| span + |u|, span the tokens of the sequence or of a tile
REACH = tl.constexpr(one_maximum.REACH)


@triton.jit
def place(C, S, BC: tl.constexpr):
    """This program's batch, tile of S, channels (1, BC) and their mask."""
    num_blocks = tl.cdiv(C, BC)
    i = tl.program_id(0).to(tl.int64)
    o_c = (i % num_blocks) * BC + tl.arange(0, BC)[None, :].to(tl.int64)
    return i // num_blocks // S, i // num_blocks % S, o_c, o_c < C


@triton.jit
def rows(i_s, T, m_c, N: tl.constexpr, R: tl.constexpr):
    """A tile's rows (N, 1), their first tokens, the mask (N, BC), and how many tokens are left from each."""
    o_n = tl.arange(0, N)[:, None]
    o_t = tl.cast(i_s, tl.int64) * (N * R) + o_n.to(tl.int64) * R
    return o_n, o_t, m_c & (o_t < T), T - o_t


@triton.jit
def decays(p_w, p_u, o_c, m_c, span, NEAR: tl.constexpr):
    """w and u (1, BC) in float32, and the mask of the channels that one maximum holds (NEAR) or does not hold."""
    w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    u = tl.load(p_u + o_c, mask=m_c, other=0.0).to(tl.float32)
    near = tl.abs(w) * span <= REACH - tl.abs(u)  # no multiply-add: every kernel must decide alike
    if NEAR:
        w, u, m = tl.where(near, w, 0.0), tl.where(near, u, 0.0), m_c & near
    else:
        m = m_c & (near == 0)
    return w, u, m


@triton.jit
def any_of(m):
    """Whether a mask lets anything through."""
    return tl.max(m.to(tl.int32)) > 0


@triton.jit
def sums_kernel(
    p_w, p_u,  # (C,)
    p_k, p_v,  # (B, T, C)
    p_centre,  # (B, C) float32, with CENTRED: taken from v
    p_sums,  # (5, B, S, C) float32
    T, C, S, span, plane,
    stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc,
    CENTRED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write every tile's sums: a program a tile."""
    plane = tl.cast(plane, tl.int64)
    i_b, i_s, o_c, m_c = place(C, S, BC)
    w, _, m_c = decays(p_w, p_u, o_c, m_c, span, True)
    if any_of(m_c):
        o_n, o_t, m_tile, left = rows(i_s, T, m_c, N, R)
        centre = tl.zeros((1, BC), tl.float32)
        if CENTRED:
            centre = tl.load(p_centre + i_b * C + o_c, mask=m_c, other=0.0)
        one.source_sums(
            p_k + i_b * stride_kb + o_t * stride_kt + o_c * stride_kc,
            p_v + i_b * stride_vb + o_t * stride_vt + o_c * stride_vc,
            p_sums + (i_b * S + i_s) * C + o_c, plane,
            stride_kt, stride_vt, m_tile, left, m_c, centre, w * one.LOG2_E, o_n, N, R, EVEN,
        )  # fmt: skip


@triton.jit
def exchange_kernel(
    p_w, p_u,  # (C,)
    p_sums,  # (5 or 4, B, S, C) float32
    T, C, S, span, plane,
    HAS_MAXIMUM: tl.constexpr, LENGTH: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn the tiles' sums, in place, into what comes to each tile: a program a (batch, channel block)."""
    plane = tl.cast(plane, tl.int64)
    i_b, _, o_c, m_c = place(C, 1, BC)
    w, _, m_c = decays(p_w, p_u, o_c, m_c, span, True)
    if any_of(m_c):
        one.exchange(
            p_sums + i_b * S * C + o_c, plane, S, C, m_c, w * one.LOG2_E, LENGTH, BC, ROWS, HAS_MAXIMUM
        )


@triton.jit
def sum_whole(
    p_k, p_v, p_sums,  # (1, BC) the sequence's first token, the first tile's sums
    plane, T, C, S, stride_kt, stride_vt, m_c, centre, w2,
    N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sum all tiles of a sequence and tell each what comes to it, in one program."""
    for i in range(S):
        o_n, o_t, m_tile, left = rows(i, T, m_c, N, R)
        one.source_sums(
            p_k + o_t * stride_kt, p_v + o_t * stride_vt, p_sums + tl.cast(i, tl.int64) * C, plane,
            stride_kt, stride_vt, m_tile, left, m_c, centre, w2, o_n, N, R, EVEN,
        )  # fmt: skip
    tl.debug_barrier()  # what one thread wrote, others read
    one.exchange(p_sums, plane, S, C, m_c, w2, N * R, BC, ROWS, True)
    tl.debug_barrier()


@triton.jit
def mix_tile(
    p_k, p_v, p_r, p_y,  # (N, BC) each run's first token
    p_centre,  # (1, BC)
    p_sums, plane, C, stride_kt, stride_vt, stride_rt, m_tile, left, m_c, w, u, o_n, is_first,
    GATED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write y of one tile."""
    k = one.load_tile(p_k, stride_kt, m_tile, left, float("-inf"), R, EVEN)
    v = one.load_tile(p_v, stride_vt, m_tile, left, 0.0, R, EVEN)
    if GATED:
        r = one.load_tile(p_r, stride_rt, m_tile, left, 0.0, R, EVEN)
    past_n, past_d, future_n, future_d = one.load_sums(p_sums, plane, m_c)
    top = tl.load(p_sums + 4 * plane, mask=m_c, other=0.0)
    w2 = w * one.LOG2_E
    E, bonus = one.exp2(-w2), one.exp2(u * one.LOG2_E)

    # What comes to every run, and from the right to every token.
    x_n, x_d = one.weigh(k, v, top, 0.0, R)
    zero = tl.zeros((N, BC), tl.float32)
    u_n, u_d, d_n, d_d = one.run_sums(x_n, x_d, E, zero, R)
    p_n, p_d, f_n, f_d = one.entering(u_n, u_d, d_n, d_d, past_n, past_d, future_n, future_d, w2, o_n, R, N)
    s_n, s_d = one.states_from_right(x_n, x_d, E, f_n, f_d, R)

    # From left to right: what comes from both sides, and the token itself.
    for j in tl.static_range(R):
        y = (p_n + s_n[j] + x_n[j] * bonus) * one.reciprocal(p_d + s_d[j] + x_d[j] * bonus)
        p_n, p_d = p_n * E + x_n[j], p_d * E + x_d[j]
        if j == 0:
            tl.store(p_centre + tl.zeros((N, BC), tl.int32), y, mask=m_tile & (o_n == 0) & is_first)
        if GATED:
            y = y * one.sigmoid(r[j])
        one.store_token(p_y, y, j, C, m_tile, left, EVEN)


@triton.jit
def forward_kernel(
    p_w, p_u,  # (C,)
    p_k, p_v, p_r,  # (B, T, C); r with GATED
    p_y,  # (B, T, C) contiguous: y, or sigmoid(r) y
    p_centre,  # (B, C) float32: y of the first token, which the backward takes from v
    p_sums,  # (5, B, S, C) float32: written here with WHOLE, else what comes to each tile
    T, C, S, span, plane,
    stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_rb, stride_rt, stride_rc,
    GATED: tl.constexpr, WHOLE: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write y of the ordinary channels: a program a tile, with WHOLE a (batch, channel block)."""
    plane = tl.cast(plane, tl.int64)
    if WHOLE:
        i_b, i_s, o_c, m_c = place(C, 1, BC)
    else:
        i_b, i_s, o_c, m_c = place(C, S, BC)
    w, u, m_c = decays(p_w, p_u, o_c, m_c, span, True)
    p_k += i_b * stride_kb + o_c * stride_kc
    p_v += i_b * stride_vb + o_c * stride_vc
    p_r += i_b * stride_rb + o_c * stride_rc
    p_y += i_b * T * C + o_c
    p_sums += i_b * S * C + o_c
    p_centre += i_b * C + o_c
    if any_of(m_c):
        first, last = i_s, i_s + 1
        if WHOLE:
            first, last = tl.zeros_like(i_s), tl.zeros_like(i_s) + S
            sum_whole(
                p_k, p_v, p_sums, plane, T, C, S, stride_kt, stride_vt,
                m_c, 0.0, w * one.LOG2_E, N, R, BC, ROWS, EVEN,
            )  # fmt: skip
        for i in range(first, last):
            o_n, o_t, m_tile, left = rows(i, T, m_c, N, R)
            mix_tile(
                p_k + o_t * stride_kt, p_v + o_t * stride_vt, p_r + o_t * stride_rt, p_y + o_t * C, p_centre,
                p_sums + i * C, plane, C, stride_kt, stride_vt, stride_rt, m_tile, left, m_c, w, u, o_n, i == 0,
                GATED, N, R, BC, EVEN,
            )  # fmt: skip


@triton.jit
def forward_carried_kernel(
    p_w, p_u,  # (C,)
    p_k, p_v, p_r,  # (B, T, C); r with GATED
    p_y,  # (B, T, C) contiguous
    p_centre,  # (B, C) float32
    p_scale, p_states,  # (B, steps, C) float64 and (2, B, steps, C) float32: room for what comes to each step
    T, C, steps, span, plane,
    stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_rb, stride_rt, stride_rc,
    GATED: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write y of all other channels: a program a (batch, channel block)."""
    plane = tl.cast(plane, tl.int64)
    i_b, _, o_c, m_c = place(C, 1, BC)
    w, u, m_c = decays(p_w, p_u, o_c, m_c, span, False)
    if any_of(m_c):
        at = i_b * steps * C + o_c
        carried.forward(
            w, u, p_k + i_b * stride_kb + o_c * stride_kc, p_v + i_b * stride_vb + o_c * stride_vc,
            p_r + i_b * stride_rb + o_c * stride_rc, p_y + i_b * T * C + o_c, p_centre + i_b * C + o_c,
            p_scale + at, p_states + at, T, C, steps, plane, stride_kt, stride_vt, stride_rt, m_c, GATED, N,
        )  # fmt: skip
