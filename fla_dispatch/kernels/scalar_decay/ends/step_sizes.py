"""Step sizes and log decays of mamba2 from raw input, equation (14).

Grid: (blocks of ROWS tokens); a block takes all heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile
from ..._shared.step_math import LOG2E, softplus


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with no exponential of a positive number."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def raw_steps(
    dt,  # [B, T, HV], strides s_b, s_t, s_h
    bias,  # [HV] or None
    o_r,  # [ROWS] rows b T + t
    m_r,
    o_h,  # [BH]
    m_h,
    T,
    s_b,
    s_t,
    s_h,
):
    """dt + bias in float32 [ROWS, BH], zero where masked."""
    p_r = (o_r // T).to(tl.int64) * s_b + (o_r % T).to(tl.int64) * s_t
    x = tl.load(dt + p_r[:, None] + o_h[None, :] * s_h, mask=m_r[:, None] & m_h[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["low", "high", "rows", "T", "HV", "s_b", "s_t", "s_h"])
def step_sizes(
    dt,  # [B, T, HV], strides s_b, s_t, s_h
    bias,  # [HV] or None
    A,  # [HV]
    beta,  # [B, T, HV] float32
    g,  # [B, T, HV] float32
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
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_h = tl.arange(0, BH)
    m_r = o_r < rows
    m_h = o_h < HV
    x = raw_steps(dt, bias, o_r, m_r, o_h, m_h, T, s_b, s_t, s_h)
    if SOFTPLUS:
        x = softplus(x)
    if LIMIT:
        x = tl.where(x < low, low, x)
        x = tl.where(x > high, high, x)
    p = o_r.to(tl.int64)[:, None] * HV + o_h[None, :]
    m = m_r[:, None] & m_h[None, :]
    tl.store(beta + p, x, mask=m)
    tl.store(g + p, x * tl.load(A + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :], mask=m)


def blocks(heads: int) -> tuple[int, int]:
    """Tokens of a block, and heads padded to a power of two: together 2048 elements, where there are not more heads."""
    BH = tile(heads)
    return max(1, 2048 // BH), BH


def run_step_sizes(
    dt: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, softplus: bool, limits: tuple[float, float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(beta, g), both [B, T, HV] float32; limits: None for none."""
    B, T, HV = dt.shape
    beta, g = dt.new_empty(dt.shape, dtype=torch.float32), dt.new_empty(dt.shape, dtype=torch.float32)
    ROWS, BH = blocks(HV)
    low, high = limits or (0.0, 0.0)
    launch(
        step_sizes,
        (-(-B * T // ROWS),),
        (dt, None if bias is None else bias.contiguous(), A.contiguous(), beta, g, low, high, B * T, T, HV, *dt.stride()),
        {"ROWS": ROWS, "BH": BH, "SOFTPLUS": softplus, "LIMIT": limits is not None},
        4,
        1,
    )
    return beta, g
