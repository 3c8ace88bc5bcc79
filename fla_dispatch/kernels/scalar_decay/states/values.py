"""dv of every chunk, equation (11), with the gradients of beta, of gates (12) and of skip (13).

Grid: (chunks, H * shares); a program takes HEADS of the value heads of one query head. Rows are s, columns t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..recurrence import Options
from ..sweep.chunk_body import add_weighted, load_tile
from ..sweep.host import Call, constants, padded
from .outputs import between, chunk_span, cumulative, heads_of, load_head, load_state, states_of, store_head


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV", "SHARES"])
def chunk_values(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    g,  # [HV, B * T] cumulative log2 decays (RAW: [B, T, HV] log decays), or [HV] log decays, or None
    w,  # [B, T, HV] beta or None
    skip,  # [HV] or None
    after,  # [chunks, HV, K, V] R after each chunk, or None
    rows,  # [B, T, HV] float32: what `chunk_queries` has of (12), or None where states are zero
    overlap,  # [OVERLAPS, chunks, HV] float32: <S, R> in parts, or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dv,  # [B, T, HV, V]
    dw,  # [B, T, HV] or None
    dg,  # [B, T, HV] or None
    dskip,  # [chunks, HV] float32 or None
    before,  # [chunks, HV, K, V] float32: gradients of the states before each chunk, or None
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
    OVERLAPS: tl.constexpr,
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
    first = i_share * HEADS
    end = tl.minimum(first + HEADS, group)
    o_chunk = tl.cast(i_c, tl.int64) * HV
    if length <= 0:
        if dskip is not None:
            for j in range(first, end):
                tl.store(dskip + o_chunk + i_h * group + j, 0.0)
        return
    o_t = tl.arange(0, BT)
    m_t = o_t < length
    inside = (o_t[:, None] <= o_t[None, :]) & m_t[None, :]
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    plane = tl.cast(total, tl.int64)
    b_q = load_tile(q + begin * s_q + i_h * K, length, s_q, 0, 0, K, BT, BK, False)
    b_k = load_tile(k + begin * s_k + i_h * K, length, s_k, 0, 0, K, BT, BK, False)
    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    rows_v = heads_of(v + begin * s_v, length, s_v, HV, V, BT, BV, TMA)
    rows_do = heads_of(do + begin * s_do, length, s_do, HV, V, BT, BV, TMA)
    rows_dv = heads_of(dv + begin * HV * V, length, HV * V, HV, V, BT, BV, TMA)
    if after is not None:
        after_c = states_of(after, i_c, HV, K, V, BK, BV, TMA)
    for j in tl.range(first, end, num_stages=STAGES):
        i_hv = i_h * group + j
        b_v = load_head(rows_v, length, s_v, i_hv, V, BT, BV, TMA)
        b_do = load_head(rows_do, length, s_do, i_hv, V, BT, BV, TMA)
        p_t = (begin + o_t) * HV + i_hv
        b_w = tl.full([BT], 1.0, tl.float32)
        if w is not None:
            b_w = tl.load(w + p_t, mask=m_t, other=0.0).to(tl.float32)
        to_end = tl.full([BT], 1.0, tl.float32)
        if DECAY == 0:
            b_p = tl.where(inside, b_kq, 0.0)
        else:
            b_G, last = cumulative(g, i_hv, begin, length, plane, HV, BT, DECAY, RAW, FLOOR, q.dtype.element_ty == tl.float32)
            to_end = tl.exp2((last - b_G).to(tl.float32))
            b_p = b_kq * between(b_G, inside, True)
        if dg is not None:  # before u, beside which E would spill
            b_e = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * b_w[:, None] * b_p
            dG = tl.sum(b_e, 0) - tl.sum(b_e, 1)
        b_u = tl.zeros([BT, BV], tl.float32)
        if after is not None:
            b_r = load_state(after_c, i_hv, K, V, BK, BV, TMA)
            b_u = tl.dot(b_k, b_r.to(b_k.dtype), input_precision=PRECISION) * to_end[:, None]
        if dg is not None:
            y = tl.sum(b_u * b_v.to(tl.float32), 1) * b_w
        b_u = tl.dot(b_p.to(b_do.dtype), b_do, b_u, input_precision=PRECISION)  # (11)
        if dw is not None:
            tl.store(dw + p_t, tl.sum(b_u * b_v.to(tl.float32), 1).to(dw.dtype.element_ty), mask=m_t)
        b_u *= b_w[:, None]
        if skip is not None:
            b_u += tl.load(skip + i_hv).to(tl.float32) * b_do.to(tl.float32)
        store_head(rows_dv, b_u, length, HV * V, i_hv, V, BT, BV, TMA)
        if dskip is not None:
            tl.store(dskip + o_chunk + i_hv, tl.sum(tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), 1), 0))
        if dg is not None:  # (12)
            dG -= y
            if rows is not None:
                dG += tl.load(rows + p_t, mask=m_t, other=0.0)
            whole = 0.0
            for i in tl.static_range(OVERLAPS):
                whole += tl.load(overlap + (i * tl.num_programs(0).to(tl.int64) + i_c) * HV + i_hv)
            whole = whole * tl.exp2(last.to(tl.float32)) + tl.sum(y, 0) + tl.sum(dG, 0)
            tl.store(dg + p_t, (whole - tl.cumsum(dG, 0) + dG).to(dg.dtype.element_ty), mask=m_t)
        if before is not None:  # (7), back in time
            b_b = tl.zeros([BK, BV], tl.float32)
            to_row = tl.full([BT], scale, tl.float32)
            if after is not None:
                b_b = b_r.to(tl.float32)
            if DECAY != 0:
                b_b *= tl.exp2(last.to(tl.float32))
                to_row *= tl.exp2(b_G.to(tl.float32))
            tl.store(before + (o_chunk + i_hv) * K * V + p_s, add_weighted(b_b, b_q, b_do, to_row, False, PRECISION), mask=m_s)


class Found(NamedTuple):
    """Gradients as the kernel leaves them."""

    dv: torch.Tensor  # [B, T, HV, V]
    dbeta: torch.Tensor | None  # [B, T, HV]
    dg: torch.Tensor | None  # [B, T, HV]
    dskip: torch.Tensor | None  # [chunks, HV] float32
    before: torch.Tensor | None  # [chunks, HV, K, V] float32


def run_values(
    c: Call,
    o: Options,
    do: torch.Tensor,
    s_do: int,
    after: torch.Tensor | None,
    rows: torch.Tensor | None,
    overlap: torch.Tensor | None,
    dg: torch.Tensor | None,
    before: torch.Tensor | None = None,
    *,
    chunks: int,
    raw: bool = False,  # g is as the call has it
    SEG: int,
    BT: int,
    HEADS: int,
    offsets: torch.Tensor | None,
    warps: int,
    stages: int,
    tma: bool = False,
) -> Found:
    """All gradients but dq and dk; dg, before: where they shall be, or None."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    out = Found(
        c.v.new_empty((c.B, c.T, c.HV, c.V)),
        None if c.beta is None else torch.empty_like(c.beta),
        dg,
        None if c.skip is None else c.q.new_empty((chunks, c.HV), dtype=torch.float32),
        before,
    )
    launch(
        chunk_values,
        (chunks, c.H * shares),
        (
            c.q, c.k, c.v, do, c.g, c.beta, c.skip, after, rows, overlap, c.cu, offsets, *out, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k,
            c.s_v, s_do, SEG, c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS,
            "OVERLAPS": 0 if overlap is None else overlap.shape[0], "DECAY": same["DECAY"], "RAW": raw,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "FLOOR": same["FLOOR"], "TMA": tma, "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return out
