"""`step_triton`: equations (1) to (6) in one launch, the state of a slot read once and written once, where it is.

Grid: (B * HV * tiles of V); the tile is the fastest index. With the normaliser a block takes all tiles of its head one after the
other, because every tile reads z before one may write it. Nothing is allocated but the output, nothing waits for the device,
and padding rows are found by the kernel: a captured graph serves whatever slots hold when it is replayed.

The strides of g are arguments that no compiled code depends on: heads are 1 apart, which a compiler would take for a constant, and
each call would go through Triton's own lookup.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .._shared.launch import launch, tile
from .._shared.step_math import LOG2E, softplus
from .._shared.step_plan import StepConfig
from . import EPS, EPS_NORM, MIN_LOG_DECAY
from .recurrence import Options, Outputs, Tensors, head_decay, limited

DECAYS = {"none": 0, "token": 2, "ssd": 3}


@triton.jit(do_not_specialize=["scale", "low", "high", "s_gb", "s_gh", "H", "HV"])
def scalar_step(
    q,  # [B, H, K], strides s_qb, s_qh, 1
    k,  # [B, H, K], strides s_kb, s_kh, 1
    v,  # [B, HV, V], strides s_vb, s_vh, 1
    state,  # [S, HV, K, V], slot stride s_s
    z,  # [S, HV, K], slot stride s_z, or None
    slots,  # [B] or None
    g,  # [B, HV], strides s_gb, s_gh, or None
    A,  # [HV]: a itself (DECAY 1) or the rate of decay (3), or None
    bias,  # [HV] or None
    D,  # [HV] or [HV, V] or None
    gate,  # [B, HV, V], strides s_tb, s_th, 1, or None
    o,  # [B, HV, V]
    scale,
    low,
    high,
    s_qb,
    s_qh,
    s_kb,
    s_kh,
    s_vb,
    s_vh,
    s_s,
    s_z,
    s_gb,
    s_gh,
    s_tb,
    s_th,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a block
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    L2NORM: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    SKIP: tl.constexpr,  # D: 0 none, 1 per head, 2 per channel
    EPS: tl.constexpr,
    EPS_NORM: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV * TILES - 1) // (BV * TILES)
    i_hv = (pid // NV) % HV
    i_h = tl.cast(i_hv // (HV // H), tl.int64)
    i_hv = tl.cast(i_hv, tl.int64)
    i_b = tl.cast(pid // NV // HV, tl.int64)
    first = (pid % NV) * TILES
    i_s = i_b if slots is None else tl.load(slots + i_b).to(tl.int64)
    p_o = o + (i_b * HV + i_hv) * V
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    if i_s < 0:
        for j in range(TILES):
            o_v = (first + j) * BV + tl.arange(0, BV)
            tl.store(p_o + o_v, tl.zeros([BV], o.dtype.element_ty), mask=o_v < V)
    else:
        p_s = state + i_s * s_s + i_hv * (K * V) + o_k[:, None] * V
        if TILES == 1:  # the long way to memory begins before what is small is waited for
            o_v = first * BV + tl.arange(0, BV)
            b_s = tl.load(p_s + o_v[None, :], mask=m_k[:, None] & (o_v < V)[None, :], other=0.0).to(tl.float32)
        b_q = tl.load(q + i_b * s_qb + i_h * s_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0).to(tl.float32)
        if L2NORM:  # (6)
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + EPS_NORM)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + EPS_NORM)
        a = 1.0  # (4)
        if DECAY == 1:
            a = tl.load(A + i_hv)
        if DECAY >= 2:
            x = tl.load(g + i_b * s_gb + i_hv * s_gh).to(tl.float32)
            if DECAY == 3:
                if bias is not None:
                    x += tl.load(bias + i_hv).to(tl.float32)
                if SOFTPLUS:
                    x = softplus(x)
                if LIMIT:
                    x = tl.where(x < low, low, x)
                    x = tl.where(x > high, high, x)
                b_k *= x
                x *= tl.load(A + i_hv).to(tl.float32)
            a = tl.exp2(tl.where(x < FLOOR, FLOOR, x) * LOG2E)
        if NORMALIZE:
            p_z = z + i_s * s_z + i_hv * K + o_k
            b_z = a * tl.load(p_z, mask=m_k, other=0.0).to(tl.float32) + b_k  # (3)
            r = 1.0 / (scale * tl.sum(b_q * b_z, 0) + EPS)
        for j in range(TILES):
            o_v = (first + j) * BV + tl.arange(0, BV)
            m_v = o_v < V
            m_s = m_k[:, None] & m_v[None, :]
            if TILES > 1:
                b_s = tl.load(p_s + o_v[None, :], mask=m_s, other=0.0).to(tl.float32)
            b_v = tl.load(v + i_b * s_vb + i_hv * s_vh + o_v, mask=m_v, other=0.0).to(tl.float32)
            if DECAY != 0:
                b_s *= a
            b_s += b_k[:, None] * b_v[None, :]  # (1)
            b_o = tl.sum(b_q[:, None] * b_s, 0) * scale  # (2)
            if NORMALIZE:
                b_o *= r
            if SKIP == 1:  # (5)
                b_o += tl.load(D + i_hv).to(tl.float32) * b_v
            if SKIP == 2:
                b_o += tl.load(D + i_hv * V + o_v, mask=m_v, other=0.0).to(tl.float32) * b_v
            if gate is not None:
                b_t = tl.load(gate + i_b * s_tb + i_hv * s_th + o_v, mask=m_v, other=0.0).to(tl.float32)
                b_o *= b_t / (1.0 + tl.exp2(-b_t * LOG2E))
            tl.store(p_o + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
            # a small tile is held by several warps at once, and all must have read it before one of them writes
            tl.debug_barrier()
            tl.store(p_s + o_v[None, :], b_s.to(state.dtype.element_ty), mask=m_s)
        if NORMALIZE:
            tl.store(p_z, b_z.to(z.dtype.element_ty), mask=m_k)


@functools.lru_cache(maxsize=1024)
def _constants(config: StepConfig, o: Options, K: int, V: int, skip: int) -> tuple[int, dict[str, Any]]:
    """Blocks of a head, and the kernel's compile-time constants."""
    tiles = -(-V // config.BV)
    held = tiles if o.normalize else 1
    return tiles // held, {
        "K": K, "V": V, "BK": tile(K), "BV": config.BV, "TILES": held, "DECAY": DECAYS.get(o.decay, 1), "NORMALIZE": o.normalize,
        "L2NORM": o.l2norm, "SOFTPLUS": o.softplus, "LIMIT": limited(o), "SKIP": skip, "EPS": EPS, "EPS_NORM": EPS_NORM,
        "FLOOR": MIN_LOG_DECAY,
    }  # fmt: skip


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [B, H, D] with its last dimension contiguous, and the strides of rows and heads; copied only where it is not."""
    b, h, d = x.stride()
    if d == 1 or x.shape[2] == 1:
        return x, b, h
    x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def forward(config: StepConfig, t: Tensors, o: Options) -> Outputs:
    q, k, v, state, z, slots, g, A, bias, D, gate = t
    B, H, K = q.shape
    _, HV, V = v.shape
    q, s_qb, s_qh = _rows(q)
    k, s_kb, s_kh = _rows(k)
    v, s_vb, s_vh = _rows(v)
    gate, s_tb, s_th = (None, 0, 0) if gate is None else _rows(gate)
    s_gb, s_gh = (0, 0) if g is None else g.stride()
    if o.decay in ("retention", "lightning"):
        A = head_decay(o.decay, o.rate, HV, q.device)
    slots, A, bias, D = [None if x is None else x.contiguous() for x in (slots, A, bias, D)]
    out = v.new_empty((B, HV, V))
    blocks, constants = _constants(config, o, K, V, 0 if D is None else D.dim())
    launch(
        scalar_step,
        (B * HV * blocks,),
        (
            q, k, v, state, z, slots, g, A, bias, D, gate, out, o.scale, o.low, o.high, s_qb, s_qh, s_kb, s_kh, s_vb, s_vh,
            state.stride(0), 0 if z is None else z.stride(0), s_gb, s_gh, s_tb, s_th, H, HV,
        ),
        constants,
        config.warps,
        1,
    )  # fmt: skip
    torch.autograd.graph.increment_version(state if z is None else (state, z))  # autograd cannot see that the kernel wrote
    return Outputs(out)
