"""dq of every chunk, equation (9), and the part of (12) that comes from the state before it: scale e_t q_t . S do_t.

Grid: (chunks, H * shares); a program takes HEADS of the value heads of one query head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..recurrence import Options
from ..sweep.chunk_body import load_tile, store_tile
from ..sweep.host import Call, constants, padded
from .outputs import between, chunk_span, cumulative, heads_of, load_head, load_state, states_of


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV", "SHARES"])
def chunk_queries(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    g,  # [HV, B * T] cumulative log2 decays (RAW: [B, T, HV] log decays), or [HV] log decays, or None
    w,  # [B, T, HV] beta or None
    states,  # [chunks, HV, K, V] S before each chunk, or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [SHARES, B, T, H, K]
    rows,  # [B, T, HV] float32, for (12), or None (as without states)
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
    RAW: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOOR: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_c = tl.program_id(0)
    i_h = tl.program_id(1) // SHARES
    i_share = tl.program_id(1) % SHARES
    group = HV // H
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    o_t = tl.arange(0, BT)
    m_t = o_t < length
    inside = (o_t[:, None] >= o_t[None, :]) & m_t[:, None]
    plane = tl.cast(total, tl.int64)
    if rows is not None:
        b_q = load_tile(q + begin * s_q + i_h * K, length, s_q, 0, 0, K, BT, BK, False)
    shared = tl.zeros([BT, BT], tl.float32)
    b_dq = tl.zeros([BT, BK], tl.float32)
    rows_v = heads_of(v + begin * s_v, length, s_v, HV, V, BT, BV, TMA)
    rows_do = heads_of(do + begin * s_do, length, s_do, HV, V, BT, BV, TMA)
    if states is not None:
        states_c = states_of(states, i_c, HV, K, V, BK, BV, TMA)
    first = i_share * HEADS
    for j in tl.range(first, tl.minimum(first + HEADS, group), num_stages=STAGES):
        i_hv = i_h * group + j
        b_v = load_head(rows_v, length, s_v, i_hv, V, BT, BV, TMA)
        b_do = load_head(rows_do, length, s_do, i_hv, V, BT, BV, TMA)
        b_d = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) * scale
        to_row = tl.full([BT], scale, tl.float32)
        if DECAY == 0:
            b_d = tl.where(inside, b_d, 0.0)
        else:
            b_G, _ = cumulative(g, i_hv, begin, length, plane, HV, BT, DECAY, RAW, FLOOR, q.dtype.element_ty == tl.float32)
            to_row *= tl.exp2(b_G.to(tl.float32))
            b_d *= between(b_G, inside, False)
        p_t = (begin + o_t) * HV + i_hv
        if w is not None:
            b_d *= tl.load(w + p_t, mask=m_t, other=0.0).to(tl.float32)[None, :]
        shared += b_d
        if states is not None:
            b_s = load_state(states_c, i_hv, K, V, BK, BV, TMA).to(b_do.dtype)
            b_w = (b_do.to(tl.float32) * to_row[:, None]).to(b_do.dtype)
            b_dq = tl.dot(b_w, tl.trans(b_s), b_dq, input_precision=PRECISION)
            if rows is not None:  # q S is narrower than S do
                b_y = tl.dot(b_q, b_s, input_precision=PRECISION)
                tl.store(rows + p_t, to_row * tl.sum(b_y * b_do.to(tl.float32), 1), mask=m_t)
    b_k = load_tile(k + begin * s_k + i_h * K, length, s_k, 0, 0, K, BT, BK, False)
    b_dq = tl.dot(shared.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_tile(dq + (i_share * plane + begin) * H * K + i_h * K, b_dq, length, H * K, 0, 0, K, BT, BK, False)


def run_queries(
    c: Call,
    o: Options,
    do: torch.Tensor,
    s_do: int,
    states: torch.Tensor | None,
    *,
    chunks: int,
    gates: bool,
    raw: bool = False,  # g is as the call has it
    SEG: int,
    BT: int,
    HEADS: int,
    offsets: torch.Tensor | None,
    warps: int,
    stages: int,
    tma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dq [shares, B, T, H, K], in float32 where there are several shares; with gates and states the rows for (12), [B, T, HV] float32."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    dq = c.q.new_empty((shares, c.B, c.T, c.H, c.K), dtype=c.q.dtype if shares == 1 else torch.float32)
    rows = c.q.new_empty((c.B, c.T, c.HV), dtype=torch.float32) if gates and states is not None else None
    launch(
        chunk_queries,
        (chunks, c.H * shares),
        (
            c.q, c.k, c.v, do, c.g, c.beta, states, c.cu, offsets, dq, rows, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v, s_do, SEG,
            c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS, "DECAY": same["DECAY"], "RAW": raw,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "FLOOR": same["FLOOR"], "TMA": tma, "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return dq, rows
