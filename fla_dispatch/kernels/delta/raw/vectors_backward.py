"""Gradients of weights and gates, equation (24), in one launch, and for each span of tokens the sums for dt_bias and A_log.

Grid: as that of `vectors`: (spans of `length` tokens, tiles of BW of the gate's W columns). Sums over spans, and of A_log over the
channels of a head, are torch's: the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.step_math import LOG2E, sigmoid
from .vectors import columns_of, cut, gate_at, heads_of, logits_at, softplus


@triton.jit
def slope(x):
    """s'(x) of (24), which keeps its digits where s saturates."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit(do_not_specialize=["low", "rows", "length", "T", "s_bb", "s_bt", "s_bh", "s_gb", "s_gt", "s_gh"])
def vectors_backward(
    logits,  # [B, T * UPDATES, HV], strides s_bb, s_bt, s_bh (WEIGHT 0: any tensor, not read)
    raw,  # [B, T, W] raw gate, strides as gate_at has them, or None
    A_log,  # [HV] or None
    bias,  # [W] or None
    dbeta,  # [B, T * UPDATES, HV] float32, or None
    dg,  # [B, T, W] float32, or None
    dlogits,  # [B, T * UPDATES, HV] or None
    draw,  # [B, T, W] or None
    sums,  # [2, spans, W] float32: of dt_bias, and of A_log by columns; or None
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
    WEIGHT: tl.constexpr,  # 0: no gradient of logits, 1: of sigmoid, 2: doubled
    GATE: tl.constexpr,  # of GATES; 0: no gradient
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
            p = o_r.to(tl.int64)[:, None] * (UPDATES * HV) + o_h[None, :]
            b_x = tl.load(logits + logits_at(o_r, o_h, T, s_bb, s_bt, s_bh, HV, UPDATES), mask=m, other=0.0).to(tl.float32)
            b_d = WEIGHT * tl.load(dbeta + p, mask=m, other=0.0) * slope(b_x)
            tl.store(dlogits + p, b_d.to(dlogits.dtype.element_ty), mask=m)
    if GATE > 0:
        o_w, m_w, rate, b_bias = columns_of(A_log, bias, W, D, BW)
        b_sum = tl.zeros([ROWS, BW], tl.float32)
        b_sum_A = tl.zeros([ROWS, BW], tl.float32)
        for i_r in range(first, last, ROWS):
            o_r = i_r + tl.arange(0, ROWS)
            m = (o_r < last)[:, None] & m_w[None, :]
            p = o_r.to(tl.int64)[:, None] * W + o_w[None, :]
            b_x = tl.load(raw + gate_at(o_r, o_w, T, s_g, s_gb, s_gt, s_gh, D), mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
            b_d = tl.load(dg + p, mask=m, other=0.0) * rate[None, :]
            if GATE == 1:
                b_sum_A -= b_d * softplus(b_x)
                b_d *= -sigmoid(b_x)
            else:
                b_d *= low * slope(rate[None, :] * b_x)
                b_sum_A += b_d * b_x
            b_sum += b_d
            tl.store(draw + p, b_d.to(draw.dtype.element_ty), mask=m)
        if sums is not None:
            p_sum = sums + tl.program_id(0).to(tl.int64) * W + o_w
            tl.store(p_sum, tl.sum(b_sum, 0), mask=m_w)
            tl.store(p_sum + tl.num_programs(0).to(tl.int64) * W, tl.sum(b_sum_A, 0), mask=m_w)


class Found(NamedTuple):
    """Gradients; None where nothing arrives, those of parameters also where none is asked for."""

    logits: torch.Tensor | None
    raw: torch.Tensor | None
    A_log: torch.Tensor | None  # [HV] float32
    bias: torch.Tensor | None  # [HV] or [HV, K] float32


def run_vectors_backward(
    logits: torch.Tensor | None,
    raw: torch.Tensor | None,
    A_log: torch.Tensor | None,
    bias: torch.Tensor | None,
    dbeta: torch.Tensor | None,
    dg: torch.Tensor | None,
    weight: int,
    gate: int,
    low: float,
    summed: bool,
) -> Found:
    """summed: whether the gradients of parameters are asked for."""
    if dbeta is None:
        logits, weight = None, 0
    if dg is None:
        raw, gate = None, 0
    if logits is None and raw is None:
        return Found(None, None, None, None)
    dlogits, draw = (None if x is None else x.new_empty(x.shape) for x in (logits, raw))
    c = cut(logits, raw, weight, gate, elements=1024, programs=1024)
    sums = None
    if raw is not None and summed:
        sums = raw.new_empty((2, c.grid[0], c.known["W"]), dtype=torch.float32)
    arriving = (None if x is None else x.contiguous() for x in (A_log, bias, dbeta, dg))
    launch(
        vectors_backward,
        c.grid,
        (raw if logits is None else logits, c.raw, *arriving, dlogits, draw, sums, low, *c.numbers),
        c.known,
        4,
        1,
    )
    if sums is None:
        return Found(dlogits, draw, None, None)
    dbias, dA = sums.sum(1)
    return Found(
        dlogits, draw, dA if c.known["D"] == 1 else dA.view(-1, c.known["D"]).sum(1), None if bias is None else dbias.view_as(bias)
    )
