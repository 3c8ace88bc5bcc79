"""dq of every chunk, equation (9), and the half of (12) that belongs to its rows: sum_s E_ts + scale e_t q_t . S do_t.

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
from .outputs import between, chunk_span, cumulative


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
    rows,  # [B, T, HV] float32, for (12), or None
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
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    plane = tl.cast(total, tl.int64)
    b_q = load_tile(q + begin * s_q + i_h * K, length, s_q, 0, 0, K, BT, BK, False)
    b_k = load_tile(k + begin * s_k + i_h * K, length, s_k, 0, 0, K, BT, BK, False)
    if rows is not None:
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    shared = tl.zeros([BT, BT], tl.float32)
    b_dq = tl.zeros([BT, BK], tl.float32)
    first = i_share * HEADS
    for j in tl.range(first, tl.minimum(first + HEADS, group), num_stages=STAGES):
        i_hv = i_h * group + j
        b_v = load_tile(v + begin * s_v + i_hv * V, length, s_v, 0, 0, V, BT, BV, False)
        b_do = load_tile(do + begin * s_do + i_hv * V, length, s_do, 0, 0, V, BT, BV, False)
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
        if rows is not None:
            b_rows = tl.sum(b_d * b_qk, 1)
        if states is not None:
            b_s = tl.load(states + (tl.cast(i_c, tl.int64) * HV + i_hv) * K * V + p_s, mask=m_s, other=0.0).to(b_do.dtype)
            b_x = tl.dot((b_do.to(tl.float32) * to_row[:, None]).to(b_do.dtype), tl.trans(b_s), input_precision=PRECISION)
            b_dq += b_x
            if rows is not None:
                b_rows += tl.sum(b_q.to(tl.float32) * b_x, 1)
        if rows is not None:
            tl.store(rows + p_t, b_rows, mask=m_t)
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dq [shares, B, T, H, K], in float32 where there are several shares, and with gates the rows of (12), [B, T, HV] float32."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    dq = c.q.new_empty((shares, c.B, c.T, c.H, c.K), dtype=c.q.dtype if shares == 1 else torch.float32)
    rows = c.q.new_empty((c.B, c.T, c.HV), dtype=torch.float32) if gates else None
    launch(
        chunk_queries,
        (chunks, c.H * shares),
        (
            c.q, c.k, c.v, do, c.g, c.beta, states, c.cu, offsets, dq, rows, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v, s_do, SEG,
            c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS, "DECAY": same["DECAY"], "RAW": raw,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "FLOOR": same["FLOOR"], "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return dq, rows
