"""Gradients of rows of q, k and p through their normalisation, equation (22), in one launch.

Grid: (blocks of ROWS rows (b T + t) H + h, of each tensor).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, token_rows
from .rows import constants, inverse_length, put_rows, rows_of


@triton.jit
def through(
    b_x,  # [ROWS, BK] float32
    b_dy,  # [ROWS, BK] float32
    EPS: tl.constexpr,
):
    """dx of (22)."""
    r = inverse_length(b_x, EPS)
    return r * (b_dy - (r * r * tl.sum(b_x * b_dy, 1)[:, None]) * b_x)


@triton.jit(do_not_specialize=["rows"])
def unit_rows_backward(
    q,  # [B, T, H, K], token stride s_q
    k,  # [B, T * UPDATES, H, K], token stride s_k
    p,  # [B, T * UPDATES, H, K], token stride s_p, or None
    dq_unit,  # [B, T, H, K], token stride s_dq, or None
    dk_unit,  # [B, T * UPDATES, H, K], token stride s_dk, or None
    dp_unit,  # [B, T * UPDATES, H, K], token stride s_dp, or None
    dq,  # [B, T, H, K]
    dk,  # [B, T * UPDATES, H, K]
    dp,  # [B, T * UPDATES, H, K]
    rows,  # of k
    s_q,
    s_k,
    s_p,
    s_dq,
    s_dk,
    s_dp,
    UPDATES: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    EPS: tl.constexpr,
):
    # all loads before the first store: a compiler may not move one past the other
    if dq_unit is not None:
        b_q = rows_of(q, rows // UPDATES, s_q, H, K, ROWS, BK)
        b_dq = rows_of(dq_unit, rows // UPDATES, s_dq, H, K, ROWS, BK)
    if dk_unit is not None:
        b_k = rows_of(k, rows, s_k, H, K, ROWS, BK)
        b_dk = rows_of(dk_unit, rows, s_dk, H, K, ROWS, BK)
    if dp_unit is not None:
        b_p = rows_of(p, rows, s_p, H, K, ROWS, BK)
        b_dp = rows_of(dp_unit, rows, s_dp, H, K, ROWS, BK)
        put_rows(dp, through(b_p, b_dp, EPS), rows, H, K, ROWS, BK)
    if dq_unit is not None:
        put_rows(dq, through(b_q, b_dq, EPS), rows // UPDATES, H, K, ROWS, BK)
    if dk_unit is not None:
        put_rows(dk, through(b_k, b_dk, EPS), rows, H, K, ROWS, BK)


def run_rows_backward(
    q: torch.Tensor, k: torch.Tensor, p: torch.Tensor | None, arriving: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k and p in their dtypes, None where none arrives."""
    found = [None if x is None or dy is None else x.new_empty(x.shape) for x, dy in zip((q, k, p), arriving, strict=True)]
    known = constants(q, k, 1024)
    rows = k.numel() // known["K"] if k.numel() else 0
    raw = [(x, 0) if x is None else token_rows(x) for x in (q, k, p)]
    units = [(dy, 0) if dy is None else token_rows(dy) for dy in arriving]
    launch(
        unit_rows_backward,
        (-(-rows // known["ROWS"]),),
        (*[x for x, _ in (*raw, *units)], *found, rows, *[stride for _, stride in (*raw, *units)]),
        known,
        4,
        1,
    )
    return tuple(found)
