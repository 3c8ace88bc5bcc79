"""f(a, b, c) of equation (5) for one sequence, one head and one tile of E, chunk by chunk: equations (4) and (7).

Called by the kernels of this folder; it has no grid of its own. The state [D, BE] stays in registers; a, b, c are read once
and o is written once. Exponents are differences of cumulative log decays in the order of time, so none is positive.
With EXACT every operand that is rounded to the inputs' half precision (P, the state, weighted columns) enters as two terms,
which keeps row sums exact enough for gate gradients: (6) sums differences of them over the whole rest of the sequence.
No accumulator is transposed or fed back as a register operand after a transpose: f' recomputes b a^T instead.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sweep_chunks(
    a,  # [T, D] rows, at the unit's first token and its head; None with OUTPUT off
    b,  # [T, D]
    c,  # [T, E]
    o,  # [T, E] or None
    x,  # [T, E] to take row sums o . x with, or None
    dot,  # [T] float32 row sums, stride HV
    g,  # [T] cumulative log2 decays inside chunks (DECAY 2), or [1] log decay (DECAY 1)
    w,  # [T] float32 weights, stride HV, of rows (W 1) or columns (W 2)
    u,  # [T] float32, stride HV: the virtual ones column's partner (Z 2, 3, 4)
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
    if REVERSE:
        m_p = o_t[:, None] <= o_t[None, :]
    else:
        m_p = o_t[:, None] >= o_t[None, :]
    if DECAY == 1:
        lg = tl.load(g).to(tl.float32) * LOG2E
        rel = (o_t[None, :] - o_t[:, None]) if REVERSE else (o_t[:, None] - o_t[None, :])
        b_m = tl.exp2(tl.where(m_p, rel.to(tl.float32) * lg, float("-inf")))
        o_f = (o_t + 1).to(tl.float32)
    unit_decay = 0.0
    NT = tl.cdiv(length, BT)
    if DECAY == 2:  # a chunk's whole decay is loaded one chunk ahead: a scalar load would stall the loop
        ahead_t = (NT - 1) * BT if REVERSE else NT * 0
        ahead_total = tl.load(g + tl.minimum(ahead_t + BT, length) - 1, mask=length > 0, other=0.0)
    for i in tl.range(0, NT, num_stages=STAGES):
        i_t = (NT - 1 - i) if REVERSE else i
        n = length - i_t * BT
        m_t = o_t < n
        first = tl.cast(i_t * BT, tl.int64)
        b_b = tl.load(b + first * s_b + o_t[:, None] * s_b + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
        b_c = tl.load(c + first * s_c + o_t[:, None] * s_c + o_e[None, :], mask=m_t[:, None] & m_e[None, :], other=0.0)  # [BT, BE]
        if W != 0:
            b_w = tl.load(w + (first + o_t) * HV, mask=m_t, other=0.0).to(tl.float32)
        if Z >= 2:
            b_u = tl.load(u + (first + o_t) * HV, mask=m_t, other=0.0)
        # decays: to_row carries the incoming state to each row, to_end carries each column to the chunk's last boundary
        if DECAY == 2:
            total = ahead_total
            ahead_t = (i_t - 1 if REVERSE else i_t + 1) * BT
            inside = (ahead_t >= 0) & (ahead_t < length)
            ahead_total = tl.load(g + tl.minimum(ahead_t + BT, length) - 1, mask=inside, other=0.0)
            b_G = tl.load(g + first + o_t, mask=m_t, other=float("-inf"))
            b_G = tl.where(m_t, b_G, total)  # unused rows decay no further
            if REVERSE:
                to_row = tl.exp2(total - b_G)
                to_end = tl.exp2(b_G)
                rel = b_G[None, :] - b_G[:, None]
            else:
                to_row = tl.exp2(b_G)
                to_end = tl.exp2(total - b_G)
                rel = b_G[:, None] - b_G[None, :]
            b_m = tl.exp2(tl.where(m_p, rel, float("-inf")))
        elif DECAY == 1:
            valid = tl.minimum(n, BT).to(tl.float32)
            total = valid * lg
            ahead = tl.exp2(o_f * lg)
            behind = tl.exp2(tl.where(m_t, (valid - o_f) * lg, float("-inf")))
            to_row = behind if REVERSE else ahead
            to_end = ahead if REVERSE else behind
        if DECAY != 0 and g_out is not None:
            unit_decay += total
        if OUTPUT:
            b_a = tl.load(a + first * s_a + o_t[:, None] * s_a + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
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
            b_h = b_s.to(b_a.dtype)
            b_o = tl.dot(b_a, b_h, input_precision=PRECISION)  # [BT, BE]
            if EXACT:
                b_o = tl.dot(b_a, (b_s - b_h.to(tl.float32)).to(b_a.dtype), b_o, input_precision=PRECISION)
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
                b_x = tl.load(x + first * s_x + o_t[:, None] * s_x + o_e[None, :], mask=m_t[:, None] & m_e[None, :], other=0.0)
                b_sum = tl.sum((b_raw if REVERSE else b_o) * b_x.to(tl.float32), 1)
                tl.store(dot + (first + o_t) * HV, b_sum, mask=m_t)
            p_o = o + first * s_o + o_t[:, None] * s_o + o_e[None, :]
            tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[:, None] & m_e[None, :])
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
            b_w32 = b_c.to(tl.float32) * weigh[:, None]
            b_cw = b_w32.to(b_c.dtype)
            b_s = tl.dot(tl.trans(b_b), b_cw, b_s, input_precision=PRECISION)
            if EXACT:
                b_s = tl.dot(tl.trans(b_b), (b_w32 - b_cw.to(tl.float32)).to(b_c.dtype), b_s, input_precision=PRECISION)
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
