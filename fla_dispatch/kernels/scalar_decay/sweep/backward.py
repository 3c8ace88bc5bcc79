"""The gradients dq = f(do, v, k), dk = f'(v, do, q), dv = f'(k, q, do) of (5), with skip (8), three slices of one launch.

Grid: (units * HV * tiles, 3): slice 0 is dq, 1 is dk, 2 is dv; tiles are of K for dq and dk, of V for dv. With grouped
values dq and dk are float32 partial sums per value head, summed over the group by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options
from .chunk_body import sweep_chunks
from .host import Call, constants, exact, padded, tiles
from .token_body import sweep_tokens


@triton.jit
def sweep(
    a,  # [T, D]
    b,  # [T, D]
    c,  # [T, E]
    o,  # [T, E]
    x,  # [T, E] or None
    dot,  # [T] or None
    dot_c,  # [T] or None
    g,  # [T] or [1] or None
    w,  # [T] or None
    u,  # [T] or None
    skip,  # a number or None
    s_in,  # [D, E] or None
    s_out,  # [D, E] or None
    z_in,  # [E] or None
    z_out,  # [E] or None
    length,
    scale,
    s_a,
    s_b,
    s_c,
    s_o,
    s_x,
    HV,
    i_e,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    SR: tl.constexpr,
    SC: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    Z: tl.constexpr,
    EXACT: tl.constexpr,
    TOKENS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """One sweep with the body that TOKENS names."""
    if TOKENS:
        sweep_tokens(
            a, b, c, o, x, dot, dot_c, g, w, u, skip, s_in, s_out, z_in, z_out, None, length, scale, 0.0, s_a, s_b, s_c, s_o, s_x, HV,
            i_e, D=D, E=E, BD=BD, BE=BE, SR=SR, SC=SC, DECAY=DECAY, REVERSE=REVERSE, W=W, Z=Z, FLOOR=FLOOR,
        )  # fmt: skip
    else:
        sweep_chunks(
            a, b, c, o, x, dot, dot_c, g, w, u, skip, s_in, s_out, z_in, z_out, None, None, length, scale, 0.0, s_a, s_b, s_c, s_o, s_x,
            HV, i_e, D=D, E=E, BD=BD, BE=BE, BT=BT, SR=SR, SC=SC, DECAY=DECAY, REVERSE=REVERSE, W=W, Z=Z, OUTPUT=True,
            EXACT=EXACT, TMA=TMA, PRECISION=PRECISION, STAGES=STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def sweep_backward(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    g,  # [HV, B * T] cumulative (TOKENS: [B, T, HV]) or [HV] constants or None
    w,  # [B, T, HV]: beta, or r with NORMALIZE, or None
    u,  # [B, T, HV]: -(do . o) with NORMALIZE, or None
    skip,  # [HV] or None
    h0,  # [units, HV, K, V] state before each unit, or None
    z0,  # [units, HV, K] or None
    dS,  # [units, HV, K, V] gradient of the state after each unit, or None
    dz,  # [units, HV, K] or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [B, T, HV, K]
    dk,  # [B, T, HV, K]
    dv,  # [B, T, HV, V]
    dh0,  # [N, HV, K, V] or None
    dz0,  # [N, HV, K] or None
    dot_q,  # [NK, B, T, HV] row sums q . dq, or None
    dot_v,  # [NV, B, T, HV] row sums v . dv before weight and skip, or None
    dot_skip,  # [NV, B, T, HV] row sums v . do, or None
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
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT: tl.constexpr,  # two terms per rounded operand in dq and dv, whose row sums make gate gradients
    SLICE: tl.constexpr,  # 0, 1, 2: this slice alone; -1: the second grid axis
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    which = tl.program_id(1) if SLICE < 0 else SLICE
    NK: tl.constexpr = (K + BE - 1) // BE
    NV: tl.constexpr = (V + BE - 1) // BE
    NE: tl.constexpr = NK if NK > NV else NV
    i_e = pid % NE
    i_nh = pid // NE
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, offsets, i_nh // HV, T, N, SEG, SEGMENTED, PACKED)
    o_state = tl.cast(i_nh, tl.int64) * K
    p_token = begin * HV + i_hv
    p_q = q + begin * s_q + i_h * K
    p_k = k + begin * s_k + i_h * K
    p_v = v + begin * s_v + i_hv * V
    p_do = do + begin * s_do + i_hv * V
    if DECAY == 2:
        p_g = g + p_token if TOKENS else g + i_hv * tl.cast(total, tl.int64) + begin
    else:
        p_g = None if g is None else g + i_hv
    p_w = None if w is None else w + p_token
    p_u = None if u is None else u + p_token
    b_skip = None if skip is None else tl.load(skip + i_hv).to(tl.float32)
    p_dS = None if dS is None else dS + o_state * V
    o_dot = p_token + tl.cast(i_e, tl.int64) * total * HV
    BETA: tl.constexpr = w is not None and not NORMALIZE
    if which == 0:
        if i_e < NK:
            sweep(
                p_do, p_v, p_k, dq + p_token * K, None if dot_q is None else p_q, None if dot_q is None else dot_q + o_dot,
                None, p_g, p_w, p_u, None, None if h0 is None else h0 + o_state * V, None, None if z0 is None else z0 + o_state, None,
                length, scale, s_do, s_v, s_k, HV * K, s_q, HV, i_e,
                D=V, E=K, BD=BV, BE=BE, BT=BT, SR=1, SC=V, DECAY=DECAY, REVERSE=False, W=1 if NORMALIZE else (2 if BETA else 0),
                Z=2 if NORMALIZE else 0, EXACT=EXACT,
                TOKENS=TOKENS, TMA=TMA, PRECISION=PRECISION, STAGES=STAGES, FLOOR=FLOOR,
            )  # fmt: skip
    elif which == 1:
        if i_e < NK:
            sweep(
                p_v, p_do, p_q, dk + p_token * K, None, None, None, p_g, p_w, p_u, None, p_dS, None,
                None if dz is None else dz + o_state, None if dz0 is None else dz0 + o_state,
                length, scale, s_v, s_do, s_q, HV * K, 0, HV, i_e,
                D=V, E=K, BD=BV, BE=BE, BT=BT, SR=1, SC=V, DECAY=DECAY, REVERSE=True, W=2 if NORMALIZE else (1 if BETA else 0),
                Z=3 if NORMALIZE else 0, EXACT=False,
                TOKENS=TOKENS, TMA=TMA, PRECISION=PRECISION, STAGES=STAGES, FLOOR=FLOOR,
            )  # fmt: skip
    else:
        if i_e < NV:
            sweep(
                p_k, p_q, p_do, dv + p_token * V, None if dot_v is None else p_v, None if dot_v is None else dot_v + o_dot,
                None if dot_skip is None else dot_skip + o_dot, p_g, p_w, None, b_skip,
                p_dS, None if dh0 is None else dh0 + o_state * V, None, None,
                length, scale, s_k, s_q, s_do, HV * V, s_v, HV, i_e,
                D=K, E=V, BD=BK, BE=BE, BT=BT, SR=V, SC=1, DECAY=DECAY, REVERSE=True, W=2 if NORMALIZE else (1 if BETA else 0),
                Z=0, EXACT=EXACT,
                TOKENS=TOKENS, TMA=TMA, PRECISION=PRECISION, STAGES=STAGES, FLOOR=FLOOR,
            )  # fmt: skip


class Buffers:
    """What one backward launch writes: dq and dk per value head, dv, state gradients and row sums."""

    def __init__(self, c: Call, o: Options, BE: int, *, states: bool, gates: bool):
        exact = c.HV == c.H
        self.dq = c.q.new_empty((c.B, c.T, c.HV, c.K), dtype=c.q.dtype if exact else torch.float32)
        self.dk = torch.empty_like(self.dq)
        self.dv = c.v.new_empty((c.B, c.T, c.HV, c.V))
        f32 = torch.float32
        self.dh0 = c.q.new_empty((c.N, c.HV, c.K, c.V), dtype=f32) if states else None
        self.dz0 = c.q.new_empty((c.N, c.HV, c.K), dtype=f32) if states and o.normalize else None
        self.dot_q = c.q.new_empty((tiles(c.K, BE), c.B, c.T, c.HV), dtype=f32) if gates else None
        self.dot_v = c.q.new_empty((tiles(c.V, BE), c.B, c.T, c.HV), dtype=f32) if gates else None
        self.dot_skip = None if c.skip is None else torch.empty_like(self.dot_v)


def run_backward(
    c: Call,
    o: Options,
    do: torch.Tensor,
    s_do: int,
    w: torch.Tensor | None,
    u: torch.Tensor | None,
    dS: torch.Tensor | None,
    dz: torch.Tensor | None,
    out: Buffers,
    *,
    BT: int,
    BE: int,
    warps: int,
    stages: int,
    split: bool = False,  # one launch per slice
    tma: bool = False,
    SEG: int = 0,
    units: int | None = None,
    offsets: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
) -> None:
    """Fill `out`. With SEG, h0, z0, dS and dz hold the states at each segment's ends, and no dh0 is written."""
    BK, BV = padded(c)
    whole = SEG == 0
    blocks = (c.N if units is None else units) * c.HV * max(tiles(c.K, BE), tiles(c.V, BE))
    args = (
        c.q, c.k, c.v, do, c.g, w, u, c.skip, c.h0 if whole else h0, c.z0 if whole else z0, dS, dz, c.cu, offsets,
        out.dq, out.dk, out.dv, out.dh0 if whole else None, out.dz0 if whole else None, out.dot_q, out.dot_v, out.dot_skip,
        c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v, s_do, SEG, c.H, c.HV,
    )  # fmt: skip
    same = {
        **constants(c, o),
        "BK": BK,
        "BV": BV,
        "BE": BE,
        "BT": BT,
        "SEGMENTED": SEG > 0,
        "TOKENS": BT == 0,
        "EXACT": exact(c, o),
        "TMA": tma,
        "STAGES": stages,
    }
    if split:
        for i in range(3):
            launch(sweep_backward, (blocks, 1), args, {**same, "SLICE": i}, warps, stages)
    else:
        launch(sweep_backward, (blocks, 3), args, {**same, "SLICE": -1}, warps, stages)
