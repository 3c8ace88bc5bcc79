"""Equation (8) and dk of (9), one token before the other: the gradient D of the state is carried back in time.

Grid: (N * HV * tiles of V). dk and dbeta are sums over V: each tile writes its share, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options
from .forward import decay_of, load_row, load_state
from .host import Call, constants, grid


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "H", "HV"])
def token_reverse(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    do,  # [B, T, HV, V], token stride s_do, or None
    g,  # [B, T, HV] (DECAY 1) or [B, T, HV, K] (DECAY 2) or None
    beta,  # [B, T, HV]
    e,  # [B, T, HV, V] float32
    dS,  # [N, HV, K, V] gradient of the final state, or None
    cu,  # [N + 1] or None
    dk,  # [NV, B, T, HV, K] float32
    dv,  # [B, T, HV, V] float32
    dbeta,  # [NV, B, T, HV] float32
    dh0,  # [N, HV, K, V] float32 or None
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_p,
    s_do,
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
    o_part = tl.cast(i_v, tl.int64) * total * HV
    b_D = load_state(dS, o_s, m_s)
    for i in range(0, length):
        t = begin + (length - 1 - i)
        i_tok = t * HV + i_hv
        b_k = load_row(k + t * s_k + i_h * K, o_k, m_k)
        b_p = b_k if p is None else load_row(p + t * s_p + i_h * K, o_k, m_k)
        b_e = load_row(e + i_tok * V, o_v, m_v)
        b_beta = tl.load(beta + i_tok).to(tl.float32)
        if do is not None:
            b_q = load_row(q + t * s_q + i_h * K, o_k, m_k)
            b_do = load_row(do + t * s_do + i_hv * V, o_v, m_v)
            b_D += b_q[:, None] * (scale * b_do)[None, :]  # (8)
        b_dw = tl.sum(b_k[:, None] * b_D, 0)
        b_dv = b_beta * b_dw
        tl.store(dv + i_tok * V + o_v, b_dv, mask=m_v)
        tl.store(dbeta + o_part + i_tok, tl.sum(b_dw * b_e, 0))
        b_dk = tl.sum(b_D * (b_beta * b_e)[None, :], 1)  # (9)
        tl.store(dk + (o_part + i_tok) * K + o_k, b_dk, mask=m_k)
        if not EARLY:
            b_D -= b_p[:, None] * b_dv[None, :]
        if DECAY != 0:
            b_D *= decay_of(g + i_tok * (K if DECAY == 2 else 1), o_k, m_k, DECAY, FLOOR)
        if EARLY:
            b_D -= b_p[:, None] * b_dv[None, :]
    if dh0 is not None:
        tl.store(dh0 + o_s, b_D, mask=m_s)


def run_reverse(
    c: Call,
    o: Options,
    do: torch.Tensor | None,
    s_do: int,
    e: torch.Tensor,
    dS: torch.Tensor | None,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dbeta: torch.Tensor,
    dh0: torch.Tensor | None,
    BV: int,
    warps: int,
) -> None:
    """Fill dk, dv, dbeta and dh0."""
    args = (
        c.q, c.k, c.p, do, c.g, c.beta, e, dS, c.cu, dk, dv, dbeta, dh0, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_p, s_do, c.H, c.HV,
    )  # fmt: skip
    launch(token_reverse, grid(c, BV), args, constants(c, o, BV), warps, 1)
