"""u_t = -(do_t . o_t), the normaliser's share of every gradient: one pass over do and o instead of float32 copies of both.

Grid: (tiles of B * T * HV rows). With equation (3), dL/dden_t = r_t u_t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile


@triton.jit(do_not_specialize=["rows", "HV"])
def negative_row_dot(
    do,  # [B * T, HV, V], token stride s_do
    o,  # [B * T, HV, V] contiguous
    u,  # [B * T, HV] float32
    rows,
    s_do,
    HV,
    V: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
):
    i_r = tl.cast(tl.program_id(0), tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m = (i_r < rows)[:, None] & (o_v < V)[None, :]
    p_do = do + (i_r // HV)[:, None] * s_do + (i_r % HV)[:, None] * V + o_v[None, :]
    b_do = tl.load(p_do, mask=m, other=0.0).to(tl.float32)
    b_o = tl.load(o + i_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(u + i_r, -tl.sum(b_do * b_o, 1), mask=i_r < rows)


def run_rowdot(do: torch.Tensor, s_do: int, o: torch.Tensor) -> torch.Tensor:
    """[B, T, HV] float32 from do (token rows of stride s_do) and o [B, T, HV, V]."""
    B, T, HV, V = o.shape
    u = o.new_empty((B, T, HV), dtype=torch.float32)
    BR = max(1, 4096 // tile(V))
    launch(
        negative_row_dot, (-(-B * T * HV // BR),), (do, o.contiguous(), u, B * T * HV, s_do, HV), {"V": V, "BV": tile(V), "BR": BR}, 4, 1
    )
    return u
