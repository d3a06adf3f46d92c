"""Bi-WKV's Triton arithmetic for ordinary channels: one maximum per (batch, channel) and two linear scans.

Here are the pieces of which the kernels in `triton_forward.py` and `triton_backward.py` are made; channels that one
maximum does not hold take `triton_carried_maximum.py`. The derivation is in `README.md`.

A tile is N x R tokens by BC channels, held as R tensors (N, BC): row n is a run of R tokens, and the tokens of a run
are the steps of an unrolled loop. So a scan along a run is one multiply-add a token in one thread's registers,
and only the N sums of the runs meet across threads. Between tiles, sums go through a small buffer in memory.
Sums are pairs (n, d), numerator and denominator, or the gradient's (g, h). Decays are in units of log 2:
E = exp(-w) = exp2(-w2).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# What Triton passes for an argument has no Python type; each is described where it is named.

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # the maximum of no keys: finite, so that -inf less it is -inf and not NaN


@triton.jit
def exp2(x):
    """2^x by the hardware's instruction, without the guards that keep results below 1e-38."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """1 / x by the hardware's instruction."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def sigmoid(x):
    """The gate, in float32."""
    return reciprocal(1.0 + exp2(x.to(tl.float32) * -LOG2_E))


@triton.jit
def load_tile(
    p_x,  # (N, BC) each run's first token
    stride_t,
    m_tile,  # (N, BC)
    left,  # (N, 1) tokens from the run's first to the end of the sequence
    other,  # where there is no token
    R: tl.constexpr,
    EVEN: tl.constexpr,  # whether tiles divide the sequence and the channels, so that nothing is masked
):
    """The tile's tokens, a tuple over R of (N, BC) in the tensor's dtype."""
    x = ()
    for j in tl.static_range(R):
        x_j = tl.load(p_x) if EVEN else tl.load(p_x, mask=m_tile & (left > j), other=other)
        x = x + (x_j,)
        p_x += stride_t
    return x


@triton.jit
def store_token(p_x, x, j: tl.constexpr, C, m_tile, left, EVEN: tl.constexpr):
    """Write token j of every run, (N, BC), to a contiguous tensor."""
    p_x += tl.cast(j, tl.int64) * C
    if EVEN:
        tl.store(p_x, x.to(p_x.dtype.element_ty), mask=m_tile)
    else:
        tl.store(p_x, x.to(p_x.dtype.element_ty), mask=m_tile & (left > j))


@triton.jit
def weigh(k, v, m2, centre, R: tl.constexpr):
    """x = (e (v - centre), e) with e = exp(k) / exp2(m2), as tuples over R tokens."""
    x_n, x_d = (), ()
    for j in tl.static_range(R):
        e = exp2(k[j].to(tl.float32) * LOG2_E - m2)
        x_n = x_n + ((v[j].to(tl.float32) - centre) * e,)
        x_d = x_d + (e,)
    return x_n, x_d


@triton.jit
def scan_right(x_n, x_d, E, n, d, R: tl.constexpr):
    """The state S <- E S + x after R tokens, from the state (n, d) before them."""
    for j in tl.static_range(R):
        n = n * E + x_n[j]
        d = d * E + x_d[j]
    return n, d


@triton.jit
def scan_left(x_n, x_d, E, n, d, R: tl.constexpr):
    """The same from right to left."""
    for j in tl.static_range(R - 1, -1, -1):
        n = n * E + x_n[j]
        d = d * E + x_d[j]
    return n, d


@triton.jit
def run_sums(x_n, x_d, E, zero, R: tl.constexpr):
    """The sums of R tokens toward their right end (u) and toward their left end (d)."""
    u_n, u_d = scan_right(x_n, x_d, E, zero, zero, R)
    d_n, d_d = scan_left(x_n, x_d, E, zero, zero, R)
    return u_n, u_d, d_n, d_d


@triton.jit
def states_from_right(x_n, x_d, E, n, d, R: tl.constexpr):
    """What comes from the right at each of R tokens, as tuples, from the state (n, d) after them."""
    s_n, s_d = (n,), (d,)
    for j in tl.static_range(R - 1, 0, -1):
        n = n * E + x_n[j]
        d = d * E + x_d[j]
        s_n = (n,) + s_n
        s_d = (d,) + s_d
    return s_n, s_d


@triton.jit
def _append(i1_n, i1_d, x1_n, x1_d, i2_n, i2_d, x2_n, x2_d):
    return i1_n + i2_n, i1_d + i2_d, i1_n + x2_n, i1_d + x2_d


@triton.jit
def sums_before(n, d, reverse: tl.constexpr):
    """The sum of the rows before each row (after it, with `reverse`): not total less own, which would cancel."""
    zero = tl.zeros(n.shape, tl.float32)
    _, _, x_n, x_d = tl.associative_scan((n, d, zero, zero), 0, _append, reverse=reverse)
    return x_n, x_d


@triton.jit
def entering(
    u_n, u_d, d_n, d_d,  # (N, BC) the runs' sums, toward their right ends (u) and left ends (d)
    past_n, past_d, future_n, future_d,  # (1, BC) what comes to the tile from the left and from the right
    w2, o_n, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What comes to each run from the left and from the right, (N, BC)."""
    p_n, p_d = pass_on(u_n, u_d, past_n, past_d, w2, o_n, N, R, False)
    f_n, f_d = pass_on(d_n, d_d, future_n, future_d, w2, (N - 1) - o_n, N, R, True)
    return p_n, p_d, f_n, f_d


@triton.jit
def pass_on(
    n,
    d,  # (N, BC) sums of rows of L tokens, at the end toward the rows that they go to
    past_n,
    past_d,  # (1, BC) what comes to the first row
    w2,
    o_n,  # (N, 1) each row's place in the direction of the sums
    count,  # rows that there are
    L: tl.constexpr,
    reverse: tl.constexpr,  # whether that direction is from the last row to the first
):
    """What comes to each row from the rows before it and from before all of them."""
    age = o_n.to(tl.float32) * L
    decay = exp2(-w2 * age)
    # Weights exp(+-w t) turn decaying sums into plain ones; counted from the middle they stay in range.
    middle = tl.cast(count, tl.float32) * (L / 2)
    up, down = exp2(w2 * (age - middle)), exp2(-w2 * (age - middle - L))
    s_n, s_d = sums_before(n * up, d * up, reverse)
    return past_n * decay + s_n * down, past_d * decay + s_d * down


@triton.jit
def leaving(u_n, u_d, d_n, d_d, w2, o_n, L: tl.constexpr, N: tl.constexpr):
    """The sums (1, BC) of all rows toward the tile's right end and toward its left end."""
    age = o_n.to(tl.float32) * L
    to_right, to_left = exp2(-w2 * ((N - 1) * L - age)), exp2(-w2 * age)
    return (
        tl.sum(u_n * to_right, 0, keep_dims=True),
        tl.sum(u_d * to_right, 0, keep_dims=True),
        tl.sum(d_n * to_left, 0, keep_dims=True),
        tl.sum(d_d * to_left, 0, keep_dims=True),
    )


@triton.jit
def exchange(
    p_sums,  # (1, BC) the batch's first tile, in planes u_n, u_d, d_n, d_d and with HAS_MAXIMUM m2
    plane, S, C, m_c, w2, L: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, HAS_MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Turn the S tiles' sums, in place, into what comes to each tile from the left (u) and from the right (d).

    And each tile's maximum into that of them all, in whose units the results are.
    """
    o_s = tl.arange(0, ROWS)[:, None]
    top = tl.zeros((1, BC), tl.float32) + LOWEST
    if HAS_MAXIMUM:
        for first in range(0, S, ROWS):
            o = (first + o_s).to(tl.int64)
            m2 = tl.load(p_sums + 4 * plane + o * C, mask=m_c & (o < S), other=LOWEST)
            top = tl.maximum(top, tl.max(m2, 0, keep_dims=True))
    for reverse in tl.static_range(2):
        past_n, past_d = tl.zeros((1, BC), tl.float32), tl.zeros((1, BC), tl.float32)
        p_rows = p_sums + 2 * reverse * plane
        for step in range(tl.cdiv(S, ROWS)):
            first = step * ROWS
            if reverse:
                first = (tl.cdiv(S, ROWS) - 1 - step) * ROWS
            count = tl.minimum(S - first, ROWS)
            o = (first + o_s).to(tl.int64)
            m = m_c & (o < S)
            n, d = (
                tl.load(p_rows + o * C, mask=m, other=0.0),
                tl.load(p_rows + plane + o * C, mask=m, other=0.0),
            )
            if HAS_MAXIMUM:
                f = exp2(tl.load(p_sums + 4 * plane + o * C, mask=m, other=LOWEST) - top)
                n, d = n * f, d * f
            o_n = tl.minimum(o_s, count)
            if reverse:
                o_n = tl.maximum(count - 1 - o_s, 0)
            s_n, s_d = pass_on(n, d, past_n, past_d, w2, o_n, count, L, reverse == 1)
            tl.store(p_rows + o * C, s_n, mask=m)
            tl.store(p_rows + plane + o * C, s_d, mask=m)
            age = exp2(-w2 * (tl.maximum(count - 1 - o_n, 0) * L).to(tl.float32))
            whole = exp2(-w2 * tl.cast(count * L, tl.float32))
            past_n = past_n * whole + tl.sum(n * age, 0, keep_dims=True)
            past_d = past_d * whole + tl.sum(d * age, 0, keep_dims=True)
    if HAS_MAXIMUM:
        tl.debug_barrier()  # every thread has read the tiles' own maxima
        for first in range(0, S, ROWS):
            o = (first + o_s).to(tl.int64)
            tl.store(p_sums + 4 * plane + o * C, top + tl.zeros((ROWS, BC), tl.float32), mask=m_c & (o < S))


@triton.jit
def store_sums(p_sums, plane, m_c, u_n, u_d, d_n, d_d):
    """Write one tile's sums (1, BC)."""
    tl.store(p_sums, u_n, mask=m_c)
    tl.store(p_sums + plane, u_d, mask=m_c)
    tl.store(p_sums + 2 * plane, d_n, mask=m_c)
    tl.store(p_sums + 3 * plane, d_d, mask=m_c)


@triton.jit
def load_sums(p_sums, plane, m_c):
    """Read what `exchange` made of them."""
    return (
        tl.load(p_sums, mask=m_c, other=0.0),
        tl.load(p_sums + plane, mask=m_c, other=0.0),
        tl.load(p_sums + 2 * plane, mask=m_c, other=0.0),
        tl.load(p_sums + 3 * plane, mask=m_c, other=0.0),
    )


@triton.jit
def source_sums(
    p_k, p_v,  # (N, BC) each run's first token
    p_sums, plane, stride_kt, stride_vt, m_tile, left, m_c, centre, w2, o_n,
    N: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write the sums of one tile's sources and their maximum, in its units."""
    k = load_tile(p_k, stride_kt, m_tile, left, float("-inf"), R, EVEN)
    v = load_tile(p_v, stride_vt, m_tile, left, 0.0, R, EVEN)
    m2 = k[0].to(tl.float32) * LOG2_E
    for j in tl.static_range(1, R):
        m2 = tl.maximum(m2, k[j].to(tl.float32) * LOG2_E)
    top = tl.maximum(tl.max(m2, 0, keep_dims=True), LOWEST)
    x_n, x_d = weigh(k, v, top, centre, R)
    zero = tl.zeros(m2.shape, tl.float32)
    E = exp2(-w2)
    u_n, u_d, d_n, d_d = run_sums(x_n, x_d, E, zero, R)
    u_n, u_d, d_n, d_d = leaving(u_n, u_d, d_n, d_d, w2, o_n, R, N)
    store_sums(p_sums, plane, m_c, u_n, u_d, d_n, d_d)
    tl.store(p_sums + 4 * plane, top, mask=m_c)
