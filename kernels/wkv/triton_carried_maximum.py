"""Bi-WKV's Triton arithmetic for any channel: every sum carries its own maximum (scale, n, d).

The slow and general path, for channel blocks of large |w| T or |u|. One program walks over the whole sequence in
steps of N tokens, (N, BC) tiles, to the left and to the right in turn; what comes to a step waits in a small
buffer in memory. Scales are logarithms to base 2 in float64: at |w| T = 1e6 float32 would have lost them.
A sum (s, n, d) stands for exp2(s) (n, d). The equations are in `README.md`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# What Triton passes for an argument has no Python type; each is described where it is named.

import triton
import triton.language as tl

from drwkv.kernels.wkv.triton_one_maximum import LOG2_E, exp2, reciprocal, sigmoid

EMPTY = tl.constexpr(-1.0e300)  # the scale of an empty sum: finite, so that the difference of two is no NaN


@triton.jit
def add(s1, n1, d1, s2, n2, d2):
    """The sum of two sums, at the larger of their scales."""
    s = tl.maximum(s1, s2)
    f1, f2 = exp2((s1 - s).to(tl.float32)), exp2((s2 - s).to(tl.float32))
    return s, n1 * f1 + n2 * f2, d1 * f1 + d2 * f2


@triton.jit
def _append(i1_s, i1_n, i1_d, x1_s, x1_n, x1_d, i2_s, i2_n, i2_d, x2_s, x2_n, x2_d):
    i_s, i_n, i_d = add(i1_s, i1_n, i1_d, i2_s, i2_n, i2_d)
    x_s, x_n, x_d = add(i1_s, i1_n, i1_d, x2_s, x2_n, x2_d)
    return i_s, i_n, i_d, x_s, x_n, x_d


@triton.jit
def total(s, n, d):
    """All rows in one sum (1, BC)."""
    top = tl.max(s, 0, keep_dims=True)
    f = exp2((s - top).to(tl.float32))
    return top, tl.sum(n * f, 0, keep_dims=True), tl.sum(d * f, 0, keep_dims=True)


@triton.jit
def sums_before(s, n, d, enter_s, enter_n, enter_d, reverse: tl.constexpr):
    """What comes to each row: the rows before it (after it, with `reverse`) and what comes to the step."""
    x_s = tl.zeros(s.shape, tl.float64) + EMPTY
    zero = tl.zeros(n.shape, tl.float32)
    _, _, _, x_s, x_n, x_d = tl.associative_scan((s, n, d, x_s, zero, zero), 0, _append, reverse=reverse)
    return add(x_s, x_n, x_d, enter_s, enter_n, enter_d)


@triton.jit
def two_sided(key, n, d, t, w, past_s, past_n, past_d, future_s, future_n, future_d):
    """What comes to each of a step's tokens from the left and from the right, on the scale of that token.

    Token i is summed at the scale key_i + w i for readers on its right, who take off w (t - 1), and at key_i - w i
    for those on its left, who add w (t + 1).
    """
    l_s, l_n, l_d = sums_before(key + w * t, n, d, past_s, past_n, past_d, False)
    r_s, r_n, r_d = sums_before(key - w * t, n, d, future_s, future_n, future_d, True)
    return l_s - w * (t - 1), l_n, l_d, r_s + w * (t + 1), r_n, r_d


@triton.jit
def everything(key, n, d, u, l_s, l_n, l_d, r_s, r_n, r_d):
    """All that a token sees: the left, the right and itself."""
    s, a, b = add(l_s, l_n, l_d, r_s, r_n, r_d)
    return add(s, a, b, key + u, n, d)


@triton.jit
def load_step(p_x, stride_t, t, m, other):
    """One token a row, (N, BC) float32."""
    return tl.load(p_x + t * stride_t, mask=m, other=other).to(tl.float32)


@triton.jit
def load_sources(p_k, p_v, stride_kt, stride_vt, t, m, centre):
    """Keys as scales, values less `centre`, and ones."""
    s = load_step(p_k, stride_kt, t, m, float("-inf")).to(tl.float64) * LOG2_E
    n = load_step(p_v, stride_vt, t, m, 0.0) - centre
    return tl.where(s < EMPTY, EMPTY, s), n, tl.zeros(n.shape, tl.float32) + 1.0


@triton.jit
def keep(p_scale, p_states, plane, at, m_c, s, n, d):
    """Write a state (1, BC) to a row of the buffers."""
    tl.store(p_scale + at, s, mask=m_c)
    tl.store(p_states + at, n, mask=m_c)
    tl.store(p_states + plane + at, d, mask=m_c)


@triton.jit
def kept(p_scale, p_states, plane, at, m_c):
    """Read a state (1, BC) back."""
    s = tl.load(p_scale + at, mask=m_c, other=EMPTY)
    n = tl.load(p_states + at, mask=m_c, other=0.0)
    return s, n, tl.load(p_states + plane + at, mask=m_c, other=0.0)


@triton.jit
def nothing(w):
    """The empty sum (1, BC)."""
    zero = tl.zeros(w.shape, tl.float32)
    return tl.zeros(w.shape, tl.float64) + EMPTY, zero, zero


@triton.jit
def keep_sources(
    p_k, p_v, p_scale, p_states, plane, T, C, steps, stride_kt, stride_vt, w, centre, m_c,
    reverse: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write what comes to each step from the left, with `reverse` from the right."""
    sign: tl.constexpr = -1 if reverse else 1
    s, n, d = nothing(w)
    for step in range(steps):
        i = tl.cast(step, tl.int64)
        if reverse:
            i = steps - 1 - i
        keep(p_scale, p_states, plane, i * C, m_c, s, n, d)
        t = i * N + tl.arange(0, N)[:, None]
        key, x_n, x_d = load_sources(p_k, p_v, stride_kt, stride_vt, t, m_c & (t < T), centre)
        t_s, t_n, t_d = total(key + sign * w * t, x_n, x_d)
        s, n, d = add(s, n, d, t_s, t_n, t_d)


@triton.jit
def forward(
    w, u,  # (1, BC) float32
    p_k, p_v, p_r, p_y,  # (1, BC) the first token
    p_centre, p_scale, p_states,  # (1, BC)
    T, C, steps, plane, stride_kt, stride_vt, stride_rt, m_c,
    GATED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write y."""
    w, u = w.to(tl.float64) * LOG2_E, u.to(tl.float64) * LOG2_E
    keep_sources(p_k, p_v, p_scale, p_states, plane, T, C, steps, stride_kt, stride_vt, w, 0.0, m_c, True, N)
    tl.debug_barrier()  # what one thread kept, others read
    s, n, d = nothing(w)
    for step in range(steps):
        i = tl.cast(step, tl.int64)
        t = i * N + tl.arange(0, N)[:, None]
        m = m_c & (t < T)
        key, x_n, x_d = load_sources(p_k, p_v, stride_kt, stride_vt, t, m, 0.0)
        f_s, f_n, f_d = kept(p_scale, p_states, plane, i * C, m_c)
        l_s, l_n, l_d, r_s, r_n, r_d = two_sided(key, x_n, x_d, t, w, s, n, d, f_s, f_n, f_d)
        _, num, den = everything(key, x_n, x_d, u, l_s, l_n, l_d, r_s, r_n, r_d)
        y = num * reciprocal(den)
        tl.store(p_centre + tl.zeros(y.shape, tl.int32), y, mask=m & (t == 0))
        if GATED:
            y = y * sigmoid(load_step(p_r, stride_rt, t, m, 0.0))
        tl.store(p_y + t * C, y.to(p_y.dtype.element_ty), mask=m)
        t_s, t_n, t_d = total(key + w * t, x_n, x_d)
        s, n, d = add(s, n, d, t_s, t_n, t_d)


@triton.jit
def read_step(
    p_k, p_v, p_r, p_gy, p_gr, p_scale, p_states, C, i, t, plane, stride_kt, stride_vt, stride_rt, stride_gt,
    w, u, centre, m_c, m, GATED: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """A step's sources, what comes to each from both sides, and its readers at the scale -log den: (gy, gy y)."""
    key, x_n, x_d = load_sources(p_k, p_v, stride_kt, stride_vt, t, m, centre)
    f_s, f_n, f_d = kept(p_scale, p_states, plane, i * C, m_c)
    b_s, b_n, b_d = kept(p_scale + plane, p_states + 2 * plane, plane, i * C, m_c)
    l_s, l_n, l_d, r_s, r_n, r_d = two_sided(key, x_n, x_d, t, w, b_s, b_n, b_d, f_s, f_n, f_d)
    s, num, den = everything(key, x_n, x_d, u, l_s, l_n, l_d, r_s, r_n, r_d)
    y = num * reciprocal(den)
    g = load_step(p_gy, stride_gt, t, m, 0.0)
    if GATED:
        gate = sigmoid(load_step(p_r, stride_rt, t, m, 0.0))
        if WRITES:
            tl.store(p_gr + t * C, (g * (y + centre) * gate * (1.0 - gate)).to(p_gr.dtype.element_ty), mask=m)
        g = g * gate
    scale = tl.where(m, -(s + tl.log2(den).to(tl.float64)), EMPTY)
    return key, x_n, l_s, l_n, l_d, r_s, r_n, r_d, scale, g, tl.where(m, g * y, 0.0)


@triton.jit
def products(l_s, l_n, l_d, r_s, r_n, r_d, w):
    """What sums from the left and from the right of one token give to the decay's gradient, less its sign."""
    return exp2((l_s + r_s - w).to(tl.float32)) * (l_n * r_n - l_d * r_d)


@triton.jit
def backward(
    w, u, centre,  # (1, BC) float32
    p_k, p_v, p_r, p_gy, p_gk, p_gv, p_gr,  # (1, BC) the first token
    p_scale, p_states,  # (1, BC)
    T, C, steps, plane, stride_kt, stride_vt, stride_rt, stride_gt, m_c,
    GATED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k, v and r; return those of w and u, (1, BC)."""
    w, u = w.to(tl.float64) * LOG2_E, u.to(tl.float64) * LOG2_E
    p_scale_grad, p_states_grad = p_scale + 2 * plane, p_states + 4 * plane
    keep_sources(
        p_k, p_v, p_scale, p_states, plane, T, C, steps, stride_kt, stride_vt, w, centre, m_c, True, N
    )
    keep_sources(
        p_k, p_v, p_scale + plane, p_states + 2 * plane, plane, T, C, steps, stride_kt, stride_vt,
        w, centre, m_c, False, N,
    )  # fmt: skip

    # From right to left: what comes to each step of the readers' sums from the right.
    tl.debug_barrier()  # what one thread kept, others read
    s, n, d = nothing(w)
    for step in range(steps):
        i = steps - 1 - tl.cast(step, tl.int64)
        keep(p_scale_grad, p_states_grad, plane, i * C, m_c, s, n, d)
        t = i * N + tl.arange(0, N)[:, None]
        _, _, _, _, _, _, _, _, scale, g, h = read_step(
            p_k, p_v, p_r, p_gy, p_gr, p_scale, p_states, C, i, t, plane, stride_kt, stride_vt, stride_rt, stride_gt,
            w, u, centre, m_c, m_c & (t < T), GATED, False,
        )  # fmt: skip
        t_s, t_n, t_d = total(scale - w * t, g, h)
        s, n, d = add(s, n, d, t_s, t_n, t_d)

    # From left to right: sources and readers together.
    tl.debug_barrier()
    s, n, d = nothing(w)
    gw_rows, gu_rows = tl.zeros((N, w.shape[1]), tl.float32), tl.zeros((N, w.shape[1]), tl.float32)
    for step in range(steps):
        i = tl.cast(step, tl.int64)
        t = i * N + tl.arange(0, N)[:, None]
        m = m_c & (t < T)
        key, x_n, l_s, l_n, l_d, r_s, r_n, r_d, scale, g, h = read_step(
            p_k, p_v, p_r, p_gy, p_gr, p_scale, p_states, C, i, t, plane, stride_kt, stride_vt, stride_rt, stride_gt,
            w, u, centre, m_c, m, GATED, True,
        )  # fmt: skip
        f_s, f_n, f_d = kept(p_scale_grad, p_states_grad, plane, i * C, m_c)
        gl_s, gl_n, gl_d, gr_s, gr_n, gr_d = two_sided(scale, g, h, t, w, s, n, d, f_s, f_n, f_d)
        a_s, a_n, a_d = everything(scale, g, h, u, gl_s, gl_n, gl_d, gr_s, gr_n, gr_d)
        weight = exp2((key + a_s).to(tl.float32))
        tl.store(p_gk + t * C, (weight * (x_n * a_n - a_d)).to(p_gk.dtype.element_ty), mask=m)
        tl.store(p_gv + t * C, (weight * a_n).to(p_gv.dtype.element_ty), mask=m)
        own = exp2((key + u + scale).to(tl.float32)) * (x_n * g - h)
        gu_rows += tl.where(m, own, 0.0)
        between = products(l_s, l_n, l_d, gr_s, gr_n, gr_d, w) + products(gl_s, gl_n, gl_d, r_s, r_n, r_d, w)
        gw_rows -= tl.where(m, between, 0.0)
        t_s, t_n, t_d = total(scale + w * t, g, h)
        s, n, d = add(s, n, d, t_s, t_n, t_d)
    return tl.sum(gw_rows, 0, keep_dims=True), tl.sum(gu_rows, 0, keep_dims=True)
