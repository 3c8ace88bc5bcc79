"""`parallel_triton`: a whole short sequence as one chunk (equations (4), (7), (9) to (13)), without states in memory.

One launch forward and three backward, gates added up where they are used: the fewest launches of all variants.
"""

from __future__ import annotations

from typing import Any

import torch

from .configs import ParallelConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .states.keys import run_keys
from .states.outputs import run_outputs
from .states.queries import run_queries
from .states.values import run_values
from .sweep.gradients import arriving
from .sweep.host import Call, prepare


def _rest(config: ParallelConfig, c: Call) -> dict[str, Any]:
    """The launch arguments that every kernel takes: each sequence is a chunk."""
    return {
        "chunks": c.N, "raw": c.g is not None and c.g.dim() == 3, "SEG": config.tokens, "BT": config.tokens, "HEADS": config.HEADS,
        "offsets": None, "warps": config.tokens // 16, "stages": config.stages,
    }  # fmt: skip


def forward(config: ParallelConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, 0)
    run_outputs(c, o, c.h0, out.o, out.state if o.final_state else None, **_rest(config, c))
    return out


def backward(config: ParallelConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t, want = residuals.tensors, Gradients(*wanted)
    c = prepare(t, o, 0)
    a = arriving(c, residuals, grads, o)
    gated, rest = t.g is not None, _rest(config, c)
    shares, rows = run_queries(c, o, a.do, a.s_do, c.h0, gates=gated, **rest)
    overlap = (c.h0 * a.dS).sum((-1, -2))[None] if gated and c.h0 is not None and a.dS is not None else None
    dg = torch.empty_like(t.g, memory_format=torch.contiguous_format) if gated else None
    found = run_values(c, o, a.do, a.s_do, a.dS, rows, overlap, dg, None if c.h0 is None else torch.empty_like(c.h0), **rest)
    dq, dk = (x[0] if x.shape[0] == 1 else x.sum(0) for x in (shares, run_keys(c, o, a.do, a.s_do, a.dS, **rest)))
    return Gradients(
        q=dq.to(t.q.dtype) if want.q else None,
        k=dk.to(t.k.dtype) if want.k else None,
        v=found.dv if want.v else None,
        g=found.dg if want.g else None,
        beta=found.dbeta if want.beta else None,
        skip=found.dskip.sum(0).to(t.skip.dtype) if want.skip else None,
        h0=found.before if want.h0 else None,
        z0=None,
    )
