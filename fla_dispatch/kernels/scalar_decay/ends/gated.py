"""The output of mamba2 under its gate, equation (16): y = o silu(z).

Grid: (blocks of ROWS tokens, tiles of the heads' columns).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, tile, token_rows
from .step_sizes import sigmoid


@triton.jit
def block_of(
    rows,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    """Rows [ROWS] and columns [BW] of a block, and the mask of those that are there."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    return o_r, o_w, (o_r < rows)[:, None] & (o_w < W)[None, :]


@triton.jit(do_not_specialize=["rows"])
def gated(
    o,  # [B, T, HV, V] as rows of W = HV V
    z,  # [B, T, HV, V], token stride s_z
    y,  # [B, T, HV, V]
    rows,
    s_z,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    o_r, o_w, m = block_of(rows, W, ROWS, BW)
    p = o_r[:, None] * W + o_w[None, :]
    b_z = tl.load(z + o_r[:, None] * s_z + o_w[None, :], mask=m, other=0.0).to(tl.float32)
    b_o = tl.load(o + p, mask=m, other=0.0).to(tl.float32)
    tl.store(y + p, (b_o * (b_z * sigmoid(b_z))).to(y.dtype.element_ty), mask=m)


def blocks(width: int) -> dict[str, int]:
    """W, and the tokens and columns of a block: 2048 elements."""
    BW = min(1024, tile(width))
    return {"W": width, "ROWS": 2048 // BW, "BW": BW}


def run_gated(o: torch.Tensor, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y [B, T, HV, V] of dtype."""
    z, s_z = token_rows(z)
    B, T, HV, V = o.shape
    y = o.new_empty(o.shape, dtype=dtype)
    known = blocks(HV * V)
    launch(
        gated,
        (-(-B * T // known["ROWS"]), -(-known["W"] // known["BW"])),
        (o.contiguous(), z, y, B * T, s_z),
        known,
        4,
        1,
    )
    return y
