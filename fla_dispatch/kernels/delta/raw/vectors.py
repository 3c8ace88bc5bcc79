"""Weights of updates from logits, and log decays from raw input, equation (23), in one launch.

Grid: (spans of `length` tokens, tiles of BW of the gate's W columns). W = HV for a gate per head, HV K for one per channel; with the
tiles of columns go as many heads of beta. A block walks over its span, so that parameters are read once for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile, token_rows
from ..._shared.step_math import LOG2E, sigmoid

#: What the code GATE stands for.
GATES = {"given": 0, "softplus": 1, "bounded": 2}


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|, by the polynomial of degree 8 that is nearest to log1p(e) / e on [0, 1]: within 3e-8
    of it, 2e-7 with the rounding of float32. It divides nothing, where a gate per channel is short of instructions, not of digits."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    series = 0.19106005 + e * (-0.13663243 + e * (0.07822591 + e * (-0.029505214 + e * 0.005232688)))
    series = 0.99999994 + e * (-0.49999493 + e * (0.33319098 + e * (-0.24842982 + e * series)))
    return tl.where(x > 0.0, x, 0.0) + e * series


@triton.jit
def columns_of(
    A_log,  # [HV] or None
    bias,  # [W] or None
    W: tl.constexpr,
    D: tl.constexpr,
    BW: tl.constexpr,
):
    """Columns [BW] of a block's tile, the mask of those that are there, the rate a of each and its bias, float32."""
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    m_w = o_w < W
    rate = tl.full([BW], 1.0, tl.float32)
    if A_log is not None:
        rate = tl.exp2(tl.load(A_log + o_w // D, mask=m_w, other=0.0).to(tl.float32) * LOG2E)
    b_bias = tl.zeros([BW], tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_w, mask=m_w, other=0.0).to(tl.float32)
    return o_w, m_w, rate, b_bias


@triton.jit
def gate_at(
    o_r,  # [ROWS] tokens b T + t
    o_w,  # [BW]
    T,
    s_g,
    s_gb,
    s_gt,
    s_gh,
    D: tl.constexpr,
):
    """Offsets [ROWS, BW] into a raw gate: tokens s_g apart where channels have their own, else strides s_gb, s_gt, s_gh."""
    if D > 1:
        return o_r.to(tl.int64)[:, None] * s_g + o_w[None, :]
    else:
        return ((o_r // T).to(tl.int64) * s_gb + (o_r % T).to(tl.int64) * s_gt)[:, None] + o_w[None, :] * s_gh


@triton.jit
def heads_of(
    HV: tl.constexpr,
    UPDATES: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
):
    """The entries [BH] of a token's weights, update by update, that go with a tile of columns, and the mask of those that are there."""
    o_n = tl.arange(0, BH)
    o_h = tl.program_id(1) * HEADS + o_n
    return o_h, (o_n < HEADS) & (o_h < UPDATES * HV)


@triton.jit
def logits_at(
    o_r,  # [RB] tokens b T + t
    o_h,  # [BH]
    T,
    s_bb,
    s_bt,
    s_bh,
    HV: tl.constexpr,
    UPDATES: tl.constexpr,
):
    """Offsets [RB, BH] into logits whose updates are s_bt apart."""
    o_t = (o_r // T).to(tl.int64) * s_bb + (o_r % T).to(tl.int64) * UPDATES * s_bt
    return o_t[:, None] + (o_h // HV * s_bt + o_h % HV * s_bh)[None, :]


@triton.jit(do_not_specialize=["low", "rows", "length", "T", "s_bb", "s_bt", "s_bh", "s_gb", "s_gt", "s_gh"])
def vectors(
    logits,  # [B, T * UPDATES, HV], strides s_bb, s_bt, s_bh (WEIGHT 0: any tensor, not read)
    raw,  # [B, T, W] raw gate, strides as gate_at has them, or None
    A_log,  # [HV] or None
    bias,  # [W] or None
    beta,  # [B, T * UPDATES, HV] float32, or None
    g,  # [B, T, W] float32, or None
    low,
    rows,
    length,
    T,
    s_bb,
    s_bt,
    s_bh,
    s_g,
    s_gb,
    s_gt,
    s_gh,
    HV: tl.constexpr,
    UPDATES: tl.constexpr,
    WEIGHT: tl.constexpr,  # 0: beta is given, 1: sigmoid, 2: doubled
    GATE: tl.constexpr,  # of GATES
    W: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    RB: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0) * length
    last = tl.minimum(first + length, rows)
    if WEIGHT > 0:
        o_h, m_h = heads_of(HV, UPDATES, HEADS, BH)
        for i_r in range(first, last, RB):
            o_r = i_r + tl.arange(0, RB)
            m = (o_r < last)[:, None] & m_h[None, :]
            b_x = tl.load(logits + logits_at(o_r, o_h, T, s_bb, s_bt, s_bh, HV, UPDATES), mask=m, other=0.0).to(tl.float32)
            tl.store(beta + o_r.to(tl.int64)[:, None] * (UPDATES * HV) + o_h[None, :], WEIGHT * sigmoid(b_x), mask=m)
    if GATE > 0:
        o_w, m_w, rate, b_bias = columns_of(A_log, bias, W, D, BW)
        for i_r in range(first, last, ROWS):
            o_r = i_r + tl.arange(0, ROWS)
            m = (o_r < last)[:, None] & m_w[None, :]
            b_x = tl.load(raw + gate_at(o_r, o_w, T, s_g, s_gb, s_gt, s_gh, D), mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
            if GATE == 1:
                b_g = -rate[None, :] * softplus(b_x)
            else:
                b_g = low * sigmoid(rate[None, :] * b_x)
            tl.store(g + o_r.to(tl.int64)[:, None] * W + o_w[None, :], b_g, mask=m)


class Call(NamedTuple):
    """How a launch cuts its tensors: grid, numbers among the arguments (but `low`), and constants."""

    grid: tuple[int, int]
    raw: torch.Tensor | None
    numbers: tuple[int, ...]
    known: dict[str, Any]


def cut(
    logits: torch.Tensor | None, raw: torch.Tensor | None, weight: int, gate: int, *, elements: int, programs: int, whole: int = 1
) -> Call:
    """elements: of the gate's tile of a loop; programs: as many blocks at most, about; whole: the fewest tiles of a span."""
    some = logits if raw is None else raw
    assert some is not None
    B, T, HV = some.shape[:3]
    D = 1 if raw is None or raw.dim() == 3 else raw.shape[3]
    updates = 1 if logits is None or raw is None or not T else logits.shape[1] // T
    s_g, s_gate = 0, (0, 0, 0)
    if raw is not None and raw.dim() == 4:
        raw, s_g = token_rows(raw)
    elif raw is not None:
        s_gate = raw.stride()
    W = HV * D
    BW = min(512, tile(W))
    tiles = -(-W // BW)
    heads = -(-updates * HV // tiles)
    BH, ROWS = 1 << (heads - 1).bit_length(), max(1, elements // BW)
    rows = B * T
    spans = min(-(-rows // (ROWS * whole)), max(1, programs // tiles))
    length = -(-rows // (ROWS * max(1, spans))) * ROWS
    known = {"HV": HV, "UPDATES": updates, "WEIGHT": weight, "GATE": gate, "W": W, "D": D, "HEADS": heads, "BH": BH}
    known |= {"RB": ROWS if D == 1 else max(1, 256 // BH), "BW": BW, "ROWS": ROWS}
    numbers = (rows, length, T, *((0, 0, 0) if logits is None else logits.stride()), s_g, *s_gate)
    return Call((-(-rows // length) if rows else 0, tiles), raw, numbers, known)


def run_vectors(
    logits: torch.Tensor | None,
    raw: torch.Tensor | None,
    A_log: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: int,
    gate: int,
    low: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(beta, g), float32 of the shapes of logits and raw; None where these are."""
    beta, g = (None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (logits, raw))
    c = cut(logits, raw, weight, gate, elements=2048, programs=4096)
    params = (None if x is None else x.contiguous() for x in (A_log, bias))
    launch(vectors, c.grid, (raw if logits is None else logits, c.raw, *params, beta, g, low, *c.numbers), c.known, 4, 1)
    return beta, g
