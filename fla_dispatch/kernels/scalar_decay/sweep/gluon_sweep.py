"""f(a, b, c) of equation (5) on Hopper's matrix units by hand: the chunks of `chunk_body`, split among the warps of a block.

Grid: (sequences * HV * tiles of E). Forward and each gradient are one launch with permuted arguments. A chunk is a chain of
products, each of which waits for the one before; here only S <- decay S + b^T c stays a chain over chunks, in warps of its own,
and all else runs beside it in three other partitions (`gluon_parts`). The normaliser (3) has no decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..._shared.gluon_names import barrier
from ..._shared.launch import launch, tile
from .. import EPS
from .gluon_normaliser import WIDTH
from .gluon_parts import load, output, score, state
from .host import Call, tiles

#: Tokens per chunk, and columns of the state in a block.
CHUNK = 64
COLUMNS = 64


@gluon.jit
def barriers(N: gl.constexpr, arrivals: gl.constexpr):
    """One barrier for each of N buffers."""
    found = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(N):
        mbarrier.init(found.index(j), count=arrivals)
    return found


@gluon.jit
def span(cu, i_n, T, PACKED: gl.constexpr):
    """First token and length of a sequence."""
    if PACKED:
        begin = gl.load(cu + i_n).to(gl.int64)
        return begin, (gl.load(cu + i_n + 1).to(gl.int64) - begin).to(gl.int32)
    else:
        return i_n.to(gl.int64) * T, T


@gluon.jit(do_not_specialize=["T", "total", "scale", "H", "HV"])
def gluon_sweep(
    a,  # [B, T, heads, D], token stride s_a; heads are H where SHARED says so, else HV
    b,  # [B, T, heads, D], token stride s_b
    c,  # [B, T, heads, E], token stride s_c
    o,  # [B, T, HV, E]
    x,  # [B, T, heads, E] to take row sums with, token stride s_x, or None
    dot,  # [NE, B, T, HV] float32 row sums, or None
    dot_c,  # [NE, B, T, HV] float32 row sums c . x, or None
    g,  # [HV, B * T] cumulative log2 decays (DECAY 2), [HV] log decays (DECAY 1), or None
    w,  # [B, T, HV] weights of rows (W 1) or columns (W 2), or None
    u,  # [B, T, HV] float32: the virtual ones column's partner (Z 2, 3), or None
    skip,  # [HV] weight of c itself in o, or None
    s_in,  # [N, HV, D, E] by strides SR and SC, or None
    s_out,  # the same, final state, or None
    z_in,  # [N, HV, D] (Z 1) or [N, HV, E] (Z 2, 3) initial extra row, or None
    z_out,  # [N, HV, D or E] final one, or None
    r_out,  # [B, T, HV] float32: r_t of (3) (Z 1), or None
    cu,  # [N + 1] or None
    T,
    total,
    scale,
    s_a,
    s_b,
    s_c,
    s_x,
    H,
    HV,
    D: gl.constexpr,
    E: gl.constexpr,
    BD: gl.constexpr,
    BE: gl.constexpr,
    BT: gl.constexpr,
    SR: gl.constexpr,
    SC: gl.constexpr,
    SHARED: gl.constexpr,  # bits of those of a (1), b (2), c (4), x (8) that hold one head per group
    DECAY: gl.constexpr,  # 0 none, 1 constant per head, 2 per token
    REVERSE: gl.constexpr,
    W: gl.constexpr,  # 0 none, 1 rows, 2 columns
    Z: gl.constexpr,  # 0 none, 1 normaliser over D, 2 extra row with u on rows, 3 with u on columns
    EPS: gl.constexpr,
    EXACT: gl.constexpr,  # two terms per rounded operand
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,  # of a, b, c, x
    STATES: gl.constexpr,  # buffers of the rounded state
    TMA: gl.constexpr,  # always: the launcher gives scratch memory for descriptors
):
    NE: gl.constexpr = (E + BE - 1) // BE
    i_e = gl.program_id(0) % NE
    i_nh = gl.program_id(0) // NE
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    begin, length = span(cu, i_nh // HV, T, PACKED)
    NT = gl.cdiv(length, BT)
    p_token = begin * HV + i_hv
    p_sum = i_e * total.to(gl.int64) * HV + p_token
    p_state = i_nh.to(gl.int64) * D * E
    p_z = i_nh.to(gl.int64) * (D if Z == 1 else E)
    p_gate = i_hv * total.to(gl.int64) + begin if DECAY == 2 else i_hv.to(gl.int64)
    p_a = begin * s_a + (i_h if SHARED & 1 else i_hv) * D
    p_b = begin * s_b + (i_h if SHARED & 2 else i_hv) * D
    p_c = begin * s_c + (i_h if SHARED & 4 else i_hv) * E
    p_x = begin * s_x + (i_h if SHARED & 8 else i_hv) * E
    dtype: gl.constexpr = c.dtype.element_ty
    TERMS: gl.constexpr = 2 if EXACT else 1
    WEIGHED: gl.constexpr = W == 2 or DECAY != 0 or REVERSE
    LOADS: gl.constexpr = 3 if x is None else 4
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BD], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, BE], dtype)
    tile_a = gl.allocate_shared_memory(dtype, [STAGES, BT, BD], wide)
    tile_b = gl.allocate_shared_memory(dtype, [STAGES, BT, BD], wide)
    tile_c = gl.allocate_shared_memory(dtype, [STAGES, BT, BE], narrow)
    tile_x = tile_c if x is None else gl.allocate_shared_memory(dtype, [STAGES, BT, BE], narrow)
    tile_o = gl.allocate_shared_memory(o.dtype.element_ty, [BT, BE], gl.NVMMASharedLayout.get_default_for([BT, BE], o.dtype.element_ty))
    staged = (tile_a, tile_b, tile_c, tile_x)
    p_sh = gl.allocate_shared_memory(dtype, [2 * TERMS, BT, BT], narrow)
    s_sh = gl.allocate_shared_memory(dtype, [STATES * TERMS, BE, BD], wide)
    if WEIGHED:
        c_sh = gl.allocate_shared_memory(dtype, [2 * TERMS, BT, BE], narrow)
    else:
        c_sh = tile_c
    terms: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WIDTH, BT], dtype)  # of u or ones, and of z
    u_sh = p_sh if Z == 0 else gl.allocate_shared_memory(dtype, [WIDTH, BT], terms)
    z_sh = p_sh if Z != 1 else gl.allocate_shared_memory(dtype, [2, WIDTH, BD], terms)
    side = p_sh if Z == 0 else gl.allocate_shared_memory(gl.float32, [2, BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(STAGES, LOADS), barriers(STAGES, 3)  # `score`, `state` and `output` give a stage back
    p_ready, p_taken, c_ready, c_taken = barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(2, 1)
    s_ready, s_taken = barriers(STATES, 1), barriers(STATES, 1)
    fence_async_shared()
    barrier()
    WIDE: gl.constexpr = BD > 128  # the state has 128 registers a thread, else 64 at most; `output` has what the others leave
    gl.warp_specialize(
        [
            (
                output,
                (
                    staged, full, empty, p_sh, p_ready, p_taken, s_sh, s_ready, s_taken, side, tile_o, o, HV * E, g, w, u, skip, dot,
                    dot_c, p_gate, p_token, p_sum, i_hv, i_e, length, NT, scale, HV, E, REVERSE, DECAY, W, Z, EXACT, STAGES, STATES,
                ),
            ),
            (
                score,
                (
                    staged, full, empty, p_sh, p_ready, p_taken, c_sh, c_ready, c_taken, u_sh, z_sh, side, g, w, u, z_in, z_out, r_out,
                    p_gate, p_token, p_z, i_e, length, NT, scale, HV, D, E, REVERSE, DECAY, W, Z, EPS, EXACT, WEIGHED, STAGES,
                ),
            ),
            (
                state,
                (
                    staged, full, empty, c_sh, c_ready, c_taken, s_sh, s_ready, s_taken, g, s_in, s_out, p_gate, p_state, i_e, length, NT,
                    D, E, SR, SC, DECAY, EXACT, WEIGHED, REVERSE, STAGES, STATES,
                ),
            ),
            (load, (a, p_a, s_a, tile_a, full, empty, length, NT, 0, D, REVERSE, STAGES)),
            (load, (b, p_b, s_b, tile_b, full, empty, length, NT, 0, D, REVERSE, STAGES)),
            (load, (c, p_c, s_c, tile_c, full, empty, length, NT, i_e * BE, E, REVERSE, STAGES)),
            (load, (x, p_x, s_x, tile_x, full, empty, length, NT, i_e * BE, E, REVERSE, STAGES)),
        ],
        [4, 4, 1, 1, 1, 1],
        [144 if WIDE else 160, 208 if WIDE else 160, 40, 40, 40, 40],
    )  # fmt: skip


class Normaliser(NamedTuple):
    """What the normaliser adds to a sweep; tensors as the kernel takes them."""

    Z: int = 0
    u: torch.Tensor | None = None
    z_in: torch.Tensor | None = None
    z_out: torch.Tensor | None = None
    r_out: torch.Tensor | None = None


def run_sweep(
    c: Call,
    a: torch.Tensor,
    s_a: int,
    b: torch.Tensor,
    s_b: int,
    x: torch.Tensor,  # c of the equation
    s_x: int,
    out: torch.Tensor,
    *,
    shared: int,  # bits of the operands with one head per group, see the kernel
    scale: float,
    decay: int,
    reverse: bool,
    w: torch.Tensor | None,
    W: int,
    skip: torch.Tensor | None,
    s_in: torch.Tensor | None,
    s_out: torch.Tensor | None,
    transposed: bool,  # states are [E, D] in memory
    exact: bool,
    with_rows: tuple[torch.Tensor, int] | None,  # rows and their token stride, for row sums
    dot: torch.Tensor | None,
    dot_c: torch.Tensor | None,
    normaliser: Normaliser,
    stages: int,
    states: int,
) -> None:
    """One sweep: out = f(a, b, x) over all sequences, value heads and tiles of the last dim of `out`."""
    D, E = a.shape[-1], out.shape[-1]
    SR, SC = (1, D) if transposed else (E, 1)
    x_rows, s_rows = (None, 0) if with_rows is None else with_rows
    n = normaliser
    launch(
        gluon_sweep,
        (c.N * c.HV * tiles(E, COLUMNS),),
        (
            a, b, x, out, x_rows, dot, dot_c, c.g, w, n.u, skip, s_in, s_out, n.z_in, n.z_out, n.r_out, c.cu, c.T, c.B * c.T, scale,
            s_a, s_b, s_x, s_rows, c.H, c.HV,
        ),
        {
            "D": D, "E": E, "BD": max(64, tile(D)), "BE": COLUMNS, "BT": CHUNK, "SR": SR, "SC": SC, "SHARED": shared,
            "DECAY": decay, "REVERSE": reverse, "W": W if w is not None else 0, "Z": n.Z, "EPS": EPS, "EXACT": exact,
            "PACKED": c.cu is not None, "STAGES": stages, "STATES": states, "TMA": True,
        },
        4,
        stages,
    )  # fmt: skip
