"""Equations (6) and (7) from the inverse of every chunk: outputs and final states, or, for backward, w and the states of all chunks.

Grid: (units * HV * tiles of V), units being sequences, or segments whose states before them are given; the tile of V is the
fastest index, so that siblings share q, k and the inverse in L2. A block goes through its unit chunk by chunk with the state in
registers:

    (12)  y = beta (v - exp(E) p S),   w = A y,   o = scale (exp(G) q S + X w),   S <- exp(G_end) S + k^T (exp(G_end - G) w)

A gate per channel is part of q, p and k as (17) has it, and decays the rows of S.
Operands of products are read from shared memory as they were loaded or rounded; X, where it is computed here, waits for no state.
Results are stored by pointers: a descriptor's tile of shared memory would cost the second block of a unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..._shared.tiles import chunk_row, load_tile, rows_of, store_tile
from .host import Call
from .parts import between, chunk_gates, first_chunk


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_forward(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    v,  # [B, T, HV, V], token stride s_v, or None: zeros, and the state before each unit is the identity
    gates,  # [HV, B * T] cumulative log2 decays or None
    beta,  # [B, T, HV]
    decays,  # [chunks, HV, K] of the rows of a state over each chunk, or None
    inverse,  # [HV, B * T, BT]
    scores,  # [HV, B * T, BT] scale X, or None: then it is computed here
    h0,  # [units, HV, K, V] or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    o,  # [B, T, HV, V] or None
    state,  # [units, HV, K, V] or None
    w,  # [B, T, HV, V] or None
    states,  # [chunks, HV, K, V] before each chunk, or None
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_p,
    s_v,
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
    rows_k = rows_of(k + begin * s_k + i_h * K, length, s_k, K, BT, BK, TMA)
    if v is not None:
        rows_v = rows_of(v + begin * s_v + i_hv * V, length, s_v, V, BT, BV, TMA)
    rows_a = rows_of(inverse + (i_hv * plane + begin) * BT, length, BT, BT, BT, BT, TMA)
    if p is not None:
        rows_p = rows_of(p + begin * s_p + i_h * K, length, s_p, K, BT, BK, TMA)
    if o is not None:
        rows_q = rows_of(q + begin * s_q + i_h * K, length, s_q, K, BT, BK, TMA)
    if scores is not None:
        rows_x = rows_of(scores + (i_hv * plane + begin) * BT, length, BT, BT, BT, BT, TMA)
    p_o = (begin * HV + i_hv) * V
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    inside = o_t[:, None] >= o_t[None, :]
    b_s = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        b_s += tl.load(h0 + tl.cast(i_nh, tl.int64) * K * V + p_s, mask=m_s, other=0.0)
    if v is None:
        b_s += tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)
    if states is not None or decays is not None:
        i_c = first_chunk(offsets, i_nh // HV, T, SEG, BT, SEGMENTED, PACKED)
    p_beta = beta + begin * HV + i_hv
    NT = tl.cdiv(length, BT)
    next_beta = chunk_row(p_beta, HV, NT * 0, length, BT)  # a chunk ahead: the compiler pipelines tiles alone
    if gates is not None:
        p_g = gates + i_hv * plane + begin
        next_G, next_E, next_total = chunk_gates(p_g, NT * 0, length, BT, EARLY)
    if decays is not None:
        p_d = decays + (i_c * HV + i_hv) * K + o_k
        next_decay = tl.load(p_d, mask=(o_k < K) & (NT > 0), other=0.0)
    for i_t in tl.range(0, NT, num_stages=STAGES):
        b_beta = next_beta
        next_beta = chunk_row(p_beta, HV, i_t + 1, length, BT)
        b_sh = b_s.to(k.dtype.element_ty)
        b_k = load_tile(rows_k, length, s_k, i_t, 0, K, BT, BK, TMA)
        if p is not None:
            b_y = tl.dot(load_tile(rows_p, length, s_p, i_t, 0, K, BT, BK, TMA), b_sh, input_precision=PRECISION)
        else:
            b_y = tl.dot(b_k, b_sh, input_precision=PRECISION)
        if v is not None:
            b_v = load_tile(rows_v, length, s_v, i_t, i_v, V, BT, BV, TMA).to(tl.float32)
        if gates is not None:
            total_g = next_total
            b_G = tl.where(o_t < length - i_t * BT, next_G, total_g)  # unused rows decay no further
            b_read = tl.exp2(next_E)
            next_G, next_E, next_total = chunk_gates(p_g, i_t + 1, length, BT, EARLY)
            b_y *= b_read[:, None]
        if v is not None:
            b_y = b_v - b_y
        else:
            b_y = -b_y
        b_y *= b_beta[:, None]
        b_a = load_tile(rows_a, length, BT, i_t, 0, BT, BT, BT, TMA)
        b_w = tl.dot(b_a, b_y.to(b_a.dtype), input_precision=PRECISION)
        b_wh = b_w.to(b_k.dtype)
        if o is not None:
            b_q = load_tile(rows_q, length, s_q, i_t, 0, K, BT, BK, TMA)
            b_o = tl.dot(b_q, b_sh, input_precision=PRECISION) * scale
            if gates is not None:
                b_o *= tl.exp2(b_G)[:, None]
            if scores is not None:
                b_x = load_tile(rows_x, length, BT, i_t, 0, BT, BT, BT, TMA)
            else:
                b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
                if gates is not None:
                    b_x *= between(b_G[:, None], b_G[None, :], inside)
                else:
                    b_x = tl.where(inside, b_x, 0.0)
                b_x = b_x.to(b_k.dtype)
            b_o = tl.dot(b_x, b_wh, b_o, input_precision=PRECISION)
            store_tile(o + p_o, b_o, length, HV * V, i_t, i_v, V, BT, BV, False)
        if w is not None:
            store_tile(w + p_o, b_wh, length, HV * V, i_t, i_v, V, BT, BV, False)
        if states is not None:
            tl.store(states + ((i_c + i_t) * HV + i_hv) * K * V + p_s, b_sh, mask=m_s)
        if gates is not None:
            b_s *= tl.exp2(total_g)
            b_wh = (b_w * tl.exp2(total_g - b_G)[:, None]).to(b_k.dtype)
        if decays is not None:
            b_s *= next_decay[:, None]
            p_d += HV * K
            next_decay = tl.load(p_d, mask=(o_k < K) & (i_t + 1 < NT), other=0.0)
        b_s = tl.dot(tl.trans(b_k), b_wh, b_s, input_precision=PRECISION)
    if state is not None:
        tl.store(state + tl.cast(i_nh, tl.int64) * K * V + p_s, b_s, mask=m_s)


def run_forward(
    c: Call,
    inverse: torch.Tensor,
    scores: torch.Tensor | None,
    gates: torch.Tensor | None,
    warps: int,
    h0: torch.Tensor | None,
    *,
    o: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    w: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
    transition: bool = False,
) -> None:
    """Fill what is given, from the states h0 [units, HV, K, V] before each unit, or zeros. transition: what becomes of the identity
    without values, then in state [units, HV, K, K]."""
    V = c.K if transition else c.V
    args = (
        c.q, c.k, c.p, None if transition else c.v, gates, c.beta, c.decays, inverse, scores, h0, c.cu, c.offsets, o, state, w, states,
        c.T, c.N, c.B * c.T, c.scale, c.s_q, c.s_k, c.s_p, c.s_v, c.SEG, c.H, c.HV,
    )  # fmt: skip
    constants = c.constants("BV", "BT", "EARLY", "SEGMENTED", "TMA", "STAGES") | {"V": V}
    if transition:
        constants["BV"] = min(constants["BV"], constants["BK"])
    launch(chunk_forward, (c.units * c.HV * -(-V // constants["BV"]),), args, constants, warps, constants["STAGES"])
