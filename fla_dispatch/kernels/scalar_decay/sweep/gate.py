"""Gate gradients from float32 row sums, equation (6): dg_t = <S_0, dS_0> - sum_{s < t} (q_s . dq_s - k_s . dk_s).

Grid: (N, tiles of HV). k . dk equals beta * (v . dv), so the row sums come from the dq and the dv sweep alone, and the
latter is the gradient of beta.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._shared.launch import launch
from ..._shared.spans import unit_span
from .backward import Buffers
from .host import Call


@triton.jit(do_not_specialize=["T", "N", "total", "HV"])
def gate_gradient(
    dot_q,  # [NK, B, T, HV]
    dot_v,  # [NV, B, T, HV]
    beta,  # [B, T, HV] or None
    start,  # [N, HV] <S_0, dS_0>, or None
    cu,  # [N + 1] or None
    dg,  # [B, T, HV] or None
    dbeta,  # [B, T, HV] or None
    T,
    N,
    total,
    HV,
    NK: tl.constexpr,
    NV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_n = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < HV
    begin, length = unit_span(cu, None, i_n, T, N, 0, False, PACKED)
    o_t = tl.arange(0, BT)
    earlier = tl.zeros([BH], tl.float32)
    if start is not None:
        earlier += tl.load(start + tl.cast(i_n, tl.int64) * HV + o_h, mask=m_h, other=0.0)
    plane = tl.cast(total, tl.int64) * HV
    NT = tl.cdiv(length, BT)
    for i in range(0, NT):
        t = i * BT + o_t
        m = (t < length)[:, None] & m_h[None, :]
        p = (begin + t)[:, None] * HV + o_h[None, :]
        b_q = tl.zeros([BT, BH], tl.float32)
        b_v = tl.zeros([BT, BH], tl.float32)
        for j in range(NK):
            b_q += tl.load(dot_q + j * plane + p, mask=m, other=0.0)
        for j in range(NV):
            b_v += tl.load(dot_v + j * plane + p, mask=m, other=0.0)
        if dbeta is not None:
            tl.store(dbeta + p, b_v.to(dbeta.dtype.element_ty), mask=m)
        if dg is not None:
            if beta is not None:
                b_v *= tl.load(beta + p, mask=m, other=0.0).to(tl.float32)
            b_d = b_q - b_v
            b_g = earlier[None, :] + b_d - tl.cumsum(b_d, 0)
            tl.store(dg + p, b_g.to(dg.dtype.element_ty), mask=m)
            earlier -= tl.sum(b_d, 0)


def run_gate(c: Call, out: Buffers, start: torch.Tensor | None, dg: torch.Tensor | None, dbeta: torch.Tensor | None) -> None:
    """Fill dg and dbeta from the row sums of a backward launch."""
    BH = 8
    launch(
        gate_gradient,
        (c.N, -(-c.HV // BH)),
        (out.dot_q, out.dot_v, c.beta, start, c.cu, dg, dbeta, c.T, c.N, c.B * c.T, c.HV),
        {"NK": out.dot_q.shape[0], "NV": out.dot_v.shape[0], "BT": 256, "BH": BH, "PACKED": c.cu is not None},
        4,
        2,
    )
