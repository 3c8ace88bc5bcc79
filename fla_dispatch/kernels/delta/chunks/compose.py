"""States between segments, (6) and (7) of a whole segment as an affine map: S <- M S + L, and back in time R <- M^T R + L.

Grid: (N * HV * tiles of V). M is the state that a segment makes of the identity without values, L that which it makes of zero; back
in time L is the gradient that a segment's own outputs make. Exact: M is no cut of the gates, it is the segment's own transition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile
from .host import Call

#: Columns of the state of a block, as few as a product takes, for the steps of one block wait for each other; stages of M and L.
BV, STAGES = 16, 2


@triton.jit(do_not_specialize=["per_row", "HV"])
def compose_segments(
    transitions,  # [units, HV, K, K] float32
    local,  # [units, HV, K, V] float32
    start,  # [N, HV, K, V] or None
    offsets,  # [N + 1] or None
    ends,  # [units, HV, K, V] the state before each segment (after it, when reversed)
    final,  # [N, HV, K, V] or None
    per_row,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = pid % NV
    i_nh = pid // NV
    i_n = i_nh // HV
    i_hv = i_nh % HV
    if PACKED:
        first = tl.load(offsets + i_n)
        count = tl.load(offsets + i_n + 1) - first
    else:
        first = i_n * per_row
        count = per_row
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_m = (o_k < K)[:, None] & (o_k < K)[None, :]
    p_m = o_k[:, None] + o_k[None, :] * K if REVERSE else o_k[:, None] * K + o_k[None, :]
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_s = o_k[:, None] * V + o_v[None, :]
    o_n = tl.cast(i_nh, tl.int64) * K * V
    b_s = tl.zeros([BK, BV], tl.float32)
    if start is not None:
        b_s += tl.load(start + o_n + p_s, mask=m_s, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        i_u = first + ((count - 1 - i) if REVERSE else i)
        o_u = (tl.cast(i_u, tl.int64) * HV + i_hv) * K
        tl.store(ends + o_u * V + p_s, b_s, mask=m_s)
        b_m = tl.load(transitions + o_u * K + p_m, mask=m_m, other=0.0)
        b_l = tl.load(local + o_u * V + p_s, mask=m_s, other=0.0)
        b_s = tl.dot(b_m, b_s, b_l, input_precision=MERGE)
    if final is not None:
        tl.store(final + o_n + p_s, b_s, mask=m_s)


def run_compose(
    c: Call, transitions: torch.Tensor, local: torch.Tensor, start: torch.Tensor | None, final: torch.Tensor | None, *, reverse: bool
) -> torch.Tensor:
    """States before each segment [units, HV, K, V] (reverse: gradients of those after each); final is filled where given."""
    ends = torch.empty_like(local)
    narrow = min(BV, tile(c.V))
    constants = c.constants("V", "MERGE") | {"BV": narrow, "REVERSE": reverse, "STAGES": STAGES}
    del constants["PRECISION"]
    args = (transitions, local, start, c.offsets, ends, final, -(-c.T // c.SEG), c.HV)
    launch(compose_segments, (c.N * c.HV * -(-c.V // narrow),), args, constants, 8 if c.K > 64 else 4, STAGES)
    return ends
