"""`step_triton`: equations (1) to (7) in one launch, the state of a slot read once and written once, where it is.

Grid: (B * HV * tiles of V); the tile is the fastest index. A tile holds all rows of its columns, so both sums over K, of (2) and (4),
are taken from the state as it was read, before the update. Nothing is allocated but the output, nothing waits for the device,
and padding rows are found by the kernel: a captured graph serves whatever slots hold when it is replayed.

Strides are arguments that no compiled code depends on, but that of the pool: rows of tokens are short, and one that a compiler takes
for a constant (1, between heads of a gate) would send each call through Triton's own lookup.
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
from . import EPS_NORM, MIN_LOG_DECAY
from .recurrence import Options, Outputs, Tensors

DECAYS = {"none": 0, "token": 1, "channel": 2}
GATES = {"given": 0, "softplus": 1, "bounded": 2}
WEIGHTS = {"given": 0, "sigmoid": 1, "doubled": 2}


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def load_row(x, o_x, m_x, L2NORM: tl.constexpr, EPS_NORM: tl.constexpr):
    """A row in float32, zero where masked, of unit length on request."""
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if L2NORM:  # (5)
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) + EPS_NORM)
    return b_x


@triton.jit
def decay_of(x, bias, rate, low, GATE: tl.constexpr, FLOOR: tl.constexpr):
    """a of equation (7)."""
    if GATE == 1:
        x = -rate * softplus(x + bias)
    if GATE == 2:
        x = low * sigmoid(rate * (x + bias))
    return tl.exp2(tl.where(x < FLOOR, FLOOR, x) * LOG2E)


@triton.jit(
    do_not_specialize=[
        "scale", "low", "s_qb", "s_qh", "s_kb", "s_kn", "s_kh", "s_vb", "s_vn", "s_vh", "s_pb", "s_ph", "s_gb", "s_gh", "s_bb", "s_bn",
        "s_bh", "H", "HV",
    ]
)  # fmt: skip
def delta_step(
    q,  # [B, H, K], strides s_qb, s_qh, 1
    k,  # [B, n, H, K], strides s_kb, s_kn, s_kh, 1
    v,  # [B, n, HV, V], strides s_vb, s_vn, s_vh, 1
    p,  # [B, H, K], strides s_pb, s_ph, 1, or None
    state,  # [S, HV, K, V], slot stride s_s
    slots,  # [B] or None
    g,  # [B, HV] (DECAY 1) or [B, HV, K] (2), strides s_gb, s_gh, 1, or None
    beta,  # [B, n, HV], strides s_bb, s_bn, s_bh
    A_log,  # [HV] or None
    dt_bias,  # [HV] (DECAY 1) or [HV, K] (2), or None
    o,  # [B, HV, V]
    scale,
    low,
    s_qb,
    s_qh,
    s_kb,
    s_kn,
    s_kh,
    s_vb,
    s_vn,
    s_vh,
    s_pb,
    s_ph,
    s_s,
    s_gb,
    s_gh,
    s_bb,
    s_bn,
    s_bh,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS_NORM: tl.constexpr,
    FLOOR: tl.constexpr,
):
    pid = tl.program_id(0)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_hv = (pid // NV) % HV
    i_h = tl.cast(i_hv // (HV // H), tl.int64)
    i_hv = tl.cast(i_hv, tl.int64)
    i_b = tl.cast(pid // NV // HV, tl.int64)
    i_s = i_b if slots is None else tl.load(slots + i_b).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = (pid % NV) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_o = o + (i_b * HV + i_hv) * V + o_v
    if i_s < 0:
        tl.store(p_o, tl.zeros([BV], o.dtype.element_ty), mask=m_v)
    else:
        p_s = state + i_s * s_s + i_hv * (K * V) + o_k[:, None] * V + o_v[None, :]
        # the long way to memory begins before what is small is waited for
        b_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
        b_q = load_row(q + i_b * s_qb + i_h * s_qh, o_k, m_k, L2NORM, EPS_NORM)
        if DECAY != 0:
            p_g = g + i_b * s_gb + i_hv * s_gh
            rate = 1.0
            if A_log is not None:
                rate = tl.exp2(tl.load(A_log + i_hv).to(tl.float32) * LOG2E)
            bias = 0.0
            if DECAY == 1:
                if dt_bias is not None:
                    bias = tl.load(dt_bias + i_hv).to(tl.float32)
                a = decay_of(tl.load(p_g).to(tl.float32), bias, rate, low, GATE, FLOOR)
            else:
                if dt_bias is not None:
                    bias = tl.load(dt_bias + i_hv * K + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_g = tl.load(p_g + o_k, mask=m_k, other=0.0).to(tl.float32)
                a = decay_of(b_g, bias, rate, low, GATE, FLOOR)[:, None]
        for i in tl.static_range(UPDATES):
            b_k = load_row(k + i_b * s_kb + i * s_kn + i_h * s_kh, o_k, m_k, L2NORM, EPS_NORM)
            b_p = b_k if p is None else load_row(p + i_b * s_pb + i_h * s_ph, o_k, m_k, L2NORM, EPS_NORM)
            b_v = tl.load(v + i_b * s_vb + i * s_vn + i_hv * s_vh + o_v, mask=m_v, other=0.0).to(tl.float32)
            b = tl.load(beta + i_b * s_bb + i * s_bn + i_hv * s_bh).to(tl.float32)
            if WEIGHT >= 1:  # (6)
                b = sigmoid(b) * WEIGHT
            if EARLY:
                b_w = b * (b_v - tl.sum(b_p[:, None] * b_s, 0))
            if DECAY != 0 and i == 0:
                b_s *= a  # (1)
            if not EARLY:
                b_w = b * (b_v - tl.sum(b_p[:, None] * b_s, 0))  # (2)
            if i == UPDATES - 1:
                b_o = scale * (tl.sum(b_q[:, None] * b_s, 0) + tl.sum(b_q * b_k, 0) * b_w)  # (4)
            b_s += b_k[:, None] * b_w[None, :]  # (3)
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        # a small tile is held by several warps at once, and all must have read it before one of them writes
        tl.debug_barrier()
        tl.store(p_s, b_s.to(state.dtype.element_ty), mask=m_s)


@functools.lru_cache(maxsize=1024)
def _constants(config: StepConfig, o: Options, K: int, V: int) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    return {
        "K": K, "V": V, "BK": tile(K), "BV": config.BV, "UPDATES": o.updates, "DECAY": DECAYS[o.decay], "GATE": GATES[o.gate],
        "WEIGHT": WEIGHTS[o.weight], "EARLY": o.early, "L2NORM": o.l2norm, "EPS_NORM": EPS_NORM, "FLOOR": MIN_LOG_DECAY,
    }  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous; copied only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: torch.Tensor, updates: int) -> tuple[int, ...]:
    """Strides of rows, updates and heads."""
    s = x.stride()
    return s[:3] if updates > 1 else (s[0], 0, s[1])


def forward(config: StepConfig, t: Tensors, o: Options) -> Outputs:
    q, k, v, p, state, slots, g, beta, A_log, dt_bias = t
    B, H, K = q.shape
    HV, V = v.shape[-2:]
    n = o.updates
    q, k, v = _rows(q), _rows(k), _rows(v)
    p = None if p is None else _rows(p)
    g = _rows(g) if g is not None and o.decay == "channel" else g
    slots, A_log, dt_bias = [None if x is None else x.contiguous() for x in (slots, A_log, dt_bias)]
    s_p, s_g = [(0, 0) if x is None else x.stride()[:2] for x in (p, g)]
    out = v.new_empty((B, HV, V))
    launch(
        delta_step,
        (B * HV * -(-V // config.BV),),
        (
            q, k, v, p, state, slots, g, beta, A_log, dt_bias, out, o.scale, o.lower_bound, *q.stride()[:2], *_strides(k, n),
            *_strides(v, n), *s_p, state.stride(0), *s_g, *_strides(beta, n), H, HV,
        ),
        _constants(config, o, K, V),
        config.warps,
        1,
    )  # fmt: skip
    torch.autograd.graph.increment_version(state)  # autograd cannot see that the kernel wrote
    return Outputs(out)
