"""Every gradient but those of states, chunk by chunk in any order, from the states and their gradients at both ends of a chunk.

Grid: (chunks * HV). With S before the chunk, D after it, w, dy and dv = beta dy of (12) and (13), L and L' the decays of X and M of (5):

    (14)  dX = L scale (do w^T),   dM = -L' (dv w^T)                      (L: s <= t, L': s < t)
          dq = scale exp(G) (do S^T) + dX k,   dp = dM k - exp(E) (dv S^T),   dk = exp(G_end - G) (w D^T) + dX^T q + dM^T p
          dbeta = dy . (v - exp(E) p S - M w) = dy . v + p . dp / beta
    (15)  dG_t = q_t . dq_t + p_t . dp_t - k_t . dk_t,   z_s = exp(G_end - G_s) k_s . D w_s,
          dg_t = sum_{u >= t} dG_u + sum_s z_s + exp(G_end) <S, D>

(early: p's terms of dG_t count from t - 1 on). Pairs of tokens enter dq, dp and dk by one rounded matrix, so what (15) should cancel does,
whatever the rounding. dp / beta is formed with 1 in place of a beta that is nearly 0. Products with transposed factors are computed as
such: no accumulator is transposed. A block holds the rows of w, do and dy, and takes the columns of K tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile
from ..._shared.tiles import load_tile, store_tile
from ..configs import gradient_columns
from .host import Call
from .parts import between, chunk_gates, chunk_span

#: Least |beta| that gradients of p are made with.
SMALL = tl.constexpr(2.0**-8)


@triton.jit
def state_tile(
    state,  # [K, V]
    i_k,
    i_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Rows i_k and columns i_v of a state, [BK, BV]."""
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    return tl.load(state + o_k[:, None] * V + o_v[None, :], mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)


@triton.jit
def pairs(
    later,  # [BT, V] rows of the result
    b_later,  # [BT, BV] of them where that is all, or None
    earlier,  # [BT, V] its columns
    b_earlier,  # [BT, BV] or None
    b_factor,  # scalar, [BT, 1] or [1, BT]
    b_to,  # [BT, 1] or [1, BT] cumulative decays of the token that comes later
    b_from,  # [1, BT] or [BT, 1] and of the other
    inside,  # [BT, BT]
    turns,
    length,
    s_later,
    s_earlier,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """factor (rows columns^T) decayed where `inside`, else 0: [BT, BT] as an operand.

    turns: 1, which the compiler does not know: it would keep float32 accumulators, twice the registers, up to their use.
    """
    b_found = tl.zeros([BT, BT], later.dtype.element_ty)
    for _ in tl.range(0, turns, num_stages=1):
        b_x = tl.zeros([BT, BT], tl.float32)
        for i_v in tl.static_range((V + BV - 1) // BV):
            b_r = load_tile(later, length, s_later, 0, i_v, V, BT, BV, False) if b_later is None else b_later
            b_c = load_tile(earlier, length, s_earlier, 0, i_v, V, BT, BV, False) if b_earlier is None else b_earlier
            b_x = tl.dot(b_r, tl.trans(b_c), b_x, input_precision=PRECISION)
        b_x *= b_factor
        if GATED:
            b_x *= between(b_to, b_from, inside)
        else:
            b_x = tl.where(inside, b_x, 0.0)
        b_found = b_x.to(later.dtype.element_ty)
    return b_found


@triton.jit
def of_state(
    rows,  # [BT, V]
    b_rows,  # [BT, BV] of them where that is all, or None
    state,  # [K, V]
    b_state,  # [BK, BV] rows i_k of it where BV is all of V, or None
    i_k,
    length,
    s_rows,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns i_k of rows state^T, [BT, BK]."""
    b_x = tl.zeros([BT, BK], tl.float32)
    for i_v in tl.static_range((V + BV - 1) // BV):
        b_r = load_tile(rows, length, s_rows, 0, i_v, V, BT, BV, False) if b_rows is None else b_rows
        b_s = state_tile(state, i_k, i_v, K, V, BK, BV) if b_state is None else b_state
        b_x = tl.dot(b_r, tl.trans(b_s), b_x, input_precision=PRECISION)
    return b_x


@triton.jit
def of_values(
    v,  # [BT, V], token stride s_v
    dy,  # [BT, V], token stride s_w
    b_y,  # [BT, BV] of it where that is all, or None
    dv,  # [BT, V], token stride s_w
    b_beta,  # [BT]
    length,
    s_v,
    s_w,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
):
    """dv stored; dy . v [BT]."""
    b_yv = tl.zeros([BT], tl.float32)
    for i_v in tl.static_range((V + BV - 1) // BV):
        b_x = (load_tile(dy, length, s_w, 0, i_v, V, BT, BV, False) if b_y is None else b_y).to(tl.float32)
        b_yv += tl.sum(b_x * load_tile(v, length, s_v, 0, i_v, V, BT, BV, False).to(tl.float32), 1)
        store_tile(dv, b_x * b_beta[:, None], length, s_w, 0, i_v, V, BT, BV, False)
    return b_yv


@triton.jit
def inner(
    S,  # [K, V]
    D,  # [K, V]
    b_D,  # [BK, BV] rows i_k of it where BV is all of V, or None
    i_k,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """<S, D> of rows i_k."""
    total = 0.0
    for i_v in tl.static_range((V + BV - 1) // BV):
        b_x = (state_tile(D, i_k, i_v, K, V, BK, BV) if b_D is None else b_D).to(tl.float32)
        total += tl.sum(b_x * state_tile(S, i_k, i_v, K, V, BK, BV).to(tl.float32))
    return total


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_gradients(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    gates,  # [HV, B * T] cumulative log2 decays or None
    beta,  # [B, T, HV]
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
    p_w, p_y, p_S, p_D, s_w = w + row * V, dy + row * V, states + o_s, after + o_s, HV * V
    WHOLE: tl.constexpr = BV >= V
    b_w = load_tile(p_w, length, s_w, 0, 0, V, BT, BV, False) if WHOLE else None
    b_do = load_tile(p_do, length, s_do, 0, 0, V, BT, BV, False) if WHOLE else None
    b_y = load_tile(p_y, length, s_w, 0, 0, V, BT, BV, False) if WHOLE else None
    b_yv = of_values(v + begin * s_v + i_hv * V, p_y, b_y, dv + row * V, b_beta, length, s_v, s_w, V, BV, BT)
    small = tl.abs(b_beta) < SMALL
    b_factor, b_share = tl.where(small, 1.0, b_beta), tl.where(small, b_beta, 1.0)  # their product is beta
    read_q, read_p, b_write = tl.zeros([BT], tl.float32) + scale, -b_factor, tl.full([BT], 1.0, tl.float32)
    if GATED:
        read_q, read_p, b_write = read_q * tl.exp2(b_G), read_p * tl.exp2(b_E), tl.exp2(last - b_G)
    r, c, turns = o_t[:, None], o_t[None, :], 1 + (T >> 30)
    turned_X = pairs(p_w, b_w, p_do, b_do, scale, b_G[None, :], b_G[:, None], r <= c, turns, length, s_w, s_do, V, BV, BT, GATED, PRECISION)
    turned_M = pairs(
        p_w, b_w, p_y, b_y, -b_beta[None, :], b_E[None, :], b_G[:, None], r < c, turns, length, s_w, s_w, V, BV, BT, GATED, PRECISION
    )
    b_X = pairs(p_do, b_do, p_w, b_w, scale, b_G[:, None], b_G[None, :], r >= c, turns, length, s_do, s_w, V, BV, BT, GATED, PRECISION)
    b_M = pairs(
        p_y, b_y, p_w, b_w, -b_factor[:, None], b_E[:, None], b_G[None, :], r > c, turns, length, s_w, s_w, V, BV, BT, GATED, PRECISION
    )
    of_q, of_p, of_k, b_z = (tl.zeros([BT], tl.float32),) * 4
    overlap = 0.0
    for i_k in tl.range(0, (K + BK - 1) // BK, num_stages=1, disable_licm=True):  # addresses kept over tiles would spill
        b_k = load_tile(p_k, length, s_k, 0, i_k, K, BT, BK, False)
        b_q = load_tile(p_q, length, s_q, 0, i_k, K, BT, BK, False)
        b_p = b_k if p is None else load_tile(p_p, length, s_p, 0, i_k, K, BT, BK, False)
        b_S = state_tile(p_S, i_k, 0, K, V, BK, BV) if WHOLE else None
        b_dq = of_state(p_do, b_do, p_S, b_S, i_k, length, s_do, K, V, BK, BV, BT, PRECISION) * read_q[:, None]
        b_dq = tl.dot(b_X, b_k, b_dq, input_precision=PRECISION)
        if GATED:
            of_q += tl.sum(b_q.to(tl.float32) * b_dq, 1)
        store_tile(dq + row * K, b_dq, length, HV * K, 0, i_k, K, BT, BK, False)
        b_D = state_tile(p_D, i_k, 0, K, V, BK, BV) if WHOLE else None
        b_dk = of_state(p_w, b_w, p_D, b_D, i_k, length, s_w, K, V, BK, BV, BT, PRECISION)
        if GATED:
            b_dk *= b_write[:, None]
            b_z += tl.sum(b_k.to(tl.float32) * b_dk, 1)
            overlap += inner(p_S, p_D, b_D, i_k, K, V, BK, BV)
        b_dk = tl.dot(turned_X, b_q, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(turned_M, b_p, b_dk, input_precision=PRECISION)
        if GATED:
            of_k += tl.sum(b_k.to(tl.float32) * b_dk, 1)
        b_dp = of_state(p_y, b_y, p_S, b_S, i_k, length, s_w, K, V, BK, BV, BT, PRECISION) * read_p[:, None]
        b_dp = tl.dot(b_M, b_k, b_dp, input_precision=PRECISION)
        of_p += tl.sum(b_p.to(tl.float32) * b_dp, 1)
        b_dp *= b_share[:, None]
        if p is not None:
            store_tile(dp + row * K, b_dp, length, HV * K, 0, i_k, K, BT, BK, False)
        else:
            b_dk += b_dp
        store_tile(dk + row * K, b_dk, length, HV * K, 0, i_k, K, BT, BK, False)
    tl.store(dbeta + p_t, (b_yv + of_p / b_factor).to(dbeta.dtype.element_ty), mask=m_t)
    if dg is not None:  # (15)
        of_p *= b_share
        b_dG = of_q + of_p - of_k
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
    gates: torch.Tensor | None,
    w: torch.Tensor,
    dy: torch.Tensor,
    states: torch.Tensor,
    after: torch.Tensor,
    warps: int,
    BK: int,
) -> Found:
    """All gradients but that of h0, by tiles of BK columns of K."""
    shared = c.q.dtype if c.HV == c.H else torch.float32
    dq, dk, dp = (c.q.new_empty((c.B, c.T, c.HV, c.K), dtype=shared) if want else None for want in (True, True, c.p is not None))
    assert dq is not None and dk is not None
    dg = None if c.g is None else torch.empty_like(c.g)
    out = Found(dq, dk, dp, c.v.new_empty((c.B, c.T, c.HV, c.V)), dg, torch.empty_like(c.beta))
    args = (
        c.q, c.k, c.p, c.v, do, gates, c.beta, w, dy, states, after, c.cu, c.offsets, *out, c.T, c.N, c.B * c.T, c.scale,
        c.s_q, c.s_k, c.s_p, c.s_v, s_do, c.SEG, c.H, c.HV,
    )  # fmt: skip
    constants = c.constants("V", "BT", "EARLY") | {
        "BV": gradient_columns(c.V, c.BT, c.same["BV"], c.q.element_size()),
        "BK": min(BK, tile(c.K)),
    }
    launch(chunk_gradients, (c.chunks * c.HV,), args, constants, warps, 1)
    return out
