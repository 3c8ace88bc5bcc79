"""Gradients of the gate of mamba2, equation (17).

Grid: (blocks of ROWS tokens, tiles of the heads' columns).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch, token_rows
from .gated import block_of, blocks
from .step_sizes import sigmoid


@triton.jit(do_not_specialize=["rows"])
def gated_backward(
    o,  # [B, T, HV, V] as rows of W = HV V
    z,  # [B, T, HV, V], token stride s_z
    dy,  # [B, T, HV, V], token stride s_dy
    do,  # [B, T, HV, V]
    dz,  # [B, T, HV, V]
    rows,
    s_z,
    s_dy,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    o_r, o_w, m = block_of(rows, W, ROWS, BW)
    p = o_r[:, None] * W + o_w[None, :]
    b_z = tl.load(z + o_r[:, None] * s_z + o_w[None, :], mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + o_r[:, None] * s_dy + o_w[None, :], mask=m, other=0.0).to(tl.float32)
    b_o = tl.load(o + p, mask=m, other=0.0).to(tl.float32)
    b_s = sigmoid(b_z)
    tl.store(do + p, (b_dy * (b_z * b_s)).to(do.dtype.element_ty), mask=m)
    tl.store(dz + p, (b_dy * b_o * b_s * (1.0 + b_z * (1.0 - b_s))).to(dz.dtype.element_ty), mask=m)


def run_gated_backward(o: torch.Tensor, z: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of o and z, in their dtypes."""
    z, s_z = token_rows(z)
    dy, s_dy = token_rows(dy)
    B, T, HV, V = o.shape
    do, dz = o.new_empty(o.shape), z.new_empty(z.shape)
    known = blocks(HV * V)
    launch(
        gated_backward,
        (-(-B * T // known["ROWS"]), -(-known["W"] // known["BW"])),
        (o.contiguous(), z, dy, do, dz, B * T, s_z, s_dy),
        known,
        4,
        1,
    )
    return do, dz
