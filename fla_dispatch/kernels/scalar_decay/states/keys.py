"""dk of every chunk, equation (10).

Grid: (chunks, H * shares); a program takes HEADS of the value heads of one query head. Rows are s, columns t.
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
def chunk_keys(
    q,  # [B, T, H, K], token stride s_q
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    g,  # [HV, B * T] cumulative log2 decays (RAW: [B, T, HV] log decays), or [HV] log decays, or None
    w,  # [B, T, HV] beta or None
    after,  # [chunks, HV, K, V] R after each chunk, or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dk,  # [SHARES, B, T, H, K]
    T,
    N,
    total,
    scale,
    s_q,
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
    inside = (o_t[:, None] <= o_t[None, :]) & m_t[None, :]
    plane = tl.cast(total, tl.int64)
    rows_v = heads_of(v + begin * s_v, length, s_v, HV, V, BT, BV, TMA)
    rows_do = heads_of(do + begin * s_do, length, s_do, HV, V, BT, BV, TMA)
    if after is not None:
        after_c = states_of(after, i_c, HV, K, V, BK, BV, TMA)
    shared = tl.zeros([BT, BT], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    first = i_share * HEADS
    for j in tl.range(first, tl.minimum(first + HEADS, group), num_stages=STAGES):
        i_hv = i_h * group + j
        b_v = load_head(rows_v, length, s_v, i_hv, V, BT, BV, TMA)
        b_do = load_head(rows_do, length, s_do, i_hv, V, BT, BV, TMA)
        b_w = tl.full([BT], 1.0, tl.float32)
        if w is not None:
            b_w = tl.load(w + (begin + o_t) * HV + i_hv, mask=m_t, other=0.0).to(tl.float32)
        to_end = b_w
        b_d = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * (b_w * scale)[:, None]
        if DECAY == 0:
            b_d = tl.where(inside, b_d, 0.0)
        else:
            b_G, last = cumulative(g, i_hv, begin, length, plane, HV, BT, DECAY, RAW, FLOOR, q.dtype.element_ty == tl.float32)
            b_d *= between(b_G, inside, True)
            to_end *= tl.exp2((last - b_G).to(tl.float32))
        shared += b_d
        if after is not None:
            b_r = load_state(after_c, i_hv, K, V, BK, BV, TMA).to(b_v.dtype)
            b_vw = (b_v.to(tl.float32) * to_end[:, None]).to(b_v.dtype)
            b_dk = tl.dot(b_vw, tl.trans(b_r), b_dk, input_precision=PRECISION)
    b_q = load_tile(q + begin * s_q + i_h * K, length, s_q, 0, 0, K, BT, BK, False)
    b_dk = tl.dot(shared.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_tile(dk + (i_share * plane + begin) * H * K + i_h * K, b_dk, length, H * K, 0, 0, K, BT, BK, False)


def run_keys(
    c: Call,
    o: Options,
    do: torch.Tensor,
    s_do: int,
    after: torch.Tensor | None,
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
) -> torch.Tensor:
    """dk [shares, B, T, H, K], in float32 where there are several shares."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    dk = c.q.new_empty((shares, c.B, c.T, c.H, c.K), dtype=c.q.dtype if shares == 1 else torch.float32)
    launch(
        chunk_keys,
        (chunks, c.H * shares),
        (
            c.q, c.v, do, c.g, c.beta, after, c.cu, offsets, dk, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_v, s_do, SEG, c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS, "DECAY": same["DECAY"], "RAW": raw,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "FLOOR": same["FLOOR"], "TMA": tma, "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return dk
