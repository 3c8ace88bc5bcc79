"""Gradients of q, k and the gate per channel of a chunk, from what (18) left: decays inside of the chunk, level by level.

Grid: (chunks * HV * tiles of K). Each channel is by itself. With the decays L of a level of (16), [.]_l the pairs of that level, dX and
dM as (18) has them and (.)' transposed,

    (19)  dq = exp(G) (scale do S^T) + diag(dX) k + sum_l L [dX]_l (L k)
          dk = exp(G) (-beta dy S^T) + exp(G_end - G) (w D^T) + diag(dX) q + sum_l L ([dM]_l (L k) + [dM]_l' (L k) + [dX]_l' (L q))
    (20)  dg_u = exp(G_end) rowsum(S D) + sum of the terms of q dq + k dk that g_u decays

A term of (20) of a level is that of a token after the middle, decayed by the gates from there to itself, or of one before it, decayed
by those after itself. Each is added where it belongs, so none is subtracted again, however strong the gates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from .gradients import Found
from .host import Call
from .levels import BLOCK, of_level
from .parts import LOG2E, chunk_span
from .states import Shares


@triton.jit
def halves_of(b_g, like):
    """Log2 decays as two terms in the dtype of `like`: of half precision, 16 bits of each or more."""
    b_high = b_g.to(like.dtype)
    return b_high, (b_g - b_high.to(tl.float32)).to(like.dtype)


@triton.jit
def summed(b_high, b_low, chosen, PRECISION: tl.constexpr):
    """Sums over s of gates [NB, BD, S] where chosen [NB, S, T]: [NB, BD, T], on the matrix unit."""
    b_one = tl.where(chosen, 1.0, 0.0).to(b_high.dtype)
    b_x = tl.dot(b_high, b_one, input_precision=PRECISION)
    return b_x if b_high.dtype == tl.float32 else tl.dot(b_low, b_one, b_x, input_precision=PRECISION)


@triton.jit
def spread(b_y, chosen, like, PRECISION: tl.constexpr, MERGE: tl.constexpr):
    """Sums over t of terms [NB, BD, BLOCK] where chosen [NB, BLOCK, BLOCK]; in float16 they could overflow."""
    if like.dtype == tl.bfloat16:
        b_one = tl.where(chosen, 1.0, 0.0).to(tl.bfloat16)
        return tl.dot(b_y.to(tl.bfloat16), b_one, input_precision=PRECISION)
    else:
        return tl.dot(b_y, tl.where(chosen, 1.0, 0.0), input_precision=MERGE)


@triton.jit
def sum_blocks(b_x, NB: tl.constexpr, BEFORE: tl.constexpr, WITHIN: tl.constexpr):
    """For each block the sum over those before it (else after it) in its group of WITHIN blocks: [NB, BD] from [NB, BD]."""
    o_j, o_i = tl.arange(0, NB)[:, None, None], tl.arange(0, NB)[None, :, None]
    chosen = (o_i > o_j) if BEFORE else (o_i < o_j)
    return tl.sum(tl.where(chosen & (o_i // WITHIN == o_j // WITHIN), b_x[:, None, :], 0.0), 0)


@triton.jit
def columns_of(x, o_t, o_c, stride, length, K: tl.constexpr):
    """Tile [NB, BD, S] of rows x [length, K] at tokens o_t [NB, 1, S] and channels o_c [1, BD, 1]; zero outside of them."""
    return tl.load(x + o_t * stride + o_c, mask=(o_t < length) & (o_c < K), other=0.0)


@triton.jit
def gates_of(g, o_t, o_c, stride, length, K: tl.constexpr, FLOOR: tl.constexpr):
    """Log2 decays of a tile."""
    b_g = columns_of(g, o_t, o_c, stride, length, K).to(tl.float32)
    return tl.where(b_g < FLOOR, FLOOR, b_g) * LOG2E


@triton.jit
def pairs_of(x, o_s, o_t, length, BT: tl.constexpr):
    """Elements (t, s) and (s, t) of rows x [length, BT] at [s, t]; zero where there is no such row."""
    b_x = tl.load(x + o_t * BT + o_s, mask=(o_t < length) & (o_s < BT), other=0.0)
    return b_x, tl.load(x + o_s * BT + o_t, mask=(o_s < length) & (o_t < BT), other=0.0)


@triton.jit
def on_path(o_s, o_t, SIZE: tl.constexpr):
    """Whether the gate of s is between t and the middle of its 2 SIZE tokens."""
    middle = o_t // (2 * SIZE) * (2 * SIZE) + SIZE - 1
    return ((o_s > middle) & (o_s <= o_t)) | ((o_s > o_t) & (o_s <= middle))


@triton.jit
def terms(b_q, b_k, b_L, b_X, turned_X, b_M, turned_M, later, earlier, PRECISION: tl.constexpr):
    """The sums of a level in (19) for q and for k, before L; matrices at [s, t], where s is before t: `later`, after it: `earlier`."""
    b_keys, b_queries = b_k * b_L.to(b_k.dtype), b_q * b_L.to(b_k.dtype)
    b_y = tl.dot(b_keys, tl.where(later, b_X, 0.0), input_precision=PRECISION)
    b_z = tl.dot(b_keys, tl.where(later, b_M, tl.where(earlier, turned_M, 0.0)), input_precision=PRECISION)
    return b_y, tl.dot(b_queries, tl.where(earlier, turned_X, 0.0), b_z, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "total", "SEG", "H", "HV"])
def chunk_channels(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    g,  # [B, T, HV, K] log decays
    of_q,  # [B, T, HV, K] scale do S^T
    of_p,  # [B, T, HV, K] -beta dy S^T
    of_k,  # [B, T, HV, K] w D^T
    dX,  # [HV, B * T, BT] scale do w^T
    dM,  # [HV, B * T, BT] -beta dy w^T
    overlap,  # [chunks, HV, K] exp(G_end) rowsum(S D)
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [B, T, HV, K]
    dk,  # [B, T, HV, K]
    dg,  # [B, T, HV, K]
    T,
    N,
    total,
    s_q,
    s_k,
    SEG,
    H,
    HV,
    K: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE: tl.constexpr,
    FLOOR: tl.constexpr,
):
    ND: tl.constexpr = BK // BD
    NB: tl.constexpr = BT // BLOCK
    i_d = tl.program_id(0) % ND
    i_hv = tl.program_id(0) // ND % HV
    i_c = tl.program_id(0) // ND // HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    row, stride = begin * HV + i_hv, HV * K
    q += begin * s_q + i_h * K
    k += begin * s_k + i_h * K
    g += row * K
    o_b = tl.arange(0, NB)[:, None, None]
    o_c = i_d * BD + tl.arange(0, BD)[None, :, None]
    o_s, o_t = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    own = o_b * BLOCK + o_t
    at, inside = own * stride + o_c, (own < length) & (o_c < K)
    b_q, b_k = columns_of(q, own, o_c, s_q, length, K), columns_of(k, own, o_c, s_k, length, K)
    b_g = gates_of(g, own, o_c, stride, length, K, FLOOR)
    b_high, b_low = halves_of(b_g, b_k)
    b_total = tl.sum(b_g, 2)
    until, after = summed(b_high, b_low, (o_s <= o_t) & (o_b >= 0), PRECISION), summed(b_high, b_low, (o_s > o_t) & (o_b >= 0), PRECISION)
    # what states take part in: decayed from the chunk's beginning, or to its end
    b_L = tl.exp2(until + sum_blocks(b_total, NB, True, NB)[:, :, None])
    b_dq = b_L * tl.load(of_q + row * K + at, mask=inside, other=0.0)
    b_dk = b_L * tl.load(of_p + row * K + at, mask=inside, other=0.0)
    b_y = b_q * b_dq + b_k * b_dk
    b_dg = spread(b_y, (o_s >= o_t) & (o_b >= 0), b_k, PRECISION, MERGE)
    b_other = sum_blocks(tl.sum(b_y, 2), NB, False, NB)
    b_L = tl.exp2(after + sum_blocks(b_total, NB, False, NB)[:, :, None])
    b_y = b_L * tl.load(of_k + row * K + at, mask=inside, other=0.0)
    b_dk += b_y
    b_y *= b_k
    b_dg += spread(b_y, (o_s < o_t) & (o_b >= 0), b_k, PRECISION, MERGE)
    b_other += sum_blocks(tl.sum(b_y, 2), NB, True, NB)
    o_d = i_d * BD + tl.arange(0, BD)
    p_o = overlap + (tl.cast(i_c, tl.int64) * HV + i_hv) * K + o_d
    b_other += tl.load(p_o, mask=o_d < K, other=0.0)[None, :]
    plane = i_hv * tl.cast(total, tl.int64) + begin
    dX += plane * BT
    dM += plane * BT
    for i in tl.static_range(4, 6):  # levels of whole blocks: each with the tokens of the other half
        if (1 << i) < BT:
            second = o_b // ((1 << i) // BLOCK) % 2 == 1
            first_s = (o_b // ((1 << i) // BLOCK) ^ 1) * (1 << i)
            theirs = first_s + tl.arange(0, 1 << i)[None, None, :]
            o_i, o_j = tl.arange(0, 1 << i)[None, :, None], tl.arange(0, 1 << i)[None, None, :]
            high, low = halves_of(gates_of(g, theirs, o_c, stride, length, K, FLOOR), b_k)
            b_L = tl.exp2(summed(high, low, tl.where(second, o_i - o_j - 1, o_j - o_i) >= 0, PRECISION))
            b_X, turned_X = pairs_of(dX, first_s + o_i, own, length, BT)
            b_M, turned_M = pairs_of(dM, first_s + o_i, own, length, BT)
            other_q, other_k = columns_of(q, theirs, o_c, s_q, length, K), columns_of(k, theirs, o_c, s_k, length, K)
            b_y, b_z = terms(other_q, other_k, b_L, b_X, turned_X, b_M, turned_M, second, o_b // ((1 << i) // BLOCK) % 2 == 0, PRECISION)
            b_L = tl.where(second, until, after)
            if (1 << i) > BLOCK:
                between = sum_blocks(b_total, NB, True, (1 << i) // BLOCK)[:, :, None]
                b_L += tl.where(second, between, sum_blocks(b_total, NB, False, (1 << i) // BLOCK)[:, :, None])
            b_L = tl.exp2(b_L)
            b_y *= tl.where(second, b_L, 0.0)
            b_z *= b_L
            b_dq += b_y
            b_dk += b_z
            b_y = b_q * b_y + b_k * b_z
            b_dg += spread(b_y, tl.where(second, o_s - o_t, o_t - o_s - 1) >= 0, b_k, PRECISION, MERGE)
            if (1 << i) > BLOCK:
                b_sum = tl.sum(b_y, 2)
                later, earlier = sum_blocks(b_sum, NB, False, (1 << i) // BLOCK), sum_blocks(b_sum, NB, True, (1 << i) // BLOCK)
                b_other += tl.where(tl.arange(0, NB)[:, None] // ((1 << i) // BLOCK) % 2 == 1, later, earlier)
    b_dg += b_other[:, :, None]
    b_X, turned_X = pairs_of(dX, o_b * BLOCK + o_s, own, length, BT)
    b_M, turned_M = pairs_of(dM, o_b * BLOCK + o_s, own, length, BT)
    for i in tl.static_range(4):
        path = on_path(o_s, o_t, 1 << i) & (o_b >= 0)
        b_L = tl.exp2(summed(b_high, b_low, path, PRECISION))
        b_y, b_z = terms(b_q, b_k, b_L, b_X, turned_X, b_M, turned_M, of_level(o_t, o_s, 1 << i), of_level(o_s, o_t, 1 << i), PRECISION)
        b_y *= b_L
        b_z *= b_L
        b_dq += b_y
        b_dk += b_z
        path = on_path(o_t, o_s, 1 << i) & (o_b >= 0)
        b_dg += spread(b_q * b_y + b_k * b_z, path, b_k, PRECISION, MERGE)
    b_X = tl.where(o_s == o_t, b_X, 0.0)
    b_dq = tl.dot(b_k, b_X, b_dq, input_precision=PRECISION)
    b_dk = tl.dot(b_q, b_X, b_dk, input_precision=PRECISION)
    tl.store(dq + row * K + at, b_dq.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + row * K + at, b_dk.to(dk.dtype.element_ty), mask=inside)
    tl.store(dg + row * K + at, b_dg.to(dg.dtype.element_ty), mask=inside)


#: Warps of a block, one for each 16 tokens, and its channels.
WARPS, CHANNELS = 4, 32


def run_channels(c: Call, shares: Shares) -> Found:
    """All gradients but that of h0, of the call as it was given."""
    assert c.g is not None, "one gate per channel"
    kind = c.q.dtype if c.HV == c.H else torch.float32
    dq, dk = (c.q.new_empty((c.B, c.T, c.HV, c.K), dtype=kind) for _ in range(2))
    dg = torch.empty_like(c.g)
    args = (
        c.q, c.k, c.g, shares.dq, shares.dp, shares.dk, shares.dX, shares.dM, shares.overlap, c.cu, c.offsets, dq, dk, dg, c.T, c.N,
        c.B * c.T, c.s_q, c.s_k, c.SEG, c.H, c.HV,
    )  # fmt: skip
    channels = min(c.same["BK"], CHANNELS)
    constants = c.constants("BT", "MERGE", "FLOOR") | {"BD": channels}
    launch(chunk_channels, (c.chunks * c.HV * (c.same["BK"] // channels),), args, constants, WARPS, 1)
    return Found(dq, dk, None, shares.dv, dg, shares.dbeta)
