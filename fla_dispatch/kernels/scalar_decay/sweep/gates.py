"""Cumulative log decays inside chunks, G_t - G_begin of equation (4) in base 2, once per call instead of once per block.

Grid: (N, tiles of HV, splits); program z of a sequence takes every splits-th chunk from z on. The result is laid out by head,
so that a sweep reads a chunk's gates as one contiguous vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from .. import MIN_LOG_DECAY
from .chunk_body import LOG2E


@triton.jit(do_not_specialize=["T", "N", "total", "HV"])
def accumulate_gates(
    g,  # [B, T, HV] log decays
    out,  # [HV, B * T] float32
    cu,  # [N + 1] or None
    T,
    N,
    total,
    HV,
    BT: tl.constexpr,
    BH: tl.constexpr,
    FLOOR: tl.constexpr,
    PACKED: tl.constexpr,
):
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < HV
    begin, length = unit_span(cu, None, tl.program_id(0), T, N, 0, False, PACKED)
    o_t = tl.arange(0, BT)
    plane = tl.cast(total, tl.int64)
    for i_t in range(tl.program_id(2), tl.cdiv(length, BT), tl.num_programs(2)):
        t = i_t * BT + o_t
        m = (t < length)[:, None] & m_h[None, :]
        b_g = tl.load(g + (begin + t)[:, None] * HV + o_h[None, :], mask=m, other=0.0).to(tl.float32)
        b_g = tl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E
        tl.store(out + o_h[None, :] * plane + (begin + t)[:, None], tl.cumsum(b_g, 0), mask=m)


def run_gates(g: torch.Tensor, cu: torch.Tensor | None, N: int, BT: int) -> torch.Tensor:
    """[HV, B * T] float32 from log decays g [B, T, HV], chunks of BT tokens."""
    B, T, HV = g.shape
    out = g.new_empty((HV, B * T), dtype=torch.float32)
    BH = 8 if HV >= 8 else 1
    split = max(1, min(64, -(-T // BT)))
    constants = {"BT": BT, "BH": BH, "FLOOR": MIN_LOG_DECAY, "PACKED": cu is not None}
    launch(accumulate_gates, (N, -(-HV // BH), split), (g, out, cu, T, N, B * T, HV), constants, 4, 1)
    return out
