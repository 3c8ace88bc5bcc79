"""Every gradient but those of states, chunk by chunk in any order, from the states and their gradients at both ends of a chunk.

Grid: (chunks * HV). With S before the chunk, D after it, w, dy and dv = beta dy of (12) and (13), L and L' the decays of X and M of (5):

    (14)  dX = L scale (do w^T),   dM = -L' (dv w^T)                      (L: s <= t, L': s < t)
          dq = scale exp(G) (do S^T) + dX k,   dp = dM k - exp(E) (dv S^T),   dk = exp(G_end - G) (w D^T) + dX^T q + dM^T p
          e = v - exp(E) p S - M w,   dbeta = dy . e
    (15)  dG_t = sum_s (dX q k^T + dM p k^T)_ts - sum_s (...)_st + scale exp(G_t) do_t . q_t S - exp(E_t) dv_t . p_t S - z_t,
          z_s = exp(G_end - G_s) k_s . D w_s,   dg_t = sum_{u >= t} dG_u + sum_s z_s + exp(G_end) <S, D>

(early: p's terms of dG_t count from t - 1 on). Rows and columns of one matrix are summed, so what (15) should cancel does, whatever
the rounding. Products with transposed factors are computed as such: no accumulator is transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.tiles import load_tile, store_tile
from .host import Call
from .parts import between, chunk_gates, chunk_span


@triton.jit
def of_keys(
    q, k, p, do, w, dy, S, D, b_G, b_E, b_last, b_beta, length, s_q, s_k, s_p, s_do, s_w, scale, dk, dp, s_dk,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dp of (14) stored (dp None: as part of dk); z of (15) and <S, D>."""
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    b_z = tl.zeros([BT], tl.float32)
    overlap = tl.zeros([BK], tl.float32)
    b_wD = tl.zeros([BT, BK], tl.float32)
    b_yS = tl.zeros([BT, BK], tl.float32)
    b_dM = tl.zeros([BT, BT], tl.float32)
    turned_X = tl.zeros([BT, BT], tl.float32)
    turned_M = tl.zeros([BT, BT], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
        p_s = o_k[:, None] * V + o_v[None, :]
        b_w = load_tile(w, length, s_w, 0, i_v, V, BT, BV, False)
        b_y = load_tile(dy, length, s_w, 0, i_v, V, BT, BV, False)
        b_do = load_tile(do, length, s_do, 0, i_v, V, BT, BV, False)
        b_S = tl.load(S + p_s, mask=m_s, other=0.0)
        b_D = tl.load(D + p_s, mask=m_s, other=0.0)
        b_wD = tl.dot(b_w, tl.trans(b_D), b_wD, input_precision=PRECISION)
        b_yS = tl.dot(b_y, tl.trans(b_S), b_yS, input_precision=PRECISION)
        b_dM = tl.dot(b_y, tl.trans(b_w), b_dM, input_precision=PRECISION)
        turned_X = tl.dot(b_w, tl.trans(b_do), turned_X, input_precision=PRECISION)
        turned_M = tl.dot(b_w, tl.trans(b_y), turned_M, input_precision=PRECISION)
        if GATED:
            overlap += tl.sum(b_S.to(tl.float32) * b_D.to(tl.float32), 1)
    turned_M *= -b_beta[None, :]
    b_dM *= -b_beta[:, None]
    b_yS *= -b_beta[:, None]
    turned_X *= scale
    after, before = o_t[:, None] < o_t[None, :], o_t[:, None] > o_t[None, :]
    b_k = load_tile(k, length, s_k, 0, 0, K, BT, BK, False)
    if GATED:
        b_wD *= tl.exp2(b_last - b_G)[:, None]
        b_z = tl.sum(b_k.to(tl.float32) * b_wD, 1)
        b_yS *= tl.exp2(b_E)[:, None]
        turned_X *= between(b_G[None, :], b_G[:, None], o_t[:, None] <= o_t[None, :])
        turned_M *= between(b_E[None, :], b_G[:, None], after)
        b_dM *= between(b_E[:, None], b_G[None, :], before)
    else:
        turned_X = tl.where(o_t[:, None] <= o_t[None, :], turned_X, 0.0)
        turned_M = tl.where(after, turned_M, 0.0)
        b_dM = tl.where(before, b_dM, 0.0)
    b_q = load_tile(q, length, s_q, 0, 0, K, BT, BK, False)
    b_dp = tl.dot(b_dM.to(b_k.dtype), b_k, b_yS, input_precision=PRECISION)
    b_dk = tl.dot(turned_X.to(b_k.dtype), b_q, b_wD, input_precision=PRECISION)
    if p is not None:
        b_k = load_tile(p, length, s_p, 0, 0, K, BT, BK, False)
    b_dk = tl.dot(turned_M.to(b_k.dtype), b_k, b_dk, input_precision=PRECISION)
    if dp is not None:
        store_tile(dp, b_dp, length, s_dk, 0, 0, K, BT, BK, False)
    else:
        b_dk += b_dp
    store_tile(dk, b_dk, length, s_dk, 0, 0, K, BT, BK, False)
    return b_z, tl.sum(overlap, 0)


@triton.jit
def of_queries(
    q, k, p, v, do, w, dy, S, x, b_G, b_E, b_beta, length, s_q, s_k, s_p, s_v, s_do, s_w, scale, dq, s_dq, dv,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and dv of (14) stored; dbeta, the rows of (15) for q and for p, and its columns."""
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    before, until = o_t[:, None] > o_t[None, :], o_t[:, None] >= o_t[None, :]
    b_k = load_tile(k, length, s_k, 0, 0, K, BT, BK, False)
    b_p = b_k if p is None else load_tile(p, length, s_p, 0, 0, K, BT, BK, False)
    b_M = tl.dot(b_p, tl.trans(b_k), input_precision=PRECISION)
    to_read = tl.full([BT], 1.0, tl.float32)
    if GATED:
        to_read = tl.exp2(b_E)
        b_M *= between(b_E[:, None], b_G[None, :], before)
    else:
        b_M = tl.where(before, b_M, 0.0)
    b_M = b_M.to(b_k.dtype)
    b_dbeta = tl.zeros([BT], tl.float32)
    of_p = tl.zeros([BT], tl.float32)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dX = tl.zeros([BT, BT], tl.float32)
    b_dM = tl.zeros([BT, BT], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_S = tl.load(S + o_k[:, None] * V + o_v[None, :], mask=m_s, other=0.0)
        b_w = load_tile(w, length, s_w, 0, i_v, V, BT, BV, False)
        b_y = load_tile(dy, length, s_w, 0, i_v, V, BT, BV, False)
        b_do = load_tile(do, length, s_do, 0, i_v, V, BT, BV, False)
        b_v = load_tile(v, length, s_v, 0, i_v, V, BT, BV, False).to(tl.float32)
        b_e = tl.dot(b_p, b_S, input_precision=PRECISION) * to_read[:, None]
        b_y32 = b_y.to(tl.float32)
        if GATED:
            of_p += tl.sum(b_y32 * b_e, 1)
        b_e = b_v - b_e - tl.dot(b_M, b_w, input_precision=PRECISION)
        b_dbeta += tl.sum(b_y32 * b_e, 1)
        store_tile(dv, b_y32 * b_beta[:, None], length, s_w, 0, i_v, V, BT, BV, False)
        b_dq = tl.dot(b_do, tl.trans(b_S), b_dq, input_precision=PRECISION)
        b_dX = tl.dot(b_do, tl.trans(b_w), b_dX, input_precision=PRECISION)
        if GATED:
            b_dM = tl.dot(b_y, tl.trans(b_w), b_dM, input_precision=PRECISION)
    of_q = tl.zeros([BT], tl.float32)
    columns = tl.zeros([BT], tl.float32)
    if GATED:
        b_dq *= (scale * tl.exp2(b_G))[:, None]
        b_q = load_tile(q, length, s_q, 0, 0, K, BT, BK, False)
        b_x = load_tile(x, length, BT, 0, 0, BT, BT, BT, False)
        b_X = b_dX * b_x.to(tl.float32)
        b_M32 = -b_beta[:, None] * b_dM * b_M.to(tl.float32)
        of_q = tl.sum(b_X, 1) + tl.sum(b_q.to(tl.float32) * b_dq, 1)
        of_p = tl.sum(b_M32, 1) - b_beta * of_p
        columns = tl.sum(b_X + b_M32, 0)
        b_dX *= scale * between(b_G[:, None], b_G[None, :], until)
    else:
        b_dq *= scale
        b_dX = tl.where(until, scale * b_dX, 0.0)
    b_dq = tl.dot(b_dX.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_tile(dq, b_dq, length, s_dq, 0, 0, K, BT, BK, False)
    return b_dbeta, of_q, of_p, columns


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_gradients(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    gates,  # [HV, B * T] cumulative log2 decays or None
    beta,  # [B, T, HV]
    scores,  # [HV, B * T, BT] scale X
    w,  # [B, T, HV, V]
    dy,  # [B, T, HV, V]
    states,  # [chunks, HV, K, V] S before each chunk
    after,  # [chunks, HV, K, V] D after each chunk
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [B, T, HV, K]
    dk,  # [B, T, HV, K]
    dp,  # [B, T, HV, K] or None: then it is part of dk
    dv,  # [B, T, HV, V]
    dg,  # [B, T, HV] or None
    dbeta,  # [B, T, HV]
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_p,
    s_v,
    s_do,
    SEG,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    EARLY: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_c = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    o_t = tl.arange(0, BT)
    m_t = o_t < length
    plane = tl.cast(total, tl.int64)
    row = begin * HV + i_hv
    p_t = (begin + o_t) * HV + i_hv
    o_s = (tl.cast(i_c, tl.int64) * HV + i_hv) * K * V
    p_q, p_k, p_do = q + begin * s_q + i_h * K, k + begin * s_k + i_h * K, do + begin * s_do + i_hv * V
    p_p = None if p is None else p + begin * s_p + i_h * K
    b_beta = tl.load(beta + p_t, mask=m_t, other=0.0).to(tl.float32)
    GATED: tl.constexpr = gates is not None
    b_G, b_E, last = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), 0.0
    if GATED:
        b_G, b_E, last = chunk_gates(gates + i_hv * plane + begin, 0, length, BT, EARLY)
        b_G = tl.where(m_t, b_G, last)
    b_z, overlap = of_keys(
        p_q, p_k, p_p, p_do, w + row * V, dy + row * V, states + o_s, after + o_s, b_G, b_E, last, b_beta, length, s_q, s_k, s_p, s_do,
        HV * V, scale, dk + row * K, None if dp is None else dp + row * K, HV * K,
        K, V, BK, BV, BT, GATED, EARLY, PRECISION, STAGES,
    )  # fmt: skip
    b_dbeta, of_q, of_p, columns = of_queries(
        p_q, p_k, p_p, v + begin * s_v + i_hv * V, p_do, w + row * V, dy + row * V, states + o_s, scores + (i_hv * plane + begin) * BT,
        b_G, b_E, b_beta, length, s_q, s_k, s_p, s_v, s_do, HV * V, scale, dq + row * K, HV * K, dv + row * V,
        K, V, BK, BV, BT, GATED, EARLY, PRECISION, STAGES,
    )  # fmt: skip
    tl.store(dbeta + p_t, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)
    if dg is not None:  # (15)
        b_dG = of_q + of_p - columns - b_z
        whole = tl.exp2(last) * overlap + tl.sum(b_z, 0) + tl.sum(b_dG, 0)
        b_dg = whole - tl.cumsum(b_dG, 0) + b_dG
        if EARLY:
            b_dg -= of_p
        tl.store(dg + p_t, b_dg.to(dg.dtype.element_ty), mask=m_t)


class Found(NamedTuple):
    """Gradients as the kernel leaves them: of q, k and p for each value head, float32 where several share a query head."""

    dq: torch.Tensor  # [B, T, HV, K]
    dk: torch.Tensor  # [B, T, HV, K]
    dp: torch.Tensor | None  # [B, T, HV, K]
    dv: torch.Tensor  # [B, T, HV, V]
    dg: torch.Tensor | None  # [B, T, HV]
    dbeta: torch.Tensor  # [B, T, HV]


def run_gradients(
    c: Call,
    do: torch.Tensor,
    s_do: int,
    scores: torch.Tensor,
    gates: torch.Tensor | None,
    w: torch.Tensor,
    dy: torch.Tensor,
    states: torch.Tensor,
    after: torch.Tensor,
    warps: int,
) -> Found:
    """All gradients but that of h0."""
    shared = c.q.dtype if c.HV == c.H else torch.float32
    dq, dk, dp = (c.q.new_empty((c.B, c.T, c.HV, c.K), dtype=shared) if want else None for want in (True, True, c.p is not None))
    assert dq is not None and dk is not None
    dg = None if c.g is None else torch.empty_like(c.g)
    out = Found(dq, dk, dp, c.v.new_empty((c.B, c.T, c.HV, c.V)), dg, torch.empty_like(c.beta))
    args = (
        c.q, c.k, c.p, c.v, do, gates, c.beta, scores, w, dy, states, after, c.cu, c.offsets, *out, c.T, c.N, c.B * c.T, c.scale,
        c.s_q, c.s_k, c.s_p, c.s_v, s_do, c.SEG, c.H, c.HV,
    )  # fmt: skip
    constants = c.constants("V", "BT", "EARLY") | {"BV": min(64, c.same["BV"]), "STAGES": 1}
    launch(chunk_gradients, (c.chunks * c.HV,), args, constants, warps, 1)
    return out
