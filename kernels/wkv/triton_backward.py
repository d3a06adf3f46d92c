"""The backward kernels of Bi-WKV's Triton backend; programs and launches are cut as in `triton_forward.py`.

The gradients of the decays leave as one row a program; `triton.py` adds the rows up, always in the same order. The
equations are in `README.md`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# What Triton passes for an argument has no Python type; each is described where it is named.

import triton
import triton.language as tl

from drwkv.kernels.wkv import triton_carried_maximum as carried
from drwkv.kernels.wkv import triton_one_maximum as one
from drwkv.kernels.wkv.triton_forward import any_of, decays, place, rows, sum_whole


@triton.jit
def read_tile(
    p_k, p_v, p_r, p_gy,  # (N, BC) each run's first token
    p_gr,  # likewise; written with GATED and WRITES
    p_sums, plane, C, stride_kt, stride_vt, stride_rt, stride_gt, m_tile, left, m_c, w2, bonus, centre, o_n,
    GATED: tl.constexpr, WRITES: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile's sources x, its readers (g, h) = (gy / den, gy y / den), and the states s that come from the right.

    Also the decay's gradient: what the runs have in themselves of the products of the readers' future and the
    sources' past, and the factors z of that future where it comes from outside the run.
    """
    k = one.load_tile(p_k, stride_kt, m_tile, left, float("-inf"), R, EVEN)
    v = one.load_tile(p_v, stride_vt, m_tile, left, 0.0, R, EVEN)
    gy = one.load_tile(p_gy, stride_gt, m_tile, left, 0.0, R, EVEN)
    if GATED:
        r = one.load_tile(p_r, stride_rt, m_tile, left, 0.0, R, EVEN)
    past_n, past_d, future_n, future_d = one.load_sums(p_sums, plane, m_c)
    top = tl.load(p_sums + 4 * plane, mask=m_c, other=0.0)
    E = one.exp2(-w2)
    x_n, x_d = one.weigh(k, v, top, centre, R)
    zero = tl.zeros((N, BC), tl.float32)
    u_n, u_d, d_n, d_d = one.run_sums(x_n, x_d, E, zero, R)
    p_n, p_d, f_n, f_d = one.entering(u_n, u_d, d_n, d_d, past_n, past_d, future_n, future_d, w2, o_n, R, N)
    s_n, s_d = one.states_from_right(x_n, x_d, E, f_n, f_d, R)

    # sum_s f_s l_s, for f the readers' future and l the sources' past, is sum_t g_t z_t + f z with the z of l.
    g_n, g_d, between, z_n, z_d = (), (), zero, zero, zero
    for j in tl.static_range(R):
        inverse = one.reciprocal(p_d + s_d[j] + x_d[j] * bonus)
        y = (p_n + s_n[j] + x_n[j] * bonus) * inverse
        g = gy[j].to(tl.float32)
        if GATED:
            gate = one.sigmoid(r[j])
            if WRITES:
                gr = g * (y + centre) * gate * (1.0 - gate)
                one.store_token(p_gr, gr, j, C, m_tile, left, EVEN)
            g = g * gate
        g *= inverse
        g_n, g_d = g_n + (g,), g_d + (g * y,)
        between += g * (z_n - y * z_d)
        z_n, z_d = z_n * E + p_n, z_d * E + p_d
        p_n, p_d = p_n * E + x_n[j], p_d * E + x_d[j]
    return x_n, x_d, g_n, g_d, s_n, s_d, between, z_n, z_d


@triton.jit
def sum_readers(
    p_k, p_v, p_r, p_gy,  # (N, BC) each run's first token
    p_sums, p_grad_sums,  # (1, BC) the tile's
    plane, C, stride_kt, stride_vt, stride_rt, stride_gt, m_tile, left, m_c, w2, bonus, centre, o_n,
    GATED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the sums of one tile's readers."""
    _, _, g_n, g_d, _, _, _, _, _ = read_tile(
        p_k, p_v, p_r, p_gy, p_gy, p_sums, plane, C, stride_kt, stride_vt, stride_rt, stride_gt,
        m_tile, left, m_c, w2, bonus, centre, o_n, GATED, False, N, R, BC, EVEN,
    )  # fmt: skip
    E, zero = one.exp2(-w2), tl.zeros((N, BC), tl.float32)
    u_n, u_d, d_n, d_d = one.run_sums(g_n, g_d, E, zero, R)
    u_n, u_d, d_n, d_d = one.leaving(u_n, u_d, d_n, d_d, w2, o_n, R, N)
    one.store_sums(p_grad_sums, plane, m_c, u_n, u_d, d_n, d_d)


@triton.jit
def differentiate_tile(
    p_k, p_v, p_r, p_gy, p_gk, p_gv, p_gr,  # (N, BC) each run's first token
    p_sums, p_grad_sums,  # (1, BC) the tile's
    plane, C, stride_kt, stride_vt, stride_rt, stride_gt, m_tile, left, m_c, w2, bonus, centre, o_n,
    GATED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k, v and r of one tile; its part of those of w and u, (N, BC)."""
    x_n, x_d, g_n, g_d, s_n, s_d, between, z_n, z_d = read_tile(
        p_k, p_v, p_r, p_gy, p_gr, p_sums, plane, C, stride_kt, stride_vt, stride_rt, stride_gt,
        m_tile, left, m_c, w2, bonus, centre, o_n, GATED, True, N, R, BC, EVEN,
    )  # fmt: skip
    E, zero = one.exp2(-w2), tl.zeros((N, BC), tl.float32)
    past_n, past_d, future_n, future_d = one.load_sums(p_grad_sums, plane, m_c)
    u_n, u_d, d_n, d_d = one.run_sums(g_n, g_d, E, zero, R)
    p_n, p_d, f_n, f_d = one.entering(u_n, u_d, d_n, d_d, past_n, past_d, future_n, future_d, w2, o_n, R, N)

    # From left to right: the readers' past meets the sources' future.
    between += f_n * z_n - f_d * z_d
    own, a_n, a_d = zero, (), ()
    for j in tl.static_range(R):
        between += p_n * s_n[j] - p_d * s_d[j]
        own += g_n[j] * x_n[j] - g_d[j] * x_d[j]
        a_n, a_d = a_n + (p_n + g_n[j] * bonus,), a_d + (p_d + g_d[j] * bonus,)
        p_n, p_d = p_n * E + g_n[j], p_d * E + g_d[j]

    # From right to left: their future, and the parts together are the gradients.
    for j in tl.static_range(R - 1, -1, -1):
        all_n, all_d = a_n[j] + f_n, a_d[j] + f_d
        gk = x_n[j] * all_n - x_d[j] * all_d
        one.store_token(p_gk, gk, j, C, m_tile, left, EVEN)
        one.store_token(p_gv, x_d[j] * all_n, j, C, m_tile, left, EVEN)
        f_n, f_d = f_n * E + g_n[j], f_d * E + g_d[j]
    return between, own


@triton.jit
def backward_kernel(
    p_w, p_u,  # (C,)
    p_k, p_v, p_r, p_gy,  # (B, T, C); r with GATED
    p_centre,  # (B, C) float32
    p_gk, p_gv, p_gr,  # (B, T, C) contiguous; gr with GATED
    p_gw, p_gu,  # (B, S, C) float32, with WHOLE (B, 1, C): this program's part of the decays' gradients
    p_sums, p_grad_sums,  # (5, B, S, C), (4, B, S, C) float32: written here with WHOLE, else what comes to each tile
    T, C, S, span, plane,
    stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_rb, stride_rt, stride_rc,
    stride_gb, stride_gt, stride_gc,
    GATED: tl.constexpr, WHOLE: tl.constexpr, READERS: tl.constexpr, GRADIENTS: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """WHOLE: all in one. Else a launch with READERS alone, `exchange_kernel`, and one with GRADIENTS alone."""
    plane = tl.cast(plane, tl.int64)
    if WHOLE:
        i_b, i_s, o_c, m_c = place(C, 1, BC)
    else:
        i_b, i_s, o_c, m_c = place(C, S, BC)
    w, u, m_c = decays(p_w, p_u, o_c, m_c, span, True)
    w2, bonus = w * one.LOG2_E, one.exp2(u * one.LOG2_E)
    centre = tl.load(p_centre + i_b * C + o_c, mask=m_c, other=0.0)
    p_k += i_b * stride_kb + o_c * stride_kc
    p_v += i_b * stride_vb + o_c * stride_vc
    p_r += i_b * stride_rb + o_c * stride_rc
    p_gy += i_b * stride_gb + o_c * stride_gc
    p_gk += i_b * T * C + o_c
    p_gv += i_b * T * C + o_c
    p_gr += i_b * T * C + o_c
    p_sums += i_b * S * C + o_c
    p_grad_sums += i_b * S * C + o_c
    if any_of(m_c):
        first, last = i_s, i_s + 1
        if WHOLE:
            first, last = tl.zeros_like(i_s), tl.zeros_like(i_s) + S
            sum_whole(
                p_k, p_v, p_sums, plane, T, C, S, stride_kt, stride_vt,
                m_c, centre, w2, N, R, BC, ROWS, EVEN,
            )  # fmt: skip
        if READERS:
            for i in range(first, last):
                o_n, o_t, m_tile, left = rows(i, T, m_c, N, R)
                sum_readers(
                    p_k + o_t * stride_kt, p_v + o_t * stride_vt, p_r + o_t * stride_rt, p_gy + o_t * stride_gt,
                    p_sums + i * C, p_grad_sums + i * C, plane, C, stride_kt, stride_vt, stride_rt, stride_gt,
                    m_tile, left, m_c, w2, bonus, centre, o_n, GATED, N, R, BC, EVEN,
                )  # fmt: skip
        if WHOLE:
            tl.debug_barrier()
            one.exchange(p_grad_sums, plane, S, C, m_c, w2, N * R, BC, ROWS, False)
            tl.debug_barrier()
        if GRADIENTS:
            between, own = tl.zeros((N, BC), tl.float32), tl.zeros((N, BC), tl.float32)
            for i in range(first, last):
                o_n, o_t, m_tile, left = rows(i, T, m_c, N, R)
                tile_between, tile_own = differentiate_tile(
                    p_k + o_t * stride_kt, p_v + o_t * stride_vt, p_r + o_t * stride_rt, p_gy + o_t * stride_gt,
                    p_gk + o_t * C, p_gv + o_t * C, p_gr + o_t * C,
                    p_sums + i * C, p_grad_sums + i * C, plane, C, stride_kt, stride_vt, stride_rt, stride_gt,
                    m_tile, left, m_c, w2, bonus, centre, o_n, GATED, N, R, BC, EVEN,
                )  # fmt: skip
                between += tile_between
                own += tile_own
            part = i_b if WHOLE else i_b * S + i_s
            at_part = part * C + o_c
            tl.store(p_gw + at_part, -one.exp2(-w2) * tl.sum(between, 0, keep_dims=True), mask=m_c)
            tl.store(p_gu + at_part, bonus * tl.sum(own, 0, keep_dims=True), mask=m_c)


@triton.jit
def backward_carried_kernel(
    p_w, p_u,  # (C,)
    p_k, p_v, p_r, p_gy,  # (B, T, C); r with GATED
    p_centre,  # (B, C) float32
    p_gk, p_gv, p_gr,  # (B, T, C) contiguous; gr with GATED
    p_gw, p_gu,  # (B, parts, C) float32: the first part is written, the others set to zero
    p_scale, p_states,  # (3, B, steps, C) float64, (3, 2, B, steps, C) float32: room for what comes to each step
    T, C, steps, span, plane, parts,
    stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_rb, stride_rt, stride_rc,
    stride_gb, stride_gt, stride_gc,
    GATED: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All gradients of all other channels: a program a (batch, channel block)."""
    plane = tl.cast(plane, tl.int64)
    i_b, _, o_c, m_c = place(C, 1, BC)
    w, u, m_c = decays(p_w, p_u, o_c, m_c, span, False)
    if any_of(m_c):
        at = i_b * steps * C + o_c
        gw, gu = carried.backward(
            w, u, tl.load(p_centre + i_b * C + o_c, mask=m_c, other=0.0),
            p_k + i_b * stride_kb + o_c * stride_kc, p_v + i_b * stride_vb + o_c * stride_vc,
            p_r + i_b * stride_rb + o_c * stride_rc, p_gy + i_b * stride_gb + o_c * stride_gc,
            p_gk + i_b * T * C + o_c, p_gv + i_b * T * C + o_c, p_gr + i_b * T * C + o_c,
            p_scale + at, p_states + at, T, C, steps, plane,
            stride_kt, stride_vt, stride_rt, stride_gt, m_c, GATED, N,
        )  # fmt: skip
        for part in range(1, parts):
            tl.store(p_gw + (i_b * parts + part) * C + o_c, tl.zeros((1, BC), tl.float32), mask=m_c)
            tl.store(p_gu + (i_b * parts + part) * C + o_c, tl.zeros((1, BC), tl.float32), mask=m_c)
        tl.store(p_gw + i_b * parts * C + o_c, gw, mask=m_c)
        tl.store(p_gu + i_b * parts * C + o_c, gu, mask=m_c)
