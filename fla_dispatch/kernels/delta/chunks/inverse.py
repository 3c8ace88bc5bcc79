"""The inverse of equation (6), A = (I + Diag(beta) M)^-1, of every chunk and value head, its scores X, and the sums of its gates.

Grid: (chunks * HV), heads fastest: neighbours read adjacent rows of p and k. M is a product on the matrix unit with its decay; the
inverse is float32: diagonal blocks of 16 by elimination, column after column, and larger blocks from their halves,

    (11)  [[P, 0], [L, Q]]^-1 = [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]]

so no power of M is ever formed: with beta near 2 and repeated keys those reach 1e9, and the inverse 2. beta is per value head,
so value heads share no inverse, and the decay is part of it: what reads A and scale X needs no product and no exponential for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.tiles import load_tile
from .host import Call
from .parts import LOG2E, between, chunk_span

#: Tokens of a block that is inverted by elimination: the smallest operand of a matrix product.
BLOCK = tl.constexpr(16)


@triton.jit
def products(a, b, length, s_a, s_b, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of the first BT rows of each, [BT, BT], of which `length` are there."""
    BD: tl.constexpr = min(BK, 64)
    b_x = tl.zeros([BT, BT], tl.float32)
    for i_d in tl.static_range(BK // BD):
        b_a = load_tile(a, length, s_a, 0, i_d, K, BT, BD, False)
        b_b = load_tile(b, length, s_b, 0, i_d, K, BT, BD, False)
        b_x = tl.dot(b_a, tl.trans(b_b), b_x, input_precision=PRECISION)
    return b_x


@triton.jit
def diagonal_blocks(b_x, NB: tl.constexpr, SIZE: tl.constexpr):
    """[NB, SIZE, SIZE] blocks on the diagonal of [NB * SIZE, NB * SIZE]."""
    o_b = tl.arange(0, NB)
    here = o_b[:, None, None, None] == o_b[None, None, :, None]
    return tl.sum(tl.where(here, tl.reshape(b_x, [NB, SIZE, NB, SIZE]), 0.0), 2)


@triton.jit
def eliminated(b_l, NB: tl.constexpr):
    """(I + L)^-1 of strictly lower triangular blocks [NB, BLOCK, BLOCK]."""
    o_r = tl.arange(0, BLOCK)[None, :, None]
    o_c = tl.arange(0, BLOCK)[None, None, :]
    b_a = tl.zeros([NB, BLOCK, BLOCK], tl.float32) + tl.where(o_r == o_c, 1.0, 0.0)
    for j in tl.static_range(BLOCK - 1):
        b_column = tl.sum(tl.where(o_c == j, b_l, 0.0), 2)
        b_row = tl.sum(tl.where(o_r == j, b_a, 0.0), 1)
        b_a -= b_column[:, :, None] * b_row[:, None, :]
    return b_a


@triton.jit
def merged(b_a, b_l, NB: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(11): inverses [NB, 2 SIZE, 2 SIZE] from those of their halves b_a [2 NB, SIZE, SIZE], of blocks L [NB, 2 SIZE, 2 SIZE]."""
    o_i = tl.arange(0, 2)
    o_r = o_i[None, :, None, None, None]
    o_c = o_i[None, None, None, :, None]
    below = tl.where((o_r == 1) & (o_c == 0), tl.reshape(b_l, [NB, 2, SIZE, 2, SIZE]), 0.0)
    below = tl.sum(tl.sum(below, 3), 1)
    halves = tl.reshape(b_a, [NB, 2, SIZE, SIZE])
    first = tl.sum(tl.where(o_i[None, :, None, None] == 0, halves, 0.0), 1)
    second = tl.sum(tl.where(o_i[None, :, None, None] == 1, halves, 0.0), 1)
    if NB == 1:  # without a batch, whose operands no shared layout serves
        below, first, second = tl.reshape(below, [SIZE, SIZE]), tl.reshape(first, [SIZE, SIZE]), tl.reshape(second, [SIZE, SIZE])
    corner = -tl.dot(second, tl.dot(below, first, input_precision=PRECISION), input_precision=PRECISION)
    whole = tl.where(o_r > o_c, tl.reshape(corner, [NB, 1, SIZE, 1, SIZE]), 0.0)
    whole = tl.where(o_r == o_c, tl.reshape(b_a, [NB, 2, SIZE, 1, SIZE]), whole)
    return tl.reshape(whole, [NB, 2 * SIZE, 2 * SIZE])


@triton.jit
def inverted(b_l, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of strictly lower triangular L [BT, BT]."""
    NB: tl.constexpr = BT // BLOCK
    b_a = eliminated(diagonal_blocks(b_l, NB, BLOCK), NB)
    if NB == 4:
        b_a = merged(b_a, diagonal_blocks(b_l, 2, 32), 2, 16, PRECISION)
        b_a = merged(b_a, tl.reshape(b_l, [1, 64, 64]), 1, 32, PRECISION)
    elif NB == 2:
        b_a = merged(b_a, tl.reshape(b_l, [1, 32, 32]), 1, 16, PRECISION)
    return tl.reshape(b_a, [BT, BT])


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_inverse(
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
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    EARLY: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of inputs
    MERGE: tl.constexpr,  # of float32 products of (11)
    FLOOR: tl.constexpr,
):
    i_hv = tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, tl.program_id(0) // HV, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    o_t = tl.arange(0, BT)
    m_t = o_t < length
    p_k = k + begin * s_k + i_h * K
    p_t = (begin + o_t) * HV + i_hv
    plane = tl.cast(total, tl.int64)
    p_a = (i_hv * plane + begin + o_t[:, None]) * BT + o_t[None, :]
    later, same = o_t[:, None] > o_t[None, :], o_t[:, None] == o_t[None, :]
    if g is not None:
        b_g = tl.load(g + p_t, mask=m_t, other=0.0).to(tl.float32)
        b_g = tl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E
        b_G = tl.cumsum(b_g, 0)
        tl.store(gates + i_hv * plane + begin + o_t, b_G, mask=m_t)
    if q is not None:  # done with before the inverse, beside which its registers would spill
        b_x = products(q + begin * s_q + i_h * K, p_k, length, s_q, s_k, K, BK, BT, PRECISION) * scale
        if g is not None:
            b_x *= between(b_G[:, None], b_G[None, :], later | same)
        else:
            b_x = tl.where(later | same, b_x, 0.0)
        tl.store(scores + p_a, b_x.to(scores.dtype.element_ty), mask=m_t[:, None])
    if p is not None:
        b_l = products(p + begin * s_p + i_h * K, p_k, length, s_p, s_k, K, BK, BT, PRECISION)
    else:
        b_l = products(p_k, p_k, length, s_k, s_k, K, BK, BT, PRECISION)
    b_l *= tl.load(beta + p_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    if g is not None:
        b_l *= between((b_G - b_g if EARLY else b_G)[:, None], b_G[None, :], later)
    else:
        b_l = tl.where(later, b_l, 0.0)
    b_a = inverted(b_l, BT, MERGE)
    tl.store(inverse + p_a, b_a.to(inverse.dtype.element_ty), mask=m_t[:, None])


def run_inverse(c: Call, scores: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The inverse and, if asked for, the scores scale X of each chunk, [HV, B * T, BT] in the inputs' dtype, and cumulative log2
    decays inside chunks, [HV, B * T] float32, where there are gates."""
    warps = 4 if c.q.dtype == torch.float32 else 1  # one warp shares no tile, and its chunks fill a unit; float32 products want more
    inverse = c.q.new_empty((c.HV, c.B * c.T, c.BT))
    x = torch.empty_like(inverse) if scores else None
    gates = None if c.g is None else c.q.new_empty((c.HV, c.B * c.T), dtype=torch.float32)
    args = (
        c.k, c.p, c.q if scores else None, c.g, c.beta, c.cu, c.offsets, inverse, x, gates, c.T, c.N, c.B * c.T, c.scale, c.s_k, c.s_p,
        c.s_q, c.SEG, c.H, c.HV,
    )  # fmt: skip
    launch(chunk_inverse, (c.chunks * c.HV,), args, c.constants("BT", "EARLY", "MERGE", "FLOOR"), warps, 1)
    return inverse, x, gates
