"""The two ends of every Triton backward: what the launches read, and the gradients they amount to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._shared.launch import token_rows
from ..._shared.torch_math import sum_groups
from ..recurrence import Gradients, Options, OutputGrads, Residuals
from .backward import Buffers
from .gate import run_gate
from .host import Call
from .rowdot import run_rowdot


class Arriving(NamedTuple):
    """Gradients of the outputs in kernel layout, and the weights that normalisation puts on them."""

    do: torch.Tensor  # token rows, stride s_do
    s_do: int
    w: torch.Tensor | None  # [B, T, HV]: beta, or r_t with normalize
    u: torch.Tensor | None  # [B, T, HV] float32: -(do . o) with normalize
    dS: torch.Tensor | None  # [N, HV, K, V] float32
    dz: torch.Tensor | None  # [N, HV, K] float32


def arriving(c: Call, residuals: Residuals, grads: OutputGrads, o: Options, tma: bool = False) -> Arriving:
    t = residuals.tensors
    do, s_do = token_rows(torch.zeros_like(t.v) if grads.o is None else grads.o.to(t.v.dtype), tma)
    dS = None if grads.state is None else grads.state.contiguous()
    dz = None if grads.z is None else grads.z.contiguous()
    w, u = c.beta, None
    if o.normalize:
        w = residuals.weight
        u = run_rowdot(do, s_do, residuals.o)
    return Arriving(do, s_do, w, u, dS, dz)


def leaving(c: Call, residuals: Residuals, out: Buffers, wanted: tuple[bool, ...]) -> Gradients:
    """Group sums in float32, gradients of gates and skip from row sums, and None for what is not wanted."""
    t = residuals.tensors
    want = Gradients(*wanted)
    dg = dbeta = None
    if out.dot_q is not None:
        dg = torch.empty_like(t.g, memory_format=torch.contiguous_format) if want.g else None
        dbeta = torch.empty_like(t.beta, memory_format=torch.contiguous_format) if want.beta else None
        start = None if c.h0 is None or dg is None else (c.h0 * out.dh0).sum((-1, -2))
        run_gate(c, out, start, dg, dbeta)
    group = c.HV // c.H
    return Gradients(
        q=sum_groups(out.dq, group).to(t.q.dtype) if want.q else None,
        k=sum_groups(out.dk, group).to(t.k.dtype) if want.k else None,
        v=out.dv if want.v else None,
        g=dg,
        beta=dbeta,
        skip=out.dot_skip.sum((0, 1, 2)).to(t.skip.dtype) if want.skip else None,
        h0=out.dh0 if want.h0 else None,
        z0=out.dz0 if want.z0 else None,
    )
