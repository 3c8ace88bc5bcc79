"""The output of every chunk from the states before it, equation (4): o = scale (M * beta * q k^T) v + scale e^G q S + skip v.

Grid: (chunks, H * shares). A program takes one chunk and HEADS of the value heads of one query head, whose q k^T it computes once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options
from ..sweep.chunk_body import LOG2E, add_weighted, load_tile, store_tile
from ..sweep.host import Call, constants, padded


@triton.jit
def chunk_span(
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    i_c,
    T,
    N,
    SEG,
    BT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """First token and length of chunk i_c, counted through all segments; empty past a sequence's end."""
    per_unit = SEG // BT
    begin, length = unit_span(cu, offsets, i_c // per_unit, T, N, SEG, True, PACKED)
    step = (i_c % per_unit) * BT
    return begin + step, tl.maximum(tl.minimum(length - step, BT), 0)


@triton.jit
def cumulative(
    g,  # [HV, B * T] cumulative log2 decays; RAW: [B, T, HV] log decays; [HV] log decays (DECAY 1)
    i_hv,
    begin,
    length,
    plane,
    HV,
    BT: tl.constexpr,
    DECAY: tl.constexpr,
    RAW: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,  # RAW sums in float64: their differences keep the digits of float32
):
    """Cumulative log2 decays [BT] of a chunk's tokens for one head, and that of its end; nothing decays past its length."""
    o_t = tl.arange(0, BT)
    if DECAY == 1:
        lg = tl.load(g + i_hv).to(tl.float32) * LOG2E
        last = length.to(tl.float32) * lg
        b_G = tl.minimum(o_t + 1, length).to(tl.float32) * lg
    elif RAW:
        b_g = tl.load(g + (begin + o_t) * HV + i_hv, mask=o_t < length, other=0.0).to(tl.float32)
        b_g = tl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E
        if WIDE:
            b_g = b_g.to(tl.float64)
        b_G = tl.cumsum(b_g, 0)
        last = tl.sum(tl.where(o_t == BT - 1, b_G, 0.0), 0)  # the same rounding: of the last token's own decay nothing is left
    else:
        p_g = g + i_hv * plane + begin
        last = tl.load(p_g + length - 1)
        b_G = tl.load(p_g + o_t, mask=o_t < length, other=0.0)
        b_G = tl.where(o_t < length, b_G, last)
    return b_G, last


@triton.jit
def between(b_G, inside, BACK: tl.constexpr):
    """M of (4), [rows, columns], from cumulative log2 decays: rows are later tokens; with BACK they are earlier ones."""
    apart = (b_G[None, :] - b_G[:, None]) if BACK else (b_G[:, None] - b_G[None, :])
    return tl.exp2(tl.where(inside, apart.to(tl.float32), float("-inf")))


@triton.jit
def heads_of(p, length, stride, HV, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Rows of all heads of a chunk, [length, HV * D], for tiles of one head: a tensor descriptor (D = BD), or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(p, shape=[length, HV * D], strides=[stride, 1], block_shape=[BT, BD])
    else:
        return p


@triton.jit
def load_head(rows, length, stride, i_hv, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Tile [BT, BD] of head i_hv of `heads_of`."""
    if TMA:
        return rows.load([0, i_hv * D])
    else:
        return load_tile(rows + i_hv * D, length, stride, 0, 0, D, BT, BD, False)


@triton.jit
def store_head(rows, b_o, length, stride, i_hv, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """The other way round."""
    if TMA:
        rows.store([0, i_hv * D], b_o.to(rows.dtype))
    else:
        store_tile(rows + i_hv * D, b_o, length, stride, 0, 0, D, BT, BD, False)


@triton.jit
def states_of(p, i_c, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TMA: tl.constexpr):
    """States of all heads of chunk i_c, [HV * K, V]: a tensor descriptor (K = BK, V = BV), or the pointer to them."""
    p_c = p + tl.cast(i_c, tl.int64) * HV * (K * V)
    if TMA:
        return tl.make_tensor_descriptor(p_c, shape=[HV * K, V], strides=[V, 1], block_shape=[BK, BV])
    else:
        return p_c


@triton.jit
def load_state(states, i_hv, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TMA: tl.constexpr):
    """[BK, BV] of head i_hv of `states_of`."""
    if TMA:
        return states.load([i_hv * K, 0])
    else:
        o_k = tl.arange(0, BK)
        o_v = tl.arange(0, BV)
        mask = (o_k < K)[:, None] & (o_v < V)[None, :]
        return tl.load(states + tl.cast(i_hv, tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV", "SHARES"])
def chunk_outputs(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    g,  # [HV, B * T] cumulative log2 decays (RAW: [B, T, HV] log decays), or [HV] log decays, or None
    w,  # [B, T, HV] or None
    skip,  # [HV] or None
    states,  # [chunks, HV, K, V] before each chunk, or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    o,  # [B, T, HV, V]
    final,  # [chunks, HV, K, V] float32: states after each chunk, or None
    T,
    N,
    total,
    scale,
    s_q,
    s_k,
    s_v,
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
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    rows_v = heads_of(v + begin * s_v, length, s_v, HV, V, BT, BV, TMA)
    rows_o = heads_of(o + begin * HV * V, length, HV * V, HV, V, BT, BV, TMA)
    if states is not None:
        states_c = states_of(states, i_c, HV, K, V, BK, BV, TMA)
    first = (tl.program_id(1) % SHARES) * HEADS
    for j in tl.range(first, tl.minimum(first + HEADS, group), num_stages=STAGES):
        i_hv = i_h * group + j
        b_v = load_head(rows_v, length, s_v, i_hv, V, BT, BV, TMA)
        o_state = (tl.cast(i_c, tl.int64) * HV + i_hv) * K * V
        b_o = tl.zeros([BT, BV], tl.float32)
        weigh = tl.full([BT], 1.0, tl.float32)
        if states is not None:
            b_s = load_state(states_c, i_hv, K, V, BK, BV, TMA)
            b_o = tl.dot(b_q, b_s.to(b_q.dtype), input_precision=PRECISION) * scale
        if DECAY == 0:
            b_p = tl.where(inside, b_qk, 0.0)
        else:
            b_G, last = cumulative(g, i_hv, begin, length, plane, HV, BT, DECAY, RAW, FLOOR, q.dtype.element_ty == tl.float32)
            b_o *= tl.exp2(b_G.to(tl.float32))[:, None]
            b_p = b_qk * between(b_G, inside, False)
            weigh = tl.exp2((last - b_G).to(tl.float32))
        if w is not None:
            b_w = tl.load(w + (begin + o_t) * HV + i_hv, mask=m_t, other=0.0).to(tl.float32)
            b_p *= b_w[None, :]
            weigh *= b_w
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
        if final is not None:  # (7)
            b_f = tl.zeros([BK, BV], tl.float32)
            if states is not None:
                b_f = b_s.to(tl.float32)
                if DECAY != 0:
                    b_f *= tl.exp2(last.to(tl.float32))
            tl.store(final + o_state + p_s, add_weighted(b_f, b_k, b_v, weigh, False, PRECISION), mask=m_s)
        if skip is not None:
            b_o += tl.load(skip + i_hv).to(tl.float32) * b_v.to(tl.float32)
        store_head(rows_o, b_o, length, HV * V, i_hv, V, BT, BV, TMA)


def run_outputs(
    c: Call,
    o: Options,
    states: torch.Tensor | None,
    out: torch.Tensor,
    final: torch.Tensor | None = None,
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
) -> None:
    """Fill out [B, T, HV, V] from the states before each chunk (None: zero), and `final` with those after each."""
    same, shares = constants(c, o), -(-(c.HV // c.H) // HEADS)
    launch(
        chunk_outputs,
        (chunks, c.H * shares),
        (
            c.q, c.k, c.v, c.g, c.beta, c.skip, states, c.cu, offsets, out, final, c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v, SEG,
            c.H, c.HV, shares,
        ),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": padded(c)[1], "BT": BT, "HEADS": HEADS, "DECAY": same["DECAY"], "RAW": raw,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "FLOOR": same["FLOOR"], "TMA": tma, "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
