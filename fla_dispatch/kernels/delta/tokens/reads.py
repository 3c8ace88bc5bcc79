"""dq and dp of equation (9), one token after the other: what the state was read with, from the state that e builds anew.

Grid: (N * HV * tiles of V). Both are sums over V: each tile writes its share, in float32.
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
def token_reads(
    k,  # [B, T, H, K], token stride s_k
    do,  # [B, T, HV, V], token stride s_do, or None
    g,  # [B, T, HV] (DECAY 1) or [B, T, HV, K] (DECAY 2) or None
    beta,  # [B, T, HV]
    e,  # [B, T, HV, V] float32
    dv,  # [B, T, HV, V] float32
    h0,  # [N, HV, K, V] or None
    cu,  # [N + 1] or None
    dq,  # [NV, B, T, HV, K] float32
    dp,  # [NV, B, T, HV, K] float32
    T,
    N,
    total,
    scale,
    s_k,
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
    b_s = load_state(h0, o_s, m_s)
    for i in range(0, length):
        t = begin + i
        i_tok = t * HV + i_hv
        b_k = load_row(k + t * s_k + i_h * K, o_k, m_k)
        b_e = load_row(e + i_tok * V, o_v, m_v)
        b_dv = load_row(dv + i_tok * V, o_v, m_v)
        b_beta = tl.load(beta + i_tok).to(tl.float32)
        if EARLY:
            b_dp = -tl.sum(b_s * b_dv[None, :], 1)  # (9)
        if DECAY != 0:
            b_s *= decay_of(g + i_tok * (K if DECAY == 2 else 1), o_k, m_k, DECAY, FLOOR)  # (1)
        if not EARLY:
            b_dp = -tl.sum(b_s * b_dv[None, :], 1)
        tl.store(dp + (o_part + i_tok) * K + o_k, b_dp, mask=m_k)
        b_s += b_k[:, None] * (b_beta * b_e)[None, :]  # (3)
        b_dq = tl.zeros([BK], tl.float32)
        if do is not None:
            b_do = load_row(do + t * s_do + i_hv * V, o_v, m_v)
            b_dq += scale * tl.sum(b_s * b_do[None, :], 1)
        tl.store(dq + (o_part + i_tok) * K + o_k, b_dq, mask=m_k)


def run_reads(
    c: Call,
    o: Options,
    do: torch.Tensor | None,
    s_do: int,
    e: torch.Tensor,
    dv: torch.Tensor,
    dq: torch.Tensor,
    dp: torch.Tensor,
    BV: int,
    warps: int,
) -> None:
    """Fill dq and dp."""
    args = (c.k, do, c.g, c.beta, e, dv, c.h0, c.cu, dq, dp, c.T, c.N, c.B * c.T, o.scale, c.s_k, s_do, c.H, c.HV)
    launch(token_reads, grid(c, BV), args, constants(c, o, BV), warps, 1)
