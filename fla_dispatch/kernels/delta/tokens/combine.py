"""Shares of the tiles of V summed into dq, dk, dp and dbeta, and gate gradients by equation (10), a tile of tokens after the other.

Grid: (N * HV). Without gates nothing is carried from tile to tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile
from ..._shared.spans import unit_span
from ..recurrence import Options
from .host import DECAYS, Call, tiles

#: Numbers of a tile of tokens and channels.
TILE = 1024


@triton.jit
def sum_shares(x, o_x, m_x, stride, NV):
    """Sum over the tiles of V, in their order; shares are `stride` apart."""
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    for i in range(1, NV):
        b_x += tl.load(x + i * stride + o_x, mask=m_x, other=0.0)
    return b_x


@triton.jit(do_not_specialize=["T", "N", "total", "NV", "H", "HV"])
def combine_shares(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    cu,  # [N + 1] or None
    base,  # [N, HV] (DECAY 1) or [N, HV, K] (DECAY 2) rowsum(S_0 dS_0), or None
    parts_q,  # [NV, B, T, HV, K]
    parts_k,  # [NV, B, T, HV, K]
    parts_p,  # [NV, B, T, HV, K]
    parts_beta,  # [NV, B, T, HV]
    dq,  # [B, T, HV, K]
    dk,  # [B, T, HV, K]
    dp,  # [B, T, HV, K] or None: then it is part of dk
    dbeta,  # [B, T, HV]
    dg,  # [B, T, HV] (DECAY 1) or [B, T, HV, K] (DECAY 2) or None
    T,
    N,
    total,
    NV,
    s_q,
    s_k,
    s_p,
    H,
    HV,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    DECAY: tl.constexpr,
    EARLY: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_nh = tl.program_id(0)
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, None, i_nh // HV, T, N, 0, False, PACKED)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    stride = tl.cast(total, tl.int64) * HV
    if DECAY == 2:
        b_left = tl.zeros([BK], tl.float32)
        if base is not None:
            b_left += tl.load(base + tl.cast(i_nh, tl.int64) * K + o_k, mask=m_k, other=0.0)
    else:
        b_left = 0.0
        if base is not None:
            b_left += tl.load(base + i_nh)
    for i_t in range(0, tl.cdiv(length, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < length
        t = begin + o_t
        i_tok = t * HV + i_hv
        m_x = m_t[:, None] & m_k[None, :]
        o_x = i_tok[:, None] * K + o_k[None, :]
        b_dq = sum_shares(parts_q, o_x, m_x, stride * K, NV)
        b_dk = sum_shares(parts_k, o_x, m_x, stride * K, NV)
        b_dp = sum_shares(parts_p, o_x, m_x, stride * K, NV)
        tl.store(dbeta + i_tok, sum_shares(parts_beta, i_tok, m_t, stride, NV).to(dbeta.dtype.element_ty), mask=m_t)
        b_k = tl.load(k + t[:, None] * s_k + i_h * K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
        if DECAY != 0:
            b_q = tl.load(q + t[:, None] * s_q + i_h * K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
            b_p = b_k
            if p is not None:
                b_p = tl.load(p + t[:, None] * s_p + i_h * K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
            b_G = b_q * b_dq - b_k * b_dk
            b_E = b_p * b_dp
            if DECAY == 1:
                b_G, b_E = tl.sum(b_G, 1), tl.sum(b_E, 1)
            b_sum = b_G + b_E
            b_before = tl.cumsum(b_sum, 0) - (b_G if EARLY else b_sum)  # (10)
            if DECAY == 2:
                tl.store(dg + o_x, (b_left[None, :] - b_before).to(dg.dtype.element_ty), mask=m_x)
            else:
                tl.store(dg + i_tok, (b_left - b_before).to(dg.dtype.element_ty), mask=m_t)
            b_left -= tl.sum(b_sum, 0)
        tl.store(dq + o_x, b_dq.to(dq.dtype.element_ty), mask=m_x)
        if dp is not None:
            tl.store(dp + o_x, b_dp.to(dp.dtype.element_ty), mask=m_x)
        else:
            b_dk += b_dp
        tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=m_x)


def run_combine(
    c: Call,
    o: Options,
    base: torch.Tensor | None,
    parts: tuple[torch.Tensor, ...],
    found: tuple[torch.Tensor | None, ...],
    BV: int,
) -> None:
    """parts: shares of dq, dk, dp and dbeta; found: dq, dk, dp, dbeta and dg, to be filled where they are not None."""
    BK = tile(c.K)
    same = {
        "K": c.K,
        "BK": BK,
        "BT": max(8, TILE // BK),
        "DECAY": DECAYS[o.decay],
        "EARLY": o.early,
        "PACKED": c.cu is not None,
    }
    args = (c.q, c.k, c.p, c.cu, base, *parts, *found, c.T, c.N, c.B * c.T, tiles(c, BV), c.s_q, c.s_k, c.s_p, c.H, c.HV)
    launch(combine_shares, (c.N * c.HV,), args, same, 4, 1)
