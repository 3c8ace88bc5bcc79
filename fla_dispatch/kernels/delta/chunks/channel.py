"""What passes over time take where each key channel has its own gate: (5), the inverse of (6), and q, p and k with their decays.

Grid: (chunks * HV), heads fastest. With G from a chunk's start, (6) and (7) hold for

    (17)  q' = q exp(G),   p' = k exp(G),   k' = k exp(G_end - G),   S <- Diag(exp(G_end)) S + k'^T w

as without gates but for the decay of S, so (12) and (13) serve with these in the place of q, p and k. M and X of (5) are sums over the
levels of (16); tokens with themselves have no decay.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from .host import Call
from .inverse import inverted
from .levels import (
    BLOCK,
    by_blocks,
    by_tokens,
    inner_decays,
    last_of,
    load_gates,
    of_level,
    offsets_of,
    on_diagonal,
    outer_decays,
    sum_blocks,
)  # fmt: skip
from .parts import chunk_span


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "H", "HV"])
def chunk_channel(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T, H, K], token stride s_k
    g,  # [B, T, HV, K] log decays
    beta,  # [B, T, HV]
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    reads,  # [B, T, HV, K] q' of (17)
    removes,  # [B, T, HV, K] p' of (17)
    writes,  # [B, T, HV, K] k' of (17)
    decays,  # [chunks, HV, K] float32 exp(G_end)
    inverse,  # [HV, B * T, BT]
    scores,  # [HV, B * T, BT] scale X
    pairs,  # [HV, B * T, BT] M, or None
    T,
    N,
    total,
    scale,
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
    PRECISION: tl.constexpr,  # of products of inputs
    MERGE: tl.constexpr,  # of float32 products of (11)
    FLOOR: tl.constexpr,
):
    i_c = tl.program_id(0) // HV
    i_hv = tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    NB: tl.constexpr = BT // BLOCK
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BLOCK)
    b_x = tl.zeros([BT, BT], tl.float32)
    b_m = tl.zeros([BT, BT], tl.float32)
    inner_x = tl.zeros([NB, BLOCK, BLOCK], tl.float32)
    inner_m = tl.zeros([NB, BLOCK, BLOCK], tl.float32)
    row = begin * HV + i_hv
    for i_d in range(BK // (GR * CH)):
        at_q, inside = offsets_of(length, s_q, i_d, K, NB, GR, CH)
        at_k, _ = offsets_of(length, s_k, i_d, K, NB, GR, CH)
        at, _ = offsets_of(length, HV * K, i_d, K, NB, GR, CH)
        b_G = load_gates(g + row * K, at, inside, FLOOR)
        b_q = tl.load(q + begin * s_q + i_h * K + at_q, mask=inside, other=0.0)
        b_k = tl.load(k + begin * s_k + i_h * K + at_k, mask=inside, other=0.0)
        b_total = last_of(b_G)
        before, after = sum_blocks(b_total, NB, True, NB), sum_blocks(b_total, NB, False, NB)
        b_E = tl.exp2(b_G + before[:, :, :, None])
        tl.store(reads + row * K + at, (b_q * b_E).to(b_k.dtype), mask=inside)
        tl.store(removes + row * K + at, (b_k * b_E).to(b_k.dtype), mask=inside)
        b_E = tl.exp2(b_total[:, :, :, None] - b_G + after[:, :, :, None])
        tl.store(writes + row * K + at, (b_k * b_E).to(b_k.dtype), mask=inside)
        o_c = i_d * (GR * CH) + tl.arange(0, GR)[:, None] * CH + tl.arange(0, CH)[None, :]
        p_d = decays + (tl.cast(i_c, tl.int64) * HV + i_hv) * K + o_c
        tl.store(p_d, tl.exp2(tl.sum(b_total, 1)), mask=o_c < K)
        turned = tl.permute(by_blocks(b_k, GR, NB, CH), (0, 2, 1))
        b_own = tl.dot(by_blocks(b_q, GR, NB, CH), turned, input_precision=PRECISION)
        inner_x += tl.where(o_r[None, :, None] == o_r[None, None, :], b_own, 0.0)
        for i in tl.static_range(4):
            b_L = inner_decays(b_G, 1 << i, GR, NB, CH).to(b_k.dtype)
            scaled = by_blocks(b_k * b_L, GR, NB, CH)
            turned = tl.permute(scaled, (0, 2, 1))
            chosen = of_level(o_r[None, :, None], o_r[None, None, :], 1 << i)
            inner_m += tl.where(chosen, tl.dot(scaled, turned, input_precision=PRECISION), 0.0)
            scaled = by_blocks(b_q * b_L, GR, NB, CH)
            inner_x += tl.where(chosen, tl.dot(scaled, turned, input_precision=PRECISION), 0.0)
        for i in tl.static_range(4, 6):
            if (1 << i) < BT:
                b_L = outer_decays(b_G, b_total, 1 << i, NB).to(b_k.dtype)
                scaled = by_tokens(b_k * b_L, GR, NB, CH)
                turned = tl.trans(scaled)
                chosen = of_level(o_t[:, None], o_t[None, :], 1 << i)
                b_m += tl.where(chosen, tl.dot(scaled, turned, input_precision=PRECISION), 0.0)
                scaled = by_tokens(b_q * b_L, GR, NB, CH)
                b_x += tl.where(chosen, tl.dot(scaled, turned, input_precision=PRECISION), 0.0)
    m_t = o_t < length
    plane = tl.cast(total, tl.int64)
    p_a = (i_hv * plane + begin + o_t[:, None]) * BT + o_t[None, :]
    b_x = (b_x + on_diagonal(inner_x, NB)) * scale
    tl.store(scores + p_a, b_x.to(scores.dtype.element_ty), mask=m_t[:, None])
    b_m += on_diagonal(inner_m, NB)
    if pairs is not None:
        tl.store(pairs + p_a, b_m.to(pairs.dtype.element_ty), mask=m_t[:, None])
    b_m *= tl.load(beta + row + o_t * HV, mask=m_t, other=0.0).to(tl.float32)[:, None]
    tl.store(inverse + p_a, inverted(b_m, BT, MERGE).to(inverse.dtype.element_ty), mask=m_t[:, None])


#: Channels that a warp takes at a time: its block of tokens of all of them, in registers.
CHANNELS = 16


def groups_of(c: Call, warps: int) -> dict[str, int]:
    """GR and CH: as many groups of channels as there are threads for each block of tokens."""
    channels = min(int(c.same["BK"]), CHANNELS * warps)
    groups = min(channels, max(1, 32 * warps // (c.BT // BLOCK.value)))
    return {"GR": groups, "CH": channels // groups}


def run_channel(c: Call, warps: int, keep: bool) -> tuple[Call, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The call as passes over time take it, the inverse and the scores scale X of each chunk, and, to keep, M, [HV, B * T, BT] each."""
    assert c.g is not None, "one gate per channel"
    reads, removes, writes = (c.q.new_empty((c.B, c.T, c.HV, c.K)) for _ in range(3))
    decays = c.q.new_empty((c.chunks, c.HV, c.K), dtype=torch.float32)
    inverse, scores = (c.q.new_empty((c.HV, c.B * c.T, c.BT)) for _ in range(2))
    pairs = torch.empty_like(scores) if keep else None
    args = (
        c.q, c.k, c.g, c.beta, c.cu, c.offsets, reads, removes, writes, decays, inverse, scores, pairs, c.T, c.N, c.B * c.T, c.scale,
        c.s_q, c.s_k, c.SEG, c.H, c.HV,
    )  # fmt: skip
    launch(chunk_channel, (c.chunks * c.HV,), args, c.constants("BT", "MERGE", "FLOOR") | groups_of(c, warps), warps, 1)
    stride = c.HV * c.K
    scaled = dataclasses.replace(c, q=reads, p=removes, k=writes, decays=decays, s_q=stride, s_p=stride, s_k=stride, H=c.HV)
    return scaled, inverse, scores, pairs
