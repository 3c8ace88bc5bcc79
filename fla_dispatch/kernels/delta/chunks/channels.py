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
from .channel import WARPS, groups_of
from .gradients import Found
from .host import Call
from .levels import (
    BLOCK, by_blocks, by_tokens, from_blocks, from_tokens, inner_decays, last_of, load_gates, of_level, offsets_of, outer_decays, sum_blocks,
)  # fmt: skip
from .parts import chunk_span
from .states import Shares


@triton.jit
def later_sums(b_x, SIZE: tl.constexpr, GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr):
    """Sums from each token to the end of its SIZE tokens, itself included: [GR, NB, CH, BLOCK]."""
    parts = tl.reshape(b_x, [GR, NB, CH, BLOCK // SIZE, SIZE])
    return tl.reshape(tl.cumsum(parts, 4, reverse=True), [GR, NB, CH, BLOCK])


@triton.jit
def earlier_sums(b_x, SIZE: tl.constexpr, GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr):
    """Sums from the beginning of the SIZE tokens of each up to it, itself not included: [GR, NB, CH, BLOCK]."""
    parts = tl.reshape(b_x, [GR, NB, CH, BLOCK // SIZE, SIZE])
    return tl.reshape(tl.cumsum(parts, 4) - parts, [GR, NB, CH, BLOCK])


@triton.jit
def both_ways(x, o_t, o_s, length, BT: tl.constexpr):
    """Elements (t, s) and (s, t) of rows x [length, BT]; zero where there is no such row."""
    b_x = tl.load(x + o_t * BT + o_s, mask=(o_t < length) & (o_s < BT), other=0.0)
    return b_x, tl.load(x + o_s * BT + o_t, mask=(o_s < length) & (o_t < BT), other=0.0)


@triton.jit
def level_terms(
    b_q, b_k, b_L, b_X, turned_X, b_M, turned_M, rows, columns,
    GR: tl.constexpr, NB: tl.constexpr, CH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The terms of a level in (19), for q and for k: [GR, NB, CH, BLOCK] each, float32."""
    WHOLE: tl.constexpr = len(b_X.shape) == 2
    b_D = b_L.to(b_k.dtype)
    keys = by_tokens(b_k * b_D, GR, NB, CH) if WHOLE else by_blocks(b_k * b_D, GR, NB, CH)
    queries = by_tokens(b_q * b_D, GR, NB, CH) if WHOLE else by_blocks(b_q * b_D, GR, NB, CH)
    b_y = tl.dot(tl.where(rows, b_X, 0.0), keys, input_precision=PRECISION)
    b_z = tl.dot(tl.where(rows, b_M, tl.where(columns, turned_M, 0.0)), keys, input_precision=PRECISION)
    b_z = tl.dot(tl.where(columns, turned_X, 0.0), queries, b_z, input_precision=PRECISION)
    if WHOLE:
        return from_tokens(b_y, GR, NB, CH) * b_L, from_tokens(b_z, GR, NB, CH) * b_L
    else:
        return from_blocks(b_y, GR, NB, CH) * b_L, from_blocks(b_z, GR, NB, CH) * b_L


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
    BT: tl.constexpr,
    GR: tl.constexpr,
    CH: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOOR: tl.constexpr,
):
    ND: tl.constexpr = BK // (GR * CH)
    NB: tl.constexpr = BT // BLOCK
    i_d = tl.program_id(0) % ND
    i_hv = tl.program_id(0) // ND % HV
    i_c = tl.program_id(0) // ND // HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    row = begin * HV + i_hv
    at_q, inside = offsets_of(length, s_q, i_d, K, NB, GR, CH)
    at_k, _ = offsets_of(length, s_k, i_d, K, NB, GR, CH)
    at, _ = offsets_of(length, HV * K, i_d, K, NB, GR, CH)
    b_G = load_gates(g + row * K, at, inside, FLOOR)
    b_q = tl.load(q + begin * s_q + i_h * K + at_q, mask=inside, other=0.0)
    b_k = tl.load(k + begin * s_k + i_h * K + at_k, mask=inside, other=0.0)
    b_total = last_of(b_G)
    # what states take part in: decayed from the chunk's beginning, or to its end
    b_L = tl.exp2(b_G + sum_blocks(b_total, NB, True, NB)[:, :, :, None])
    b_dq = b_L * tl.load(of_q + row * K + at, mask=inside, other=0.0)
    b_dk = b_L * tl.load(of_p + row * K + at, mask=inside, other=0.0)
    b_y = b_q * b_dq + b_k * b_dk
    b_dg = later_sums(b_y, BLOCK, GR, NB, CH)
    b_other = sum_blocks(tl.sum(b_y, 3), NB, False, NB)
    b_L = tl.exp2(b_total[:, :, :, None] - b_G + sum_blocks(b_total, NB, False, NB)[:, :, :, None])
    b_y = b_L * tl.load(of_k + row * K + at, mask=inside, other=0.0)
    b_dk += b_y
    b_y *= b_k
    b_dg += earlier_sums(b_y, BLOCK, GR, NB, CH)
    b_other += sum_blocks(tl.sum(b_y, 3), NB, True, NB)
    o_c = i_d * (GR * CH) + tl.arange(0, GR)[:, None] * CH + tl.arange(0, CH)[None, :]
    p_o = overlap + (tl.cast(i_c, tl.int64) * HV + i_hv) * K + o_c
    b_other += tl.load(p_o, mask=o_c < K, other=0.0)[:, None, :]
    plane = i_hv * tl.cast(total, tl.int64) + begin
    if NB > 1:
        o_t, o_s = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
        b_X, turned_X = both_ways(dX + plane * BT, o_t, o_s, length, BT)
        b_M, turned_M = both_ways(dM + plane * BT, o_t, o_s, length, BT)
        for i in tl.static_range(4, 6):
            if (1 << i) < BT:
                b_L = outer_decays(b_G, b_total, 1 << i, NB)
                rows, columns = of_level(o_t, o_s, 1 << i), of_level(o_s, o_t, 1 << i)
                b_y, b_z = level_terms(b_q, b_k, b_L, b_X, turned_X, b_M, turned_M, rows, columns, GR, NB, CH, PRECISION)
                b_dq += b_y
                b_dk += b_z
                b_y = b_q * b_y + b_k * b_z
                second = (tl.arange(0, NB) // ((1 << i) // BLOCK) % 2 == 1)[None, :, None]
                b_dg += tl.where(second[:, :, :, None], later_sums(b_y, BLOCK, GR, NB, CH), earlier_sums(b_y, BLOCK, GR, NB, CH))
                if (1 << i) > BLOCK:
                    b_sum = tl.sum(b_y, 3)
                    later, earlier = sum_blocks(b_sum, NB, False, (1 << i) // BLOCK), sum_blocks(b_sum, NB, True, (1 << i) // BLOCK)
                    b_other += tl.where(second, later, earlier)
    b_dg += b_other[:, :, :, None]
    o_b = tl.arange(0, NB)[:, None, None] * BLOCK
    o_r, o_s = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    b_X, turned_X = both_ways(dX + plane * BT, o_b + o_r, o_b + o_s, length, BT)
    b_M, turned_M = both_ways(dM + plane * BT, o_b + o_r, o_b + o_s, length, BT)
    for i in tl.static_range(4):
        b_L = inner_decays(b_G, 1 << i, GR, NB, CH)
        rows, columns = of_level(o_r, o_s, 1 << i), of_level(o_s, o_r, 1 << i)
        b_y, b_z = level_terms(b_q, b_k, b_L, b_X, turned_X, b_M, turned_M, rows, columns, GR, NB, CH, PRECISION)
        b_dq += b_y
        b_dk += b_z
        b_y = b_q * b_y + b_k * b_z
        second = tl.arange(0, BLOCK) // (1 << i) % 2 == 1
        b_dg += tl.where(second, later_sums(b_y, 1 << i, GR, NB, CH), earlier_sums(b_y, 1 << i, GR, NB, CH))
    own = tl.where(o_r == o_s, b_X, 0.0)
    b_dq += from_blocks(tl.dot(own, by_blocks(b_k, GR, NB, CH), input_precision=PRECISION), GR, NB, CH)
    b_dk += from_blocks(tl.dot(own, by_blocks(b_q, GR, NB, CH), input_precision=PRECISION), GR, NB, CH)
    tl.store(dq + row * K + at, b_dq.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + row * K + at, b_dk.to(dk.dtype.element_ty), mask=inside)
    tl.store(dg + row * K + at, b_dg.to(dg.dtype.element_ty), mask=inside)


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
    groups = groups_of(c)
    tiles = c.same["BK"] // (groups["GR"] * groups["CH"])
    launch(chunk_channels, (c.chunks * c.HV * tiles,), args, c.constants("BT", "FLOOR") | groups, WARPS, 1)
    return Found(dq, dk, None, shares.dv, dg, shares.dbeta)
