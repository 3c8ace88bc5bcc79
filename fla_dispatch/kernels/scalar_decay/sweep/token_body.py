"""f(a, b, c) of equation (5) for one sequence, one head and one tile of E, token by token: equations (1) to (3) in float32.

Called by the kernels of this folder; it has no grid of its own. No matrix unit is used, so products are exact in float32.
Takes the arguments of `sweep_chunks`; see there for their shapes.
"""

import triton
import triton.language as tl

from .chunk_body import LOG2E


@triton.jit
def sweep_tokens(
    a,  # [T, D]
    b,  # [T, D]
    c,  # [T, E]
    o,  # [T, E]
    x,  # [T, E] or None
    dot,  # [T] float32, stride HV
    dot_c,  # [T] float32, stride HV, or None
    g,  # [T], stride HV (DECAY 2), or [1] (DECAY 1)
    w,  # [T] float32, stride HV
    u,  # [T] float32, stride HV
    skip,  # a number or None
    s_in,  # [D, E] or None
    s_out,  # [D, E] or None
    z_in,  # [D] or [E], or None
    z_out,  # [D] or [E], or None
    r_out,  # [T] float32, stride HV
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
    SR: tl.constexpr,
    SC: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    Z: tl.constexpr,
    FLOOR: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    m_s = m_d[:, None] & m_e[None, :]
    p_s = o_d[:, None] * SR + o_e[None, :] * SC
    b_s = tl.zeros([BD, BE], tl.float32)
    if s_in is not None:
        b_s += tl.load(s_in + p_s, mask=m_s, other=0.0).to(tl.float32)
    if Z == 1:
        b_z = tl.zeros([BD], tl.float32)
        if z_in is not None:
            b_z += tl.load(z_in + o_d, mask=m_d, other=0.0).to(tl.float32)
    elif Z != 0:
        b_z = tl.zeros([BE], tl.float32)
        if z_in is not None:
            b_z += tl.load(z_in + o_e, mask=m_e, other=0.0).to(tl.float32)
    decay = 1.0
    if DECAY == 1:
        decay = tl.exp2(tl.load(g).to(tl.float32) * LOG2E)
    for i in range(0, length):
        t = tl.cast((length - 1 - i) if REVERSE else i, tl.int64)
        b_a = tl.load(a + t * s_a + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_b = tl.load(b + t * s_b + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_c = tl.load(c + t * s_c + o_e, mask=m_e, other=0.0).to(tl.float32)
        if DECAY == 2:
            lg = tl.load(g + t * HV).to(tl.float32)
            decay = tl.exp2(tl.where(lg < FLOOR, FLOOR, lg) * LOG2E)
        if W != 0:
            b_w = tl.load(w + t * HV).to(tl.float32)
        if Z >= 2:
            b_u = tl.load(u + t * HV)
        if DECAY != 0 and not REVERSE:
            b_s *= decay
            if Z != 0:
                b_z *= decay
        b_cw = b_c
        if W == 2:
            b_cw = b_cw * b_w
        if REVERSE:
            b_cw = b_cw * scale
        b_s += b_b[:, None] * b_cw[None, :]  # (1)
        b_o = tl.sum(b_a[:, None] * b_s, 0)  # (2)
        if Z == 2:
            b_z += b_cw
            b_o += b_u * b_z
        if Z == 3:
            b_z += b_u * b_cw
            b_o += b_z
        if not REVERSE:
            b_o *= scale
        if Z == 1:
            b_z += b_b
            b_r = 1.0 / (scale * tl.sum(b_a * b_z, 0) + eps)  # (3)
            b_o *= b_r
            if i_e == 0:
                tl.store(r_out + t * HV, b_r)
        if REVERSE and x is not None:
            b_x = tl.load(x + t * s_x + o_e, mask=m_e, other=0.0).to(tl.float32)
            tl.store(dot + t * HV, tl.sum(b_o * b_x, 0))
            if dot_c is not None:
                tl.store(dot_c + t * HV, tl.sum(b_c * b_x, 0))
        if W == 1:
            b_o *= b_w
        if (not REVERSE) and x is not None:
            b_x = tl.load(x + t * s_x + o_e, mask=m_e, other=0.0).to(tl.float32)
            tl.store(dot + t * HV, tl.sum(b_o * b_x, 0))
        if skip is not None:
            b_o += skip * b_c
        tl.store(o + t * s_o + o_e, b_o.to(o.dtype.element_ty), mask=m_e)
        if DECAY != 0 and REVERSE:
            b_s *= decay
            if Z != 0:
                b_z *= decay
    if s_out is not None:
        tl.store(s_out + p_s, b_s, mask=m_s)
    if z_out is not None:
        if Z == 1:
            if i_e == 0:
                tl.store(z_out + o_d, b_z, mask=m_d)
        elif Z != 0:
            tl.store(z_out + o_e, b_z, mask=m_e)
