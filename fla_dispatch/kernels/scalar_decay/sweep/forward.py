"""The output o = f(q, k, v) of equations (1) to (4), one launch.

Grid: (units * HV * tiles of V); the tile of V is the fastest index, so that siblings share q and k in L2. A unit is a
sequence, or a segment of one whose incoming state is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options, Outputs
from .chunk_body import sweep_chunks
from .host import Call, constants, padded, tiles
from .token_body import sweep_tokens


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def sweep_forward(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    v,  # [B, T, HV, V], token stride s_v
    g,  # [HV, B * T] cumulative (TOKENS: [B, T, HV]) or [HV] constants or None
    beta,  # [B, T, HV] or None
    skip,  # [HV] or None
    h0,  # [units, HV, K, V] or None
    z0,  # [units, HV, K] or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    o,  # [B, T, HV, V]
    state,  # [N, HV, K, V] or None
    z,  # [N, HV, K] or None
    weight,  # [B, T, HV] or None
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
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_nh = pid // NV
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, offsets, i_nh // HV, T, N, SEG, SEGMENTED, PACKED)
    o_state = tl.cast(i_nh, tl.int64) * K
    p_token = begin * HV + i_hv
    if DECAY == 2:
        p_g = g + p_token if TOKENS else g + i_hv * tl.cast(total, tl.int64) + begin
    else:
        p_g = None if g is None else g + i_hv
    p_w = None if beta is None else beta + p_token
    p_h0 = None if h0 is None else h0 + o_state * V
    p_state = None if state is None else state + o_state * V
    p_z0 = None if z0 is None else z0 + o_state
    p_z = None if z is None else z + o_state
    p_r = None if weight is None else weight + p_token
    b_skip = None if skip is None else tl.load(skip + i_hv).to(tl.float32)
    if TOKENS:
        sweep_tokens(
            q + begin * s_q + i_h * K, k + begin * s_k + i_h * K, v + begin * s_v + i_hv * V, o + p_token * V, None, None,
            None, p_g, p_w, None, b_skip, p_h0, p_state, p_z0, p_z, p_r, length, scale, EPS, s_q, s_k, s_v, HV * V, 0, HV, i_v,
            D=K, E=V, BD=BK, BE=BV, SR=V, SC=1, DECAY=DECAY, REVERSE=False, W=0 if beta is None else 2,
            Z=1 if NORMALIZE else 0, FLOOR=FLOOR,
        )  # fmt: skip
    else:
        sweep_chunks(
            q + begin * s_q + i_h * K, k + begin * s_k + i_h * K, v + begin * s_v + i_hv * V, o + p_token * V, None, None,
            None, p_g, p_w, None, b_skip, p_h0, p_state, p_z0, p_z, p_r, None, length, scale, EPS, s_q, s_k, s_v, HV * V, 0, HV, i_v,
            D=K, E=V, BD=BK, BE=BV, BT=BT, SR=V, SC=1, DECAY=DECAY, REVERSE=False, W=0 if beta is None else 2,
            Z=1 if NORMALIZE else 0, OUTPUT=True, EXACT=False, TMA=TMA, PRECISION=PRECISION,
            STAGES=STAGES,
        )  # fmt: skip


def run_forward(
    c: Call,
    o: Options,
    out: Outputs,
    *,
    BT: int,  # tokens per chunk; 0: token by token
    BE: int,
    warps: int,
    stages: int,
    tma: bool = False,
    SEG: int = 0,
    units: int | None = None,
    offsets: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
) -> None:
    """Fill `out`. With SEG, h0 and z0 hold the state before each of `units` segments, and no final state is written."""
    BK, BV = padded(c)[0], BE
    whole = SEG == 0
    final = whole and o.final_state
    launch(
        sweep_forward,
        ((c.N if units is None else units) * c.HV * tiles(c.V, BV),),
        (
            c.q, c.k, c.v, c.g, c.beta, c.skip, c.h0 if whole else h0, c.z0 if whole else z0, c.cu, offsets, out.o,
            out.state if final else None, out.z if final and o.normalize else None, out.weight if o.normalize else None,
            c.T, c.N, c.B * c.T, o.scale, c.s_q, c.s_k, c.s_v, SEG, c.H, c.HV,
        ),
        {**constants(c, o), "BK": BK, "BV": BV, "BT": BT, "SEGMENTED": SEG > 0, "TOKENS": BT == 0, "TMA": tma, "STAGES": stages},
        warps,
        stages,
    )  # fmt: skip
