"""What gradients of a gate per channel take from states and from pairs of tokens, before any decay inside of the chunk.

Grid: (chunks * HV * 3), the part fastest: parts of a chunk share its states and w in L2. With S before the chunk, D after it, w, dy of
(12) and (13), p' of (17) and M of (5), all of them products of whole chunks:

    (18)  part 0: scale do S^T and scale do w^T
          part 1: -beta dy S^T and -beta dy w^T;   dv = beta dy,   dbeta = dy . v - p' . (dy S^T) - rowsum(M (dy w^T))
          part 2: w D^T,   exp(G_end) rowsum(S D)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile
from ..._shared.tiles import load_tile, store_tile
from .host import Call
from .parts import chunk_span


@triton.jit(do_not_specialize=["T", "N", "total", "scale", "SEG", "HV"])
def chunk_states(
    p,  # [B, T, HV, K] p' of (17)
    v,  # [B, T, HV, V], token stride s_v
    do,  # [B, T, HV, V], token stride s_do
    beta,  # [B, T, HV]
    decays,  # [chunks, HV, K] exp(G_end)
    pairs,  # [HV, B * T, BT] M
    w,  # [B, T, HV, V]
    dy,  # [B, T, HV, V]
    states,  # [chunks, HV, K, V] S before each chunk
    after,  # [chunks, HV, K, V] D after each chunk
    cu,  # [N + 1] or None
    offsets,  # [N + 1] or None
    dq,  # [B, T, HV, K] scale do S^T
    dp,  # [B, T, HV, K] -beta dy S^T
    dk,  # [B, T, HV, K] w D^T
    dX,  # [HV, B * T, BT] scale do w^T
    dM,  # [HV, B * T, BT] -beta dy w^T
    overlap,  # [chunks, HV, K] exp(G_end) rowsum(S D)
    dv,  # [B, T, HV, V]
    dbeta,  # [B, T, HV]
    T,
    N,
    total,
    scale,
    s_v,
    s_do,
    SEG,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = tl.program_id(0) % 3
    i_hv = tl.program_id(0) // 3 % HV
    i_c = tl.program_id(0) // 3 // HV
    begin, length = chunk_span(cu, offsets, i_c, T, N, SEG, BT, PACKED)
    if length <= 0:
        return
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < length
    row = begin * HV + i_hv
    o_s = (tl.cast(i_c, tl.int64) * HV + i_hv) * K
    p_a = dy + row * V
    s_a = HV * V
    p_s = states + o_s * V
    p_out = dp + row * K
    if part == 0:
        p_a = do + begin * s_do + i_hv * V
        s_a = s_do
        p_out = dq + row * K
    if part == 2:
        p_a = w + row * V
        p_s = after + o_s * V
        p_out = dk + row * K
    b_beta = tl.load(beta + row + o_t * HV, mask=m_t, other=0.0).to(tl.float32)
    b_out = tl.zeros([BT, BK], tl.float32)
    b_pairs = tl.zeros([BT, BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
    b_overlap = tl.zeros([BK], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
        at = o_k[:, None] * V + o_v[None, :]
        b_a = load_tile(p_a, length, s_a, 0, i_v, V, BT, BV, False)
        b_s = tl.load(p_s + at, mask=m_s, other=0.0)
        b_out = tl.dot(b_a, tl.trans(b_s), b_out, input_precision=PRECISION)
        if part == 2:
            b_before = tl.load(states + o_s * V + at, mask=m_s, other=0.0)
            b_overlap += tl.sum(b_s.to(tl.float32) * b_before.to(tl.float32), 1)
        else:
            b_w = load_tile(w + row * V, length, HV * V, 0, i_v, V, BT, BV, False)
            b_pairs = tl.dot(b_a, tl.trans(b_w), b_pairs, input_precision=PRECISION)
        if part == 1:
            b_v = load_tile(v + begin * s_v + i_hv * V, length, s_v, 0, i_v, V, BT, BV, False)
            b_dbeta += tl.sum(b_a.to(tl.float32) * b_v.to(tl.float32), 1)
            store_tile(dv + row * V, b_a.to(tl.float32) * b_beta[:, None], length, HV * V, 0, i_v, V, BT, BV, False)
    factor = scale + tl.zeros([BT], tl.float32)
    p_pairs = (i_hv * tl.cast(total, tl.int64) + begin + o_t[:, None]) * BT + o_t[None, :]
    if part == 1:
        factor = -b_beta
        b_p = load_tile(p + row * K, length, HV * K, 0, 0, K, BT, BK, False).to(tl.float32)
        b_m = tl.load(pairs + p_pairs, mask=m_t[:, None], other=0.0).to(tl.float32)
        b_dbeta -= tl.sum(b_p * b_out, 1) + tl.sum(b_m * b_pairs, 1)
        tl.store(dbeta + row + o_t * HV, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)
    if part == 2:
        factor = tl.full([BT], 1.0, tl.float32)
        b_decay = tl.load(decays + o_s + o_k, mask=o_k < K, other=0.0)
        tl.store(overlap + o_s + o_k, b_overlap * b_decay, mask=o_k < K)
    else:
        p_m = dX + p_pairs
        if part == 1:
            p_m = dM + p_pairs
        tl.store(p_m, (b_pairs * factor[:, None]).to(dX.dtype.element_ty), mask=m_t[:, None])
    store_tile(p_out, b_out * factor[:, None], length, HV * K, 0, 0, K, BT, BK, False)


class Shares(NamedTuple):
    """What (18) leaves for `of_channels`, and what it finishes."""

    dq: torch.Tensor  # [B, T, HV, K]
    dp: torch.Tensor  # [B, T, HV, K]
    dk: torch.Tensor  # [B, T, HV, K]
    dX: torch.Tensor  # [HV, B * T, BT]
    dM: torch.Tensor  # [HV, B * T, BT]
    overlap: torch.Tensor  # [chunks, HV, K] float32
    dv: torch.Tensor  # [B, T, HV, V]
    dbeta: torch.Tensor  # [B, T, HV]


def run_states(
    c: Call, do: torch.Tensor, s_do: int, pairs: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, states: torch.Tensor,
    after: torch.Tensor,
) -> Shares:  # fmt: skip
    """(18), from the call as `run_channel` gives it."""
    assert c.p is not None and c.decays is not None, "of run_channel"
    dq, dp, dk = (torch.empty_like(c.p) for _ in range(3))
    dX, dM = (torch.empty_like(pairs) for _ in range(2))
    out = Shares(dq, dp, dk, dX, dM, torch.empty_like(c.decays), c.v.new_empty((c.B, c.T, c.HV, c.V)), torch.empty_like(c.beta))
    args = (
        c.p, c.v, do, c.beta, c.decays, pairs, w, dy, states, after, c.cu, c.offsets, *out, c.T, c.N, c.B * c.T, c.scale, c.s_v, s_do,
        c.SEG, c.HV,
    )  # fmt: skip
    half = c.q.element_size() == 2
    wide = (128 if c.K <= 128 else 64) if half else 32  # all of a block's loads at once, two blocks of a unit
    warps = 8 if c.K > 128 else 2 if half and min(tile(c.K), tile(c.V)) < 64 else 4  # narrow tiles: decision 0003
    constants = c.constants("V", "BT") | {"BV": min(wide, tile(c.V)), "STAGES": 1}
    launch(chunk_states, (c.chunks * c.HV * 3,), args, constants, warps, 1)
    return out
