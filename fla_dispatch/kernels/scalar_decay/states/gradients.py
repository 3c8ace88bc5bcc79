"""Every gradient of one chunk, from the state S before it and the gradient R of the state after it.

With P = q k^T, D = do v^T, E = scale M * beta * P * D (all [t, s], s <= t inside the chunk; rows of M decay from s to t), and
e_t = exp(G_t), f_s = exp(G_end - G_s) decays from the chunk's begin and to its end:

    (9)   dq_t = scale (sum_s (M * beta * D)_ts k_s + e_t S do_t)
    (10)  dk_s = scale sum_t (M * beta * D)_ts q_t + f_s beta_s R v_s
    (11)  dv_s = beta_s u_s + skip do_s,    u_s = scale sum_t (M * P)_ts do_t + f_s R^T k_s,    dbeta_s = v_s . u_s
    (12)  dG_t = sum_s E_ts - sum_s E_st + scale e_t q_t . S do_t - y_t,    y_s = f_s beta_s k_s . R v_s
          dg_t = sum of dG over the chunk's tokens from t on + sum_s y_s + exp(G_end) <S, R>
    (13)  dskip = sum_t do_t . v_t

Nothing of (12) is summed beyond the chunk, so rounded operands serve. The heads that share q and k add up in registers: E's
factor M * beta * D over heads, then one product with k and one with q. Every transposed product is computed as such: no
accumulator is transposed.

Grid: (chunks, H * shares); a program takes HEADS of the value heads of one query head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..recurrence import Options
from ..sweep.chunk_body import load_tile, store_tile
from ..sweep.host import Call, constants, padded
from .outputs import between, chunk_span, cumulative


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV", "SHARES"])
def chunk_gradients(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    g,  # [HV, B * T] cumulative log2 decays, or [HV] log decays, or None
    w,  # [B, T, HV] beta or None
    skip,  # [HV] or None
    states,  # [chunks, HV, K, V] S before each chunk
    after,  # [chunks, HV, K, V] R after each chunk
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [SHARES, B, T, H, K]
    dk,  # [SHARES, B, T, H, K]
    dv,  # [B, T, HV, V]
    dg,  # [B, T, HV] or None
    dw,  # [B, T, HV] or None
    dskip,  # [chunks, HV] float32 or None
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_v,
    s_do,
    SEG,
    H,
    HV,
    SHARES,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    HEADS: tl.constexpr,
    DECAY: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_c = tl.program_id(0)
    i_h = tl.program_id(1) // SHARES
    i_share = tl.program_id(1) % SHARES
    group = HV // H
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    first = i_share * HEADS
    last_head = tl.minimum(first + HEADS, group)
    if length <= 0:
        if dskip is not None:
            for j in range(first, last_head):
                tl.store(dskip + tl.cast(i_c, tl.int64) * HV + i_h * group + j, 0.0)
        return
    o_t = tl.arange(0, BT)
    m_t = o_t < length
    ahead = (o_t[:, None] >= o_t[None, :]) & m_t[:, None]  # rows t, columns s
    behind = (o_t[:, None] <= o_t[None, :]) & m_t[None, :]  # rows s, columns t
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    plane = tl.cast(total, tl.int64)
    b_q = load_tile(q + begin * s_q + i_h * K, length, s_q, 0, 0, K, BT, BK, False)
    b_k = load_tile(k + begin * s_k + i_h * K, length, s_k, 0, 0, K, BT, BK, False)
    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # P^T
    if dg is not None:
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    sum_ts = tl.zeros([BT, BT], tl.float32)
    sum_st = tl.zeros([BT, BT], tl.float32)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for j in tl.range(first, last_head, num_stages=STAGES):
        i_hv = i_h * group + j
        o_state = (tl.cast(i_c, tl.int64) * HV + i_hv) * K * V
        b_v = load_tile(v + begin * s_v + i_hv * V, length, s_v, 0, 0, V, BT, BV, False)
        b_do = load_tile(do + begin * s_do + i_hv * V, length, s_do, 0, 0, V, BT, BV, False)
        b_s = tl.load(states + o_state + p_s, mask=m_s, other=0.0)
        b_r = tl.load(after + o_state + p_s, mask=m_s, other=0.0)
        to_row = tl.full([BT], 1.0, tl.float32)
        to_end = tl.full([BT], 1.0, tl.float32)
        if DECAY != 0:
            b_G, last = cumulative(g, i_hv, begin, length, plane, BT, DECAY)
            to_row = tl.exp2(b_G)
            to_end = tl.exp2(last - b_G)
        b_w = tl.full([BT], 1.0, tl.float32)
        if w is not None:
            b_w = tl.load(w + (begin + o_t) * HV + i_hv, mask=m_t, other=0.0).to(tl.float32)
        # (9) and (10): what is inside the chunk
        b_ts = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_st = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if DECAY != 0:
            b_ts *= between(b_G, ahead, False)
            m_st = between(b_G, behind, True)
        else:
            b_ts = tl.where(ahead, b_ts, 0.0)
            m_st = tl.where(behind, 1.0, 0.0)
        b_ts *= b_w[None, :] * scale
        b_st *= m_st * b_w[:, None] * scale
        sum_ts += b_ts
        sum_st += b_st
        # and what crosses its ends
        b_dow = (b_do.to(tl.float32) * (to_row * scale)[:, None]).to(b_do.dtype)
        b_x = tl.dot(b_dow, tl.trans(b_s), input_precision=PRECISION)
        b_dq += b_x
        b_vw = (b_v.to(tl.float32) * (to_end * b_w)[:, None]).to(b_v.dtype)
        b_y = tl.dot(b_vw, tl.trans(b_r), input_precision=PRECISION)
        b_dk += b_y
        # (11)
        b_u = tl.dot(b_k, b_r, input_precision=PRECISION) * to_end[:, None]
        b_u = tl.dot((b_kq * m_st * scale).to(b_do.dtype), b_do, b_u, input_precision=PRECISION)
        p_t = (begin + o_t) * HV + i_hv
        if dw is not None:
            tl.store(dw + p_t, tl.sum(b_u * b_v.to(tl.float32), 1).to(dw.dtype.element_ty), mask=m_t)
        b_u *= b_w[:, None]
        if skip is not None:
            b_u += tl.load(skip + i_hv).to(tl.float32) * b_do.to(tl.float32)
        store_tile(dv + (begin * HV + i_hv) * V, b_u, length, HV * V, 0, 0, V, BT, BV, False)
        if dskip is not None:  # (13)
            tl.store(dskip + tl.cast(i_c, tl.int64) * HV + i_hv, tl.sum(tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), 1), 0))
        if dg is not None:  # (12)
            y = tl.sum(b_k.to(tl.float32) * b_y, 1)
            dG = tl.sum(b_ts * b_qk, 1) - tl.sum(b_st * b_kq, 1) + tl.sum(b_q.to(tl.float32) * b_x, 1) - y
            whole = tl.sum(y, 0) + tl.exp2(last) * tl.sum(tl.sum(b_s.to(tl.float32) * b_r.to(tl.float32), 1), 0)
            b_dg = tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG + whole
            tl.store(dg + p_t, b_dg.to(dg.dtype.element_ty), mask=m_t)
    b_dq = tl.dot(sum_ts.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    b_dk = tl.dot(sum_st.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_share = (i_share * plane + begin) * H * K + i_h * K
    store_tile(dq + o_share, b_dq, length, H * K, 0, 0, K, BT, BK, False)
    store_tile(dk + o_share, b_dk, length, H * K, 0, 0, K, BT, BK, False)


class Found(NamedTuple):
    """Gradients as the kernel leaves them."""

    dq: torch.Tensor  # [shares, B, T, H, K]; float32 where there are several shares
    dk: torch.Tensor  # the same
    dv: torch.Tensor  # [B, T, HV, V]
    dg: torch.Tensor | None  # [B, T, HV]
    dbeta: torch.Tensor | None  # [B, T, HV]
    dskip: torch.Tensor | None  # [chunks, HV] float32


def run_gradients(
    c: Call,
    o: Options,
    do: torch.Tensor,
    s_do: int,
    states: torch.Tensor,
    after: torch.Tensor,
    gates: torch.Tensor | None,
    *,
    SEG: int,
    BT: int,
    HEADS: int,
    offsets: torch.Tensor | None,
    warps: int,
    stages: int,
) -> Found:
    """All gradients; gates: where dg shall be, or None."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    dtype = c.q.dtype if shares == 1 else torch.float32
    dq = c.q.new_empty((shares, c.B, c.T, c.H, c.K), dtype=dtype)
    out = Found(
        dq, torch.empty_like(dq), c.v.new_empty((c.B, c.T, c.HV, c.V)), gates, None if c.beta is None else torch.empty_like(c.beta),
        None if c.skip is None else c.q.new_empty((states.shape[0], c.HV), dtype=torch.float32),
    )  # fmt: skip
    launch(
        chunk_gradients,
        (states.shape[0], c.H * shares),
        (
            c.q, c.k, c.v, do, c.g, c.beta, c.skip, states, after, c.cu, offsets, *out, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v,
            s_do, SEG, c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS, "DECAY": same["DECAY"],
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return out
