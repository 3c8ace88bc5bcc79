"""Gradients of states, back in time: (8) and (9) for whole chunks, from the inverses and scores of all chunks.

Grid: (units * HV * tiles of V); a unit is a sequence, or a segment of one whose arriving gradient is given. With D the gradient of
the state after a chunk, which a block carries in registers,

    (13)  dw = (scale X)^T do + exp(G_end - G) k D,   dy = A^T dw,   dv = beta dy
          D <- exp(G_end) D + q^T (scale exp(G) do) - p^T (exp(E) dv)

where dy is the gradient of what A multiplies in (12). Stored are dy and D of each chunk, for the gradients that need no order. A gate
per channel is part of q, p and k as (17) has it, and decays the rows of D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..._shared.tiles import chunk_row, load_tile, rows_of, store_tile
from .host import Call, tiles
from .parts import chunk_gates, first_chunk


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_reverse(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    do,  # [B, T, HV, V], token stride s_do
    gates,  # [HV, B * T] cumulative log2 decays or None
    beta,  # [B, T, HV]
    decays,  # [chunks, HV, K] of the rows of a state over each chunk, or None
    inverse,  # [HV, B * T, BT]
    scores,  # [HV, B * T, BT] scale X
    dS,  # [units, HV, K, V] gradient of the state after each unit, or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dy,  # [B, T, HV, V] or None
    after,  # [chunks, HV, K, V] D after each chunk, or None
    dh0,  # [units, HV, K, V] or None
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_p,
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
    SEGMENTED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_nh = pid // NV
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, offsets, i_nh // HV, T, N, SEG, SEGMENTED, PACKED)
    plane = tl.cast(total, tl.int64)
    rows_q = rows_of(q + begin * s_q + i_h * K, length, s_q, K, BT, BK, TMA)
    rows_k = rows_of(k + begin * s_k + i_h * K, length, s_k, K, BT, BK, TMA)
    rows_do = rows_of(do + begin * s_do + i_hv * V, length, s_do, V, BT, BV, TMA)
    rows_a = rows_of(inverse + (i_hv * plane + begin) * BT, length, BT, BT, BT, BT, TMA)
    rows_x = rows_of(scores + (i_hv * plane + begin) * BT, length, BT, BT, BT, BT, TMA)
    if p is not None:
        rows_p = rows_of(p + begin * s_p + i_h * K, length, s_p, K, BT, BK, TMA)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    b_d = tl.zeros([BK, BV], tl.float32)
    if dS is not None:
        b_d += tl.load(dS + tl.cast(i_nh, tl.int64) * K * V + p_s, mask=m_s, other=0.0)
    i_c = first_chunk(offsets, i_nh // HV, T, SEG, BT, SEGMENTED, PACKED)
    p_beta = beta + begin * HV + i_hv
    NT = tl.cdiv(length, BT)
    next_beta = chunk_row(p_beta, HV, NT - 1, length, BT)
    if gates is not None:
        p_g = gates + i_hv * plane + begin
        next_G, next_E, next_total = chunk_gates(p_g, NT - 1, length, BT, EARLY)
    if decays is not None:
        p_d = decays + ((i_c + NT - 1) * HV + i_hv) * K + o_k
        next_decay = tl.load(p_d, mask=(o_k < K) & (NT > 0), other=0.0)
    for i in tl.range(0, NT, num_stages=STAGES):
        i_t = NT - 1 - i
        b_beta = next_beta
        next_beta = chunk_row(p_beta, HV, i_t - 1, length, BT)
        if gates is not None:
            total_g = next_total
            b_G = tl.where(o_t < length - i_t * BT, next_G, total_g)
            begin_g = 0.0 if EARLY else tl.max(b_G, 0)  # the greatest exponent of what is added to D, taken out of half precision
            b_beta *= tl.exp2(tl.minimum(next_E - begin_g, 0.0))
            next_G, next_E, next_total = chunk_gates(p_g, i_t - 1, length, BT, EARLY)
        b_dh = b_d.to(k.dtype.element_ty)
        if after is not None:
            tl.store(after + ((i_c + i_t) * HV + i_hv) * K * V + p_s, b_dh, mask=m_s)
        b_k = load_tile(rows_k, length, s_k, i_t, 0, K, BT, BK, TMA)
        b_w = tl.dot(b_k, b_dh, input_precision=PRECISION)
        if gates is not None:
            b_w *= tl.exp2(total_g - b_G)[:, None]
        b_do = load_tile(rows_do, length, s_do, i_t, i_v, V, BT, BV, TMA)
        b_x = load_tile(rows_x, length, BT, i_t, 0, BT, BT, BT, TMA)
        b_w = tl.dot(tl.trans(b_x), b_do, b_w, input_precision=PRECISION)
        b_a = load_tile(rows_a, length, BT, i_t, 0, BT, BT, BT, TMA)
        b_y = tl.dot(tl.trans(b_a), b_w.to(b_a.dtype), input_precision=PRECISION)
        if dy is not None:
            store_tile(dy + (begin * HV + i_hv) * V, b_y, length, HV * V, i_t, i_v, V, BT, BV, False)
        b_q = load_tile(rows_q, length, s_q, i_t, 0, K, BT, BK, TMA)
        b_from = b_do.to(tl.float32) * scale
        if gates is not None:
            b_d *= tl.exp2(total_g - begin_g)
            b_from *= tl.exp2(b_G - begin_g)[:, None]
        if decays is not None:
            b_d *= next_decay[:, None]
            p_d -= HV * K
            next_decay = tl.load(p_d, mask=(o_k < K) & (i_t > 0), other=0.0)
        b_d = tl.dot(tl.trans(b_q), b_from.to(b_q.dtype), b_d, input_precision=PRECISION)
        b_y = (-b_beta[:, None] * b_y).to(b_q.dtype)
        if p is not None:
            b_k = load_tile(rows_p, length, s_p, i_t, 0, K, BT, BK, TMA)
        b_d = tl.dot(tl.trans(b_k), b_y, b_d, input_precision=PRECISION)
        if gates is not None:
            if not EARLY:
                b_d *= tl.exp2(begin_g)
    if dh0 is not None:
        tl.store(dh0 + tl.cast(i_nh, tl.int64) * K * V + p_s, b_d, mask=m_s)


def run_reverse(
    c: Call,
    do: torch.Tensor,
    s_do: int,
    inverse: torch.Tensor,
    scores: torch.Tensor,
    gates: torch.Tensor | None,
    dS: torch.Tensor | None,
    dh0: torch.Tensor | None,
    dy: torch.Tensor | None,
    after: torch.Tensor | None,
    warps: int,
) -> None:
    """Fill dh0, dy and D after each chunk where given."""
    args = (
        c.q, c.k, c.p, do, gates, c.beta, c.decays, inverse, scores, dS, c.cu, c.offsets, dy, after, dh0, c.T, c.N, c.B * c.T, c.scale,
        c.s_q, c.s_k, c.s_p, s_do, c.SEG, c.H, c.HV,
    )  # fmt: skip
    constants = c.constants("V", "BV", "BT", "EARLY", "SEGMENTED", "TMA", "STAGES")
    launch(chunk_reverse, (c.units * c.HV * tiles(c),), args, constants, warps, constants["STAGES"])
