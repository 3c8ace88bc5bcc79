"""Equations (1) to (4), one token after the other: outputs and the final state, or the errors e that backward needs.

Grid: (N * HV * tiles of V). A column of the state depends on no other, so tiles of V share nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options
from .host import Call, constants, grid

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def decay_of(g, o_k, m_k, DECAY: tl.constexpr, FLOOR: tl.constexpr):
    """The factor of a token's decay at the pointer g: one number (DECAY 1), or one for each row of the state, [BK, 1]."""
    if DECAY == 2:
        lg = tl.load(g + o_k, mask=m_k, other=0.0).to(tl.float32)
        return tl.exp2(tl.where(lg < FLOOR, FLOOR, lg) * LOG2E)[:, None]
    else:
        lg = tl.load(g).to(tl.float32)
        return tl.exp2(tl.where(lg < FLOOR, FLOOR, lg) * LOG2E)


@triton.jit
def load_row(x, o_x, m_x):
    """A row in float32, zero where masked."""
    return tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def load_state(s, o_s, m_s):
    """A state [BK, BV] in float32: zeros without a pointer."""
    b_s = tl.zeros(m_s.shape, tl.float32)
    if s is not None:
        b_s += tl.load(s + o_s, mask=m_s, other=0.0).to(tl.float32)
    return b_s


@triton.jit(do_not_specialize=["T", "N", "scale", "H", "HV"])
def token_forward(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    v,  # [B, T, HV, V], token stride s_v
    g,  # [B, T, HV] (DECAY 1) or [B, T, HV, K] (DECAY 2) or None
    beta,  # [B, T, HV]
    h0,  # [N, HV, K, V] or None
    cu,  # [N + 1] or None
    o,  # [B, T, HV, V] or None
    e,  # [B, T, HV, V] float32 or None
    state,  # [N, HV, K, V] or None
    T,
    N,
    scale,
    s_q,
    s_k,
    s_p,
    s_v,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    EARLY: tl.constexpr,
    PACKED: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_nh = pid // NV
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, None, i_nh // HV, T, N, 0, False, PACKED)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = tl.cast(i_nh, tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = load_state(h0, o_s, m_s)
    for i in range(0, length):
        t = begin + i
        i_tok = t * HV + i_hv
        b_k = load_row(k + t * s_k + i_h * K, o_k, m_k)
        b_p = b_k if p is None else load_row(p + t * s_p + i_h * K, o_k, m_k)
        b_v = load_row(v + t * s_v + i_hv * V, o_v, m_v)
        b_beta = tl.load(beta + i_tok).to(tl.float32)
        if EARLY:
            b_e = b_v - tl.sum(b_p[:, None] * b_s, 0)  # (2)
        if DECAY != 0:
            b_s *= decay_of(g + i_tok * (K if DECAY == 2 else 1), o_k, m_k, DECAY, FLOOR)  # (1)
        if not EARLY:
            b_e = b_v - tl.sum(b_p[:, None] * b_s, 0)
        b_s += b_k[:, None] * (b_beta * b_e)[None, :]  # (3)
        if o is not None:
            b_q = load_row(q + t * s_q + i_h * K, o_k, m_k)
            b_o = scale * tl.sum(b_q[:, None] * b_s, 0)  # (4)
            tl.store(o + i_tok * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        if e is not None:
            tl.store(e + i_tok * V + o_v, b_e, mask=m_v)
    if state is not None:
        tl.store(state + o_s, b_s, mask=m_s)


def run_forward(
    c: Call, options: Options, o: torch.Tensor | None, e: torch.Tensor | None, state: torch.Tensor | None, BV: int, warps: int
) -> None:
    """Fill o, e and state where given."""
    args = (c.q, c.k, c.p, c.v, c.g, c.beta, c.h0, c.cu, o, e, state, c.T, c.N, options.scale, c.s_q, c.s_k, c.s_p, c.s_v, c.H, c.HV)
    launch(token_forward, grid(c, BV), args, constants(c, options, BV), warps, 1)
