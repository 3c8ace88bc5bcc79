"""The inverse of equation (6) for Hopper: what `inverse` computes, with what lies between the steps of (11) in shared memory.

Grid: (chunks * HV), heads fastest; four warps. M and X are products of whole tiles in shared memory. The float32 matrix I + Diag(beta) M
becomes its inverse in place: its four diagonal blocks of 16, a warp each, by elimination of one column after the other, with rows in
a thread's registers, so that lanes exchange nothing but the eliminated row; then blocks of 32 and of 64 by (11), whose products
take the leading bits of both operands and what these leave: three terms of tf32.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..._shared.gluon_names import barrier
from ..._shared.launch import launch
from .host import Call
from .parts import chunk_span

LOG2E = gl.constexpr(1.4426950408889634)

#: Tokens of a chunk, and of a block that is inverted by elimination.
CHUNK = 64
BLOCK = gl.constexpr(16)

#: Registers of a product of 64 rows, of a vector over its rows and of one over its columns.
TILE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, TILE.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, TILE.value))

#: Of what global memory is read and written in: 16 bytes a thread, of [64, >= 64] and of [64, 16].
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))

#: Of a vector over tokens as it is in memory.
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))

#: Of [4, 16, 16] blocks: a warp each, 8 rows a thread.
BLOCKS = gl.constexpr(gl.BlockedLayout([1, 8, 1], [1, 2, 16], [4, 1, 1], [2, 1, 0]))
ALONE = gl.constexpr(gl.BlockedLayout([1, 2, 1], [1, 8, 4], [1, 1, 4], [2, 1, 0]))
ONE_BLOCK = gl.constexpr(gl.SliceLayout(0, ALONE.value))

#: Of products of float32: [32, 32], and two of [16, 16].
LARGE = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8]))
SMALL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))


@gluon.jit
def total_of(a, b):
    return a + b


@gluon.jit
def tile_in(p, length, stride, dtype: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BT: gl.constexpr):
    """Rows [BT, BK] of which [length, K] are there, zeros elsewhere, into shared memory."""
    o_t = gl.arange(0, BT, gl.SliceLayout(1, WIDE))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, WIDE))
    mask = (o_t < length)[:, None] & (o_k < K)[None, :]
    found = gl.load(p + o_t[:, None] * stride + o_k[None, :], mask=mask, other=0.0)
    return gl.allocate_shared_memory(dtype, [BT, BK], gl.NVMMASharedLayout.get_default_for([BT, BK], dtype), found)


@gluon.jit
def product(a_sh, b_sh, LAYOUT: gl.constexpr):
    """a b to float32's precision; the matrix units ignore all but the leading bits of their operands."""
    a = a_sh.load(gl.DotOperandLayout(0, LAYOUT, 1))
    b = b_sh.load(gl.DotOperandLayout(1, LAYOUT, 1))
    less_a = a - (a.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    less_b = b - (b.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    M: gl.constexpr = a_sh.shape[0]
    N: gl.constexpr = b_sh.shape[1]
    C = gl.zeros([M, N], gl.float32, LAYOUT)
    return mma_v2(a, b, mma_v2(a, less_b, mma_v2(less_a, b, C)))


@gluon.jit
def merge(a_sh, between_sh, AT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """(11): the corner L of the block of 2 N from AT on becomes -Q^-1 L P^-1; the inverses of the block's halves are there."""
    low = a_sh.slice(AT + N, N, 0).slice(AT, N, 1)
    between_sh.store(product(low, a_sh.slice(AT, N, 0).slice(AT, N, 1), LAYOUT))
    low.store(-product(a_sh.slice(AT + N, N, 0).slice(AT + N, N, 1), between_sh, LAYOUT))


@gluon.jit
def eliminated(l_sh, NB: gl.constexpr):
    """(I + L)^-1 of strictly lower triangular blocks, by columns in shared memory [NB, BLOCK columns, BLOCK rows]."""
    o_r = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))[None, :, None]
    o_c = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, BLOCKS)))[None, None, :]
    A = gl.full([NB, BLOCK, BLOCK], 0.0, gl.float32, BLOCKS) + gl.where(o_r == o_c, 1.0, 0.0)
    l = l_sh.permute((0, 2, 1))
    for i in gl.static_range(BLOCK - 1):
        row = gl.sum(gl.where(o_r == i, A, -0.0), 1)  # -0.0 changes no number, so the compiler leaves it out
        A -= l.slice(i, 1, 2).load(BLOCKS) * gl.expand_dims(row, 1)
    return A


@gluon.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def gluon_inverse(
    k,  # [B, T, H, K], token stride s_k
    p,  # [B, T, H, K], token stride s_p, or None
    q,  # [B, T, H, K], token stride s_q, or None
    g,  # [B, T, HV] log decays or None
    beta,  # [B, T, HV]
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    inverse,  # [HV, B * T, BT]
    scores,  # [HV, B * T, BT] scale X, or None
    gates,  # [HV, B * T] float32 cumulative log2 decays of each chunk, or None
    T,
    N,
    total,
    scale,
    s_k,
    s_p,
    s_q,
    SEG,
    H,
    HV,
    K: gl.constexpr,
    BK: gl.constexpr,
    BT: gl.constexpr,
    EARLY: gl.constexpr,
    PACKED: gl.constexpr,
    FLOOR: gl.constexpr,
):
    i_hv = gl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, gl.program_id(0) // HV, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    dtype: gl.constexpr = k.dtype.element_ty
    r = gl.arange(0, BT, ROWS)
    t = gl.arange(0, BT, COLUMNS)
    p_t = begin * HV + i_hv
    b_beta = gl.load(beta + p_t + r * HV, mask=r < length, other=0.0).to(gl.float32)
    if g is not None:
        one = gl.arange(0, BT, LINE)
        b_g = gl.load(g + p_t + one * HV, mask=one < length, other=0.0).to(gl.float32)
    k_sh = tile_in(k + begin * s_k + i_h * K, length, s_k, dtype, K, BK, BT)
    left_sh = k_sh
    if p is not None:
        left_sh = tile_in(p + begin * s_p + i_h * K, length, s_p, dtype, K, BK, BT)
    if q is not None:
        q_sh = tile_in(q + begin * s_q + i_h * K, length, s_q, dtype, K, BK, BT)
    fence_async_shared()
    barrier()
    plane = total.to(gl.int64)
    p_a = (i_hv * plane + begin) * BT
    o_t = gl.arange(0, BT, gl.SliceLayout(1, WIDE))[:, None]
    o_a = o_t * BT + gl.arange(0, BT, gl.SliceLayout(0, WIDE))[None, :]
    m_a = o_a < length * BT
    later = r[:, None] > t[None, :]
    until = r[:, None] >= t[None, :]
    if g is not None:
        b_g = gl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E
        b_G = gl.associative_scan(b_g, 0, total_of)
        gl.store(gates + i_hv * plane + begin + one, b_G, mask=one < length)
        G_t = gl.convert_layout(b_G, COLUMNS)
        G = gl.convert_layout(b_G, ROWS)
        E = gl.convert_layout(b_G - b_g, ROWS) if EARLY else G
    if q is not None:
        X = warpgroup_mma(q_sh, k_sh.permute((1, 0)), gl.zeros([BT, BT], gl.float32, TILE), use_acc=False, is_async=True)
        X = warpgroup_mma_wait(0, [X])
        if g is not None:
            X = X * gl.exp2(gl.where(until, gl.minimum(G[:, None] - G_t[None, :], 0.0), float("-inf"))) * scale
        else:
            X = gl.where(until, X * scale, 0.0)
        gl.store(scores + p_a + o_a, gl.convert_layout(X.to(dtype), WIDE), mask=m_a)
    L = warpgroup_mma(left_sh, k_sh.permute((1, 0)), gl.zeros([BT, BT], gl.float32, TILE), use_acc=False, is_async=True)
    L = warpgroup_mma_wait(0, [L])
    if g is not None:
        L = L * gl.exp2(gl.where(later, gl.minimum(E[:, None] - G_t[None, :], 0.0), float("-inf"))) * b_beta[:, None]
    else:
        L = gl.where(later, L * b_beta[:, None], 0.0)

    barrier()  # no warp reads a tile any more
    a_sh = gl.allocate_shared_memory(gl.float32, [BT, BT], gl.PaddedSharedLayout.with_identity_for([[64, 4]], [64, 64], [1, 0]))
    a_sh.store(L)
    NB: gl.constexpr = BT // BLOCK
    blocks_sh = gl.allocate_shared_memory(gl.float32, [NB, BLOCK, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    for b in gl.static_range(NB):
        found = a_sh.slice(b * BLOCK, BLOCK, 0).slice(b * BLOCK, BLOCK, 1).load(ONE_BLOCK)
        blocks_sh.slice(b, 1, 0).permute((0, 2, 1)).store(gl.expand_dims(found, 0))
    blocks_sh.store(eliminated(blocks_sh, NB))
    for b in gl.static_range(NB):
        a_sh.slice(b * BLOCK, BLOCK, 0).slice(b * BLOCK, BLOCK, 1).store(gl.sum(blocks_sh.slice(b, 1, 0).load(ALONE), 0))
    small = gl.allocate_shared_memory(gl.float32, [16, 16], gl.PaddedSharedLayout.with_identity_for([[16, 4]], [16, 16], [1, 0]))
    merge(a_sh, small, 0, 16, SMALL)
    merge(a_sh, small, 32, 16, SMALL)
    large = gl.allocate_shared_memory(gl.float32, [32, 32], gl.PaddedSharedLayout.with_identity_for([[32, 8]], [32, 32], [1, 0]))
    merge(a_sh, large, 0, 32, LARGE)
    gl.store(inverse + p_a + o_a, a_sh.load(WIDE).to(dtype), mask=m_a)


def run_inverse(c: Call, scores: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `inverse.run_inverse`."""
    inverse = c.q.new_empty((c.HV, c.B * c.T, c.BT))
    x = torch.empty_like(inverse) if scores else None
    gates = None if c.g is None else c.q.new_empty((c.HV, c.B * c.T), dtype=torch.float32)
    args = (
        c.k, c.p, c.q if scores else None, c.g, c.beta, c.cu, c.offsets, inverse, x, gates, c.T, c.N, c.B * c.T, c.scale, c.s_k, c.s_p,
        c.s_q, c.SEG, c.H, c.HV,
    )  # fmt: skip
    constants = {name: c.same[name] for name in ("K", "BK", "BT", "EARLY", "PACKED", "FLOOR")}
    launch(gluon_inverse, (c.chunks * c.HV,), args, constants, 4, 1)
    return inverse, x, gates
