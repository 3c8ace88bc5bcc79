"""Rows of q, k and p of unit length, equation (21), in one launch.

Grid: (blocks of ROWS rows (b T + t) H + h, of each tensor).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile, token_rows
from .. import NORM_EPS


@triton.jit
def rows_at(
    rows,
    s_t,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    """Offsets [ROWS, BK] of a block of rows whose tokens are s_t apart, and the mask of those that are there."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BK)
    p = (o_r // H).to(tl.int64) * s_t + o_r % H * K
    return p[:, None] + o_k[None, :], (o_r < rows)[:, None] & (o_k < K)[None, :]


@triton.jit
def rows_of(
    x,  # [rows / H, H, K], token stride s_t
    rows,
    s_t,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    """A block [ROWS, BK] in float32, zero where masked."""
    p, m = rows_at(rows, s_t, H, K, ROWS, BK)
    return tl.load(x + p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def put_rows(
    y,  # [rows / H, H, K]
    b_y,  # [ROWS, BK] float32
    rows,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    p, m = rows_at(rows, H * K, H, K, ROWS, BK)
    tl.store(y + p, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def inverse_length(
    b_x,  # [ROWS, BK] float32
    EPS: tl.constexpr,
):
    """r of (21), [ROWS, 1]."""
    return tl.rsqrt(tl.sum(b_x * b_x, 1) + EPS)[:, None]


@triton.jit(do_not_specialize=["rows"])
def unit_rows(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T * UPDATES, H, K], token stride s_k
    p,  # [B, T * UPDATES, H, K], token stride s_p, or None
    q_unit,  # [B, T, H, K]
    k_unit,  # [B, T * UPDATES, H, K]
    p_unit,  # [B, T * UPDATES, H, K] or None
    rows,  # of k
    s_q,
    s_k,
    s_p,
    UPDATES: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    EPS: tl.constexpr,
):
    # all loads before the first store: a compiler may not move one past the other
    b_q = rows_of(q, rows // UPDATES, s_q, H, K, ROWS, BK)
    b_k = rows_of(k, rows, s_k, H, K, ROWS, BK)
    if p is not None:
        b_p = rows_of(p, rows, s_p, H, K, ROWS, BK)
        put_rows(p_unit, b_p * inverse_length(b_p, EPS), rows, H, K, ROWS, BK)
    put_rows(q_unit, b_q * inverse_length(b_q, EPS), rows // UPDATES, H, K, ROWS, BK)
    put_rows(k_unit, b_k * inverse_length(b_k, EPS), rows, H, K, ROWS, BK)


def constants(q: torch.Tensor, k: torch.Tensor, elements: int) -> dict[str, Any]:
    """What the kernels of rows are compiled for; elements: of a block, of each tensor."""
    H, K = k.shape[2:]
    BK = tile(K)
    updates = k.shape[1] // q.shape[1] if q.shape[1] else 1
    return {"UPDATES": updates, "H": H, "K": K, "ROWS": max(1, elements // BK), "BK": BK, "EPS": NORM_EPS}


def run_rows(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """q, k (and p) with rows of unit length, contiguous, each in its dtype; k and p hold n updates for each token of q."""
    found = tuple(x.new_empty(x.shape) for x in (q, k, p) if x is not None)
    known = constants(q, k, 2048)
    rows = k.numel() // known["K"] if k.numel() else 0
    q, s_q = token_rows(q)
    k, s_k = token_rows(k)
    p, s_p = (None, 0) if p is None else token_rows(p)
    launch(
        unit_rows,
        (-(-rows // known["ROWS"]),),
        (q, k, p, found[0], found[1], None if p is None else found[2], rows, s_q, s_k, s_p),
        known,
        4,
        1,
    )
    return found
