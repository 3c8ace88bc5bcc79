"""States at the ends of chunks, equation (7), rounded to the inputs' dtype: S before each, or dS after each when REVERSE.

Grid: (units * HV * tiles of V). A unit is a segment of SEG tokens whose incoming state is given; chunk j of unit u is row
u * SEG / BT + j of the result. Chunks past a sequence's end are left as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options
from ..sweep.chunk_body import LOG2E, add_weighted, chunk_row, constant_decays, load_tile
from ..sweep.host import Call, constants, padded, tiles


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_states(
    b,  # [B, T, H, K], token stride s_b
    c,  # [B, T, HV, V], token stride s_c
    g,  # [HV, B * T] cumulative log2 decays, or [HV] log decays, or None
    w,  # [B, T, HV] column weights or None
    start,  # [units, HV, K, V] float32, or None for zero
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    states,  # [units * SEG / BT, HV, K, V]
    beside,  # [units * SEG / BT, HV, K, V] of the other direction of time, or None
    overlap,  # [NV, units * SEG / BT, HV] float32: inner products of a state with the one beside, or None
    end,  # [units, HV, K, V] float32: the states that units end with, or None
    T,
    N,
    total,
    scale,
    s_b,
    s_c,
    SEG,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    DECAY: tl.constexpr,  # 0 none, 1 constant per head, 2 per token
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_uh = pid // NV
    i_u = i_uh // HV
    i_hv = i_uh % HV
    begin, length = unit_span(cu, offsets, i_u, T, N, SEG, True, PACKED)
    rows_b = b + begin * s_b + i_hv // (HV // H) * K
    rows_c = c + begin * s_c + i_hv * V
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    b_s = tl.zeros([BK, BV], tl.float32)
    if start is not None:
        b_s += tl.load(start + tl.cast(i_uh, tl.int64) * K * V + p_s, mask=m_s, other=0.0)
    if DECAY == 2:
        p_g = g + i_hv * tl.cast(total, tl.int64) + begin
    if DECAY == 1:
        lg = tl.load(g + i_hv).to(tl.float32) * LOG2E
    first = tl.cast(i_u, tl.int64) * (SEG // BT)
    NT = tl.cdiv(length, BT)
    for i in tl.range(0, NT, num_stages=STAGES):
        i_t = (NT - 1 - i) if REVERSE else i
        n = length - i_t * BT
        row = (first + i_t) * HV + i_hv
        tl.store(states + row * K * V + p_s, b_s.to(states.dtype.element_ty), mask=m_s)
        if overlap is not None:
            b_x = tl.load(beside + row * K * V + p_s, mask=m_s, other=0.0).to(tl.float32)
            plane = tl.num_programs(0) // NV * tl.cast(SEG // BT, tl.int64)
            tl.store(overlap + i_v * plane + row, tl.sum(tl.sum(b_s * b_x, 1), 0))
        b_b = load_tile(rows_b, length, s_b, i_t, 0, K, BT, BK, False)
        b_c = load_tile(rows_c, length, s_c, i_t, i_v, V, BT, BV, False)
        weigh = tl.full([BT], scale if REVERSE else 1.0, tl.float32)
        if DECAY == 2:
            b_G = chunk_row(p_g, 1, i_t, length, BT)
            last = tl.load(p_g + tl.minimum(i_t * BT + BT, length) - 1)
            weigh *= tl.exp2(b_G) if REVERSE else tl.exp2(tl.where(o_t < n, last - b_G, float("-inf")))
            b_s *= tl.exp2(last)
        if DECAY == 1:
            last, to_row, to_end = constant_decays(lg, (o_t + 1).to(tl.float32), n, o_t < n, BT, False)
            weigh *= to_row if REVERSE else to_end
            b_s *= tl.exp2(last)
        if w is not None:
            weigh *= chunk_row(w + begin * HV + i_hv, HV, i_t, length, BT)
        b_s = add_weighted(b_s, b_b, b_c, weigh, False, PRECISION)
    if end is not None:
        tl.store(end + tl.cast(i_uh, tl.int64) * K * V + p_s, b_s, mask=m_s)


def run_store(
    c: Call,
    o: Options,
    b: torch.Tensor,
    s_b: int,
    x: torch.Tensor,
    s_x: int,
    w: torch.Tensor | None,
    start: torch.Tensor | None,
    beside: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    reverse: bool,
    SEG: int,
    BT: int,
    units: int,
    offsets: torch.Tensor | None,
    warps: int,
    stages: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[units * SEG / BT, HV, K, V]: states before each chunk with b = k and x = v; with reverse, b = q and x = do, gradients after each.

    start: the states that units begin with, else zero; end: where to put those that they end with.
    And, where states are given to compare with, the inner products with them, [tiles of V, units * SEG / BT, HV] float32.
    """
    BV = min(64, padded(c)[1])
    states = c.q.new_empty((units * (SEG // BT), c.HV, c.K, c.V))
    overlap = None if beside is None else c.q.new_empty((tiles(c.V, BV), *states.shape[:2]), dtype=torch.float32)
    same = constants(c, o)
    launch(
        chunk_states,
        (units * c.HV * tiles(c.V, BV),),
        (b, x, c.g, w, start, c.cu, offsets, states, beside, overlap, end, c.T, c.N, c.B * c.T, o.scale, s_b, s_x, SEG, c.H, c.HV),
        {
            "K": c.K, "V": c.V, "BK": padded(c)[0], "BV": BV, "BT": BT, "DECAY": same["DECAY"], "REVERSE": reverse,
            "PACKED": same["PACKED"], "PRECISION": same["PRECISION"], "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return states, overlap
