"""States of segments that start from zero, equation (7): b^T c with decays, nothing read but b and c.

Grid: (units * HV * tiles of V). Forward in time with b = k, c = v; reversed with b = q, c = do for gradients of states.
Also writes each segment's total decay, for the composition of segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....sequences import SEGMENTS, segment_offsets
from ..._shared.launch import launch
from ..._shared.spans import unit_span
from ..recurrence import Options, Tensors
from .chunk_body import sweep_chunks
from .host import Call, constants, padded, tiles


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def segment_states(
    b,  # [B, T, H, K], token stride s_b
    c,  # [B, T, HV, V], token stride s_c
    g,  # [HV, B * T] cumulative or [HV] constants or None
    w,  # [B, T, HV] column weights or None
    u,  # [B, T, HV] or None
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    states,  # [units, HV, K, V] float32
    z,  # [units, HV, K] float32 or None
    decays,  # [units, HV] float32, log2, or None
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
    SEGMENTED: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_uh = pid // NV
    i_hv = i_uh % HV
    i_h = i_hv // (HV // H)
    begin, length = unit_span(cu, offsets, i_uh // HV, T, N, SEG, SEGMENTED, PACKED)
    o_state = tl.cast(i_uh, tl.int64) * K
    p_token = begin * HV + i_hv
    if DECAY == 2:
        p_g = g + i_hv * tl.cast(total, tl.int64) + begin
    else:
        p_g = None if g is None else g + i_hv
    sweep_chunks(
        None, b + begin * s_b + i_h * K, c + begin * s_c + i_hv * V, None, None, None, None,
        p_g, None if w is None else w + p_token,
        None if u is None else u + p_token, None, None, states + o_state * V, None, None if z is None else z + o_state, None,
        None if decays is None else decays + i_uh, length, scale, EPS, 0, s_b, s_c, 0, 0, HV, i_v,
        D=K, E=V, BD=BK, BE=BV, BT=BT, SR=V, SC=1, DECAY=DECAY, REVERSE=REVERSE, W=0 if w is None else 2,
        Z=(4 if REVERSE else 1) if NORMALIZE else 0, OUTPUT=False, EXACT=EXACT, TMA=TMA, PRECISION=PRECISION,
        STAGES=STAGES,
    )  # fmt: skip


class Segments(NamedTuple):
    """How the sequences of a call are cut."""

    units: int  # segments in all; a bound for a pack
    per_row: int  # segments per row of a dense batch
    offsets: torch.Tensor | None  # [N + 1] cumulative segment counts of a pack


def cut(c: Call, t: Tensors, SEG: int) -> Segments:
    """The segments of SEG tokens, one of `sequences.SEGMENTS`."""
    if t.cu is None:
        per_row = -(-c.T // SEG)
        return Segments(c.B * per_row, per_row, None)
    offsets = segment_offsets(t.cu, SEG) if t.segments is None else t.segments[SEGMENTS.index(SEG)]
    return Segments(c.T // SEG + c.N, 0, offsets)


class SegmentStates:
    """Scratch of one direction: states [units, HV, K, V], z [units, HV, K] and log2 decays [units, HV]."""

    def __init__(self, c: Call, o: Options, units: int):
        new = lambda *shape: c.q.new_empty(shape, dtype=torch.float32)  # noqa: E731
        self.states = new(units, c.HV, c.K, c.V)
        self.z = new(units, c.HV, c.K) if o.normalize else None
        self.decays = None if c.g is None else new(units, c.HV)


def run_segments(
    c: Call,
    o: Options,
    b: torch.Tensor,
    s_b: int,
    x: torch.Tensor,
    s_x: int,
    w: torch.Tensor | None,
    u: torch.Tensor | None,
    *,
    reverse: bool,
    exact: bool,
    BT: int,
    BE: int,
    warps: int,
    stages: int,
    tma: bool,
    SEG: int,
    units: int,
    offsets: torch.Tensor | None,
) -> SegmentStates:
    """States of every segment from zero, in one direction of time; x is v, or do when reversed; exact: see `sweep_chunks`."""
    out = SegmentStates(c, o, units)
    launch(
        segment_states,
        (units * c.HV * tiles(c.V, BE),),
        (
            b, x, c.g, w, u, c.cu, offsets, out.states, out.z, out.decays,
            c.T, c.N, c.B * c.T, o.scale, s_b, s_x, SEG, c.H, c.HV,
        ),
        {
            **constants(c, o),
            "BK": padded(c)[0],
            "BV": BE,
            "BT": BT,
            "SEGMENTED": True,
            "REVERSE": reverse,
            "EXACT": exact,
            "TMA": tma,
            "STAGES": stages,
        },
        warps,
        stages,
    )  # fmt: skip
    return out
