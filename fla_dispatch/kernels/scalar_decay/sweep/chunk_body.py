"""f(a, b, c) of equation (5) for one sequence, one head and one tile of E, chunk by chunk: equations (4) and (7).

Called by the kernels of this folder; it has no grid of its own. The state [D, BE] stays in registers; a, b, c are read once
and o is written once. Exponents are differences of cumulative log decays in the order of time, so none is positive.
With EXACT every operand that is rounded to the inputs' half precision (P, the state, weighted columns) enters as two terms,
which keeps row sums exact enough for gate gradients: (6) sums differences of them over the whole rest of the sequence.
No accumulator is transposed or fed back as a register operand after a transpose: f' recomputes b a^T instead.
"""

import triton
import triton.language as tl

from ..._shared.tiles import chunk_row, load_tile, rows_of, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_sums(p, b_y, b_x, m_t):
    """Row sums y . x in float32 to the pointers p [BT]."""
    tl.store(p, tl.sum(b_y.to(tl.float32) * b_x.to(tl.float32), 1), mask=m_t)


@triton.jit
def token_decays(b_G, total, m_p, REVERSE: tl.constexpr):
    """From cumulative log2 decays of a chunk [BT] and their total: decays to each row, to the chunk's end, and M of (4)."""
    if REVERSE:
        to_row = tl.exp2(total - b_G)
        to_end = tl.exp2(b_G)
        rel = b_G[None, :] - b_G[:, None]
    else:
        to_row = tl.exp2(b_G)
        to_end = tl.exp2(total - b_G)
        rel = b_G[:, None] - b_G[None, :]
    return to_row, to_end, tl.exp2(tl.where(m_p, rel, float("-inf")))


@triton.jit
def constant_decays(lg, o_f, n, m_t, BT: tl.constexpr, REVERSE: tl.constexpr):
    """The same for one log2 decay per token and n tokens left, of which the chunk has at most BT: total, to each row, to the end."""
    valid = tl.minimum(n, BT).to(tl.float32)
    total = valid * lg
    ahead = tl.exp2(o_f * lg)
    behind = tl.exp2(tl.where(m_t, (valid - o_f) * lg, float("-inf")))
    if REVERSE:
        return total, behind, ahead
    else:
        return total, ahead, behind


@triton.jit
def from_state(b_a, b_s, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a S with S rounded to a's dtype, [BT, BE]; EXACT: in two terms."""
    b_h = b_s.to(b_a.dtype)
    b_o = tl.dot(b_a, b_h, input_precision=PRECISION)
    if EXACT:
        b_o = tl.dot(b_a, (b_s - b_h.to(tl.float32)).to(b_a.dtype), b_o, input_precision=PRECISION)
    return b_o


@triton.jit
def add_weighted(b_s, b_b, b_c, weigh, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """S + b^T diag(weigh) c with the weighted columns rounded to c's dtype; EXACT: in two terms."""
    b_w32 = b_c.to(tl.float32) * weigh[:, None]
    b_cw = b_w32.to(b_c.dtype)
    b_s = tl.dot(tl.trans(b_b), b_cw, b_s, input_precision=PRECISION)
    if EXACT:
        b_s = tl.dot(tl.trans(b_b), (b_w32 - b_cw.to(tl.float32)).to(b_c.dtype), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def sweep_chunks(
    a,  # [T, D] rows, at the unit's first token and its head; None with OUTPUT off
    b,  # [T, D]
    c,  # [T, E]
    o,  # [T, E] or None
    x,  # [T, E] to take row sums o . x with, or None
    dot,  # [T] float32 row sums, stride HV
    dot_c,  # [T] float32 row sums c . x, stride HV, or None
    g,  # [T] cumulative log2 decays inside chunks (DECAY 2), or [1] log decay (DECAY 1)
    w,  # [T] float32 weights, stride HV, of rows (W 1) or columns (W 2)
    u,  # [T] float32, stride HV: the virtual ones column's partner (Z 2, 3, 4)
    skip,  # weight of c itself in o, or None
    s_in,  # [D, E] initial state, strides SR and SC, or None
    s_out,  # [D, E] final state, or None
    z_in,  # [D] (Z 1, 4) or [E] (Z 2, 3) initial extra row, or None
    z_out,  # the same, final
    r_out,  # [T] float32, stride HV: r_t of (3) (Z 1)
    g_out,  # [1] log2 decay of the whole unit, or None
    length,
    scale,
    eps,
    s_a,
    s_b,
    s_c,
    s_o,
    s_x,
    HV,
    i_e,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    SR: tl.constexpr,
    SC: tl.constexpr,
    DECAY: tl.constexpr,  # 0 none, 1 constant per head, 2 per token
    REVERSE: tl.constexpr,
    W: tl.constexpr,  # 0 none, 1 rows, 2 columns
    Z: tl.constexpr,  # 0 none, 1 normaliser over D, 2 extra row with u on rows, 3 with u on columns, 4 over D with u
    OUTPUT: tl.constexpr,
    EXACT: tl.constexpr,  # split every rounded operand into two terms: float32 sums of half-precision inputs
    TMA: tl.constexpr,  # tiles by tensor descriptors; rows then begin at multiples of 16 bytes
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    m_s = m_d[:, None] & m_e[None, :]
    p_s = o_d[:, None] * SR + o_e[None, :] * SC
    if s_in is not None:
        b_s = tl.load(s_in + p_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BD, BE], tl.float32)
    if Z != 0:  # reductions, not a 16-column product: narrow operands on 4 warps are miscompiled for sm90 (decision 0003)
        o_z = o_d if Z == 1 or Z == 4 else o_e
        m_z = m_d if Z == 1 or Z == 4 else m_e
        b_z = tl.zeros([BD if Z == 1 or Z == 4 else BE], tl.float32)
        if z_in is not None:
            b_z += tl.load(z_in + o_z, mask=m_z, other=0.0).to(tl.float32)
    m_p = (o_t[:, None] <= o_t[None, :]) if REVERSE else (o_t[:, None] >= o_t[None, :])
    if DECAY == 1:
        lg = tl.load(g).to(tl.float32) * LOG2E
        rel = (o_t[None, :] - o_t[:, None]) if REVERSE else (o_t[:, None] - o_t[None, :])
        b_m = tl.exp2(tl.where(m_p, rel.to(tl.float32) * lg, float("-inf")))
        o_f = (o_t + 1).to(tl.float32)
    unit_decay = 0.0
    NT = tl.cdiv(length, BT)
    rows_b = rows_of(b, length, s_b, D, BT, BD, TMA)
    rows_c = rows_of(c, length, s_c, E, BT, BE, TMA)
    if OUTPUT:
        rows_a = rows_of(a, length, s_a, D, BT, BD, TMA)
        rows_o = rows_of(o, length, s_o, E, BT, BE, TMA)
    if x is not None:
        rows_x = rows_of(x, length, s_x, E, BT, BE, TMA)
    if DECAY == 2:  # gates and weights come one chunk ahead: the compiler pipelines tiles alone, and a load in place stalls the loop
        i_n = (NT - 1) if REVERSE else NT * 0
        next_G = chunk_row(g, 1, i_n, length, BT)
        next_total = tl.load(g + tl.minimum(i_n * BT + BT, length) - 1, mask=length > 0, other=0.0)
        if W != 0:
            next_w = chunk_row(w, HV, i_n, length, BT)
    for i in tl.range(0, NT, num_stages=STAGES):
        i_t = (NT - 1 - i) if REVERSE else i
        n = length - i_t * BT
        m_t = o_t < n
        first = tl.cast(i_t * BT, tl.int64)
        b_b = load_tile(rows_b, length, s_b, i_t, 0, D, BT, BD, TMA)
        i_n = (i_t - 1) if REVERSE else (i_t + 1)
        if W != 0:
            if DECAY == 2:
                b_w = next_w
                next_w = chunk_row(w, HV, i_n, length, BT)
            else:
                b_w = chunk_row(w, HV, i_t, length, BT)
        if Z >= 2:
            b_u = chunk_row(u, HV, i_t, length, BT)
        # decays: to_row carries the incoming state to each row, to_end carries each column to the chunk's last boundary
        if DECAY == 2:
            total = next_total
            b_G = tl.where(m_t, next_G, total)  # unused rows decay no further
            next_G = chunk_row(g, 1, i_n, length, BT)
            next_total = tl.load(g + tl.minimum(i_n * BT + BT, length) - 1, mask=(i_n >= 0) & (i_n < NT), other=0.0)
            to_row, to_end, b_m = token_decays(b_G, total, m_p, REVERSE)
        elif DECAY == 1:
            total, to_row, to_end = constant_decays(lg, o_f, n, m_t, BT, REVERSE)
        if DECAY != 0 and g_out is not None:
            unit_decay += total
        if OUTPUT:
            b_a = load_tile(rows_a, length, s_a, i_t, 0, D, BT, BD, TMA)
            if EXACT:  # before P, whose registers two terms of the state would spill
                b_o = from_state(b_a, b_s, EXACT, PRECISION)
            b_p = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)  # [BT, BT]
            if Z == 2:
                b_p += b_u[:, None]
            if Z == 3:
                b_p += b_u[None, :]
            if DECAY == 0:
                b_p = tl.where(m_p, b_p, 0.0)
            else:
                b_p = b_p * b_m
            if W == 2:
                b_p *= b_w[None, :]
            if REVERSE:
                b_p *= scale
            b_c = load_tile(rows_c, length, s_c, i_t, i_e, E, BT, BE, TMA)  # not before P, beside which it would spill
            if not EXACT:
                b_o = from_state(b_a, b_s, EXACT, PRECISION)
            if DECAY != 0:
                b_o *= to_row[:, None]
            b_ph = b_p.to(b_c.dtype)
            b_o = tl.dot(b_ph, b_c, b_o, input_precision=PRECISION)  # (4)
            if EXACT:
                b_o = tl.dot((b_p - b_ph.to(tl.float32)).to(b_c.dtype), b_c, b_o, input_precision=PRECISION)
            if Z == 2 or Z == 3:
                lift = b_u if Z == 2 else tl.full([BT], 1.0, tl.float32)
                if DECAY != 0:
                    lift *= to_row
                b_o += lift[:, None] * b_z[None, :]
            if not REVERSE:
                b_o *= scale
            if Z == 1:
                b_n = tl.sum(b_a.to(tl.float32) * b_z[None, :], 1)
                if DECAY != 0:
                    b_n *= to_row
                b_r = 1.0 / (scale * (b_n + tl.sum(b_p, 1)) + eps)  # (3)
                b_o *= b_r[:, None]
                if i_e == 0:
                    tl.store(r_out + (first + o_t) * HV, b_r, mask=m_t)
            b_raw = b_o
            if W == 1:
                b_o *= b_w[:, None]
            if x is not None:  # reversed: before the row weight, because the sum is then the gradient of the weight
                b_x = load_tile(rows_x, length, s_x, i_t, i_e, E, BT, BE, TMA)
                store_sums(dot + (first + o_t) * HV, b_raw if REVERSE else b_o, b_x, m_t)
                if dot_c is not None:
                    store_sums(dot_c + (first + o_t) * HV, b_c, b_x, m_t)
            if skip is not None:  # (2) and (8): after scale and weights, which are the scan's
                b_o += skip * b_c.to(tl.float32)
            store_tile(rows_o, b_o, length, s_o, i_t, i_e, E, BT, BE, TMA)
        else:
            b_c = load_tile(rows_c, length, s_c, i_t, i_e, E, BT, BE, TMA)
        # (7)
        if DECAY != 0:
            b_s *= tl.exp2(total)
        if W == 2 or DECAY != 0 or REVERSE or Z != 0:
            weigh = tl.full([BT], 1.0, tl.float32)
            if DECAY != 0:
                weigh *= to_end
            if W == 2:
                weigh *= b_w
            if REVERSE:
                weigh *= scale
        if W == 2 or DECAY != 0 or REVERSE:
            b_s = add_weighted(b_s, b_b, b_c, weigh, EXACT, PRECISION)
        else:
            b_s = tl.dot(tl.trans(b_b), b_c, b_s, input_precision=PRECISION)
        if Z != 0:
            if DECAY != 0:
                b_z *= tl.exp2(total)
            if Z >= 3:
                weigh *= b_u
            b_from = b_b if Z == 1 or Z == 4 else b_c
            b_z += tl.sum(b_from.to(tl.float32) * weigh[:, None], 0)
    if s_out is not None:
        tl.store(s_out + p_s, b_s, mask=m_s)
    if z_out is not None:
        mine = (i_e == 0) | (Z == 2) | (Z == 3)  # a row over D is the same in every tile of E
        tl.store(z_out + o_z, b_z, mask=m_z & mine)
    if g_out is not None:
        tl.store(g_out, unit_decay, mask=i_e == 0)
