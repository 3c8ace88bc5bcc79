"""Composition of segments, equation (7) with a segment for a chunk: the state before each segment, and the final one.

Grid: (N * HV, tiles of the flattened state). Element-wise: S <- 2^decay S + local, over the segments of one sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from .segments import Segments, SegmentStates


@triton.jit(do_not_specialize=["per_row", "HV"])
def compose_segments(
    local,  # [units, HV, SIZE] states from zero
    decays,  # [units, HV] log2, or None
    start,  # [N, HV, SIZE] or None
    offsets,  # [N + 1] or None
    before,  # [units, HV, SIZE] state before each segment (after it, when reversed)
    final,  # [N, HV, SIZE] or None
    per_row,
    HV,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    i_nh = tl.program_id(0)
    i_n = i_nh // HV
    i_hv = i_nh % HV
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    if PACKED:
        first = tl.load(offsets + i_n)
        count = tl.load(offsets + i_n + 1) - first
    else:
        first = i_n * per_row
        count = per_row
    o_n = tl.cast(i_nh, tl.int64) * SIZE
    b_s = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        b_s += tl.load(start + o_n + o_x, mask=m_x, other=0.0)
    for i in tl.range(0, count, num_stages=4):
        i_u = first + ((count - 1 - i) if REVERSE else i)
        o_u = tl.cast(i_u * HV + i_hv, tl.int64)
        b_local = tl.load(local + o_u * SIZE + o_x, mask=m_x, other=0.0)
        tl.store(before + o_u * SIZE + o_x, b_s, mask=m_x)
        if decays is not None:
            b_s = b_s * tl.exp2(tl.load(decays + o_u)) + b_local
        else:
            b_s += b_local
    if final is not None:
        tl.store(final + o_n + o_x, b_s, mask=m_x)


def run_scan(
    local: torch.Tensor,
    decays: torch.Tensor | None,
    start: torch.Tensor | None,
    offsets: torch.Tensor | None,
    final: torch.Tensor | None,
    *,
    per_row: int,
    N: int,
    reverse: bool,
) -> torch.Tensor:
    """States before each segment, like `local` [units, HV, ...]; writes the final states into `final` if given."""
    before = torch.empty_like(local)
    HV = local.shape[1]
    size = local.shape[2:].numel()
    block = min(1024, triton.next_power_of_2(size))
    launch(
        compose_segments,
        (N * HV, -(-size // block)),
        (local, decays, start, offsets, before, final, per_row, HV),
        {"SIZE": size, "BLOCK": block, "PACKED": offsets is not None, "REVERSE": reverse},
        4 if block >= 512 else 1,
        4,
    )
    return before


def compose(
    s: Segments, local: SegmentStates, start: torch.Tensor | None, start_z: torch.Tensor | None,
    final: torch.Tensor | None, final_z: torch.Tensor | None, N: int, *, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """States and normalisers before each segment, from those that start at zero; the final ones go where they are wanted."""
    scan = {"per_row": s.per_row, "N": N, "reverse": reverse}
    before = run_scan(local.states, local.decays, start, s.offsets, final, **scan)
    before_z = None if local.z is None else run_scan(local.z, local.decays, start_z, s.offsets, final_z, **scan)
    return before, before_z
