"""`recurrent_triton`: token by token with the state in float32 registers, and a backward that stores no state: for short lengths.

Forward is one launch. Backward is three passes over time and their combination: forward for the errors e, back for dk, dv and dbeta,
forward again for dq and dp (equations (8) and (9)). No matrix unit is used.
"""

from __future__ import annotations

import torch

from .._shared.launch import token_rows
from .._shared.torch_math import sum_groups
from .configs import RecurrentConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .tokens.combine import run_combine
from .tokens.forward import run_forward
from .tokens.host import prepare, tiles
from .tokens.reads import run_reads
from .tokens.reverse import run_reverse


def forward(config: RecurrentConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    run_forward(prepare(t), o, out.o, None, out.state if o.final_state else None, config.BV, config.warps)
    return out


def backward(config: RecurrentConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t)
    do, s_do = (None, 0) if grads.o is None else token_rows(grads.o)
    dS = None if grads.state is None else grads.state.contiguous()

    def new(*shape: int) -> torch.Tensor:
        return c.q.new_empty(shape, dtype=torch.float32)

    NV, tokens = tiles(c, config.BV), (c.B, c.T, c.HV)
    e, dv = new(*tokens, c.V), new(*tokens, c.V)
    dq, dk, dp = (new(NV, *tokens, c.K) for _ in range(3))
    dbeta, dh0 = new(NV, *tokens), None if c.h0 is None else new(c.N, c.HV, c.K, c.V)
    run_forward(c, o, None, e, None, config.BV, config.warps)
    run_reverse(c, o, do, s_do, e, dS, dk, dv, dbeta, dh0, config.BV, config.warps)
    run_reads(c, o, do, s_do, e, dv, dq, dp, config.BV, config.warps)
    base = None
    if c.g is not None and c.h0 is not None:
        base = (c.h0 * dh0).sum(-1 if o.decay == "channel" else (-1, -2))
    group = c.HV // c.H
    kind = c.q.dtype if group == 1 else torch.float32
    found_q, found_k, found_p = (torch.empty_like(dq[0], dtype=kind) if x else None for x in (True, True, c.p is not None))
    found_beta, found_g = torch.empty_like(c.beta), None if c.g is None else torch.empty_like(c.g)
    run_combine(c, o, base, (dq, dk, dp, dbeta), (found_q, found_k, found_p, found_beta, found_g), config.BV)
    found = (
        sum_groups(found_q, group).to(c.q.dtype), sum_groups(found_k, group).to(c.q.dtype), dv.to(c.v.dtype),
        None if found_p is None else sum_groups(found_p, group).to(c.q.dtype), found_g, found_beta, dh0,
    )  # fmt: skip
    return Gradients(*(x if want else None for x, want in zip(found, wanted, strict=True)))
