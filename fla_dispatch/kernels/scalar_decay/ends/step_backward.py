"""Gradients of the step sizes of mamba2, equation (15): of dt, and for each block the sums over its tokens for bias and A.

Grid: (blocks of ROWS tokens); a block takes all heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.step_math import softplus
from .step_sizes import blocks, raw_steps, sigmoid


@triton.jit(do_not_specialize=["low", "high", "rows", "T", "HV", "s_b", "s_t", "s_h"])
def step_sizes_backward(
    dt,  # [B, T, HV], strides s_b, s_t, s_h
    bias,  # [HV] or None
    A,  # [HV]
    dbeta,  # [B, T, HV] float32
    dg,  # [B, T, HV] float32
    ddt,  # [B, T, HV]
    sums,  # [2, blocks, HV] float32: of dbias and of dA
    low,
    high,
    rows,
    T,
    HV,
    s_b,
    s_t,
    s_h,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_r = i_b * ROWS + tl.arange(0, ROWS)
    o_h = tl.arange(0, BH)
    m_r = o_r < rows
    m_h = o_h < HV
    m = m_r[:, None] & m_h[None, :]
    p = o_r.to(tl.int64)[:, None] * HV + o_h[None, :]
    x = raw_steps(dt, bias, o_r, m_r, o_h, m_h, T, s_b, s_t, s_h)
    b_dg = tl.load(dg + p, mask=m, other=0.0)
    b_e = tl.load(dbeta + p, mask=m, other=0.0) + b_dg * tl.load(A + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    d = x
    if SOFTPLUS:
        d = softplus(x)
        b_e *= sigmoid(x)
    if LIMIT:
        b_e = tl.where((d < low) | (d > high), 0.0, b_e)
        d = tl.where(d < low, low, d)
        d = tl.where(d > high, high, d)
    tl.store(ddt + p, b_e.to(ddt.dtype.element_ty), mask=m)
    first = tl.cast(i_b, tl.int64) * HV
    tl.store(sums + first + o_h, tl.sum(b_e, 0), mask=m_h)
    tl.store(sums + tl.num_programs(0).to(tl.int64) * HV + first + o_h, tl.sum(b_dg * d, 0), mask=m_h)


def run_step_backward(
    dt: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    dbeta: torch.Tensor,
    dg: torch.Tensor,
    softplus: bool,
    limits: tuple[float, float] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of dt, in its dtype, and of bias and A, [HV] float32. Added up in the same order in every run."""
    B, T, HV = dt.shape
    ROWS, BH = blocks(HV)
    count = -(-B * T // ROWS)
    ddt, sums = dt.new_empty(dt.shape), dt.new_empty((2, count, HV), dtype=torch.float32)
    low, high = limits or (0.0, 0.0)
    launch(
        step_sizes_backward,
        (count,),
        (
            dt, None if bias is None else bias.contiguous(), A.contiguous(), dbeta.contiguous(), dg.contiguous(), ddt, sums, low, high,
            B * T, T, HV, *dt.stride(),
        ),
        {"ROWS": ROWS, "BH": BH, "SOFTPLUS": softplus, "LIMIT": limits is not None},
        4,
        1,
    )  # fmt: skip
    dbias, dA = sums.sum(1)
    return ddt, dbias, dA
