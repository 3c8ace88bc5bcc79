"""`chunk_triton`: the inverse of every chunk at once, then one pass over time with the state in registers (equations (6) and (7)).

Forward writes the inverses (with `scores` the scores too) and outputs: no w, no state but the last. Backward computes both again,
passes over time once more for w and the states of all chunks, back in time for gradients of states, and then takes every chunk by itself.
"""

from __future__ import annotations

import torch

from .._shared.launch import token_rows
from .._shared.torch_math import sum_groups
from .chunks.forward import run_forward
from .chunks.gradients import run_gradients
from .chunks.host import prepare
from .chunks.inverse import run_inverse
from .chunks.reverse import run_reverse
from .configs import ChunkConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs


def forward(config: ChunkConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, config)
    inverse, scores, gates = run_inverse(c, config.scores)
    run_forward(c, inverse, scores, gates, config.warps, o=out.o, state=out.state if o.final_state else None)
    return out


def backward(config: ChunkConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t, o, config)
    do, s_do = token_rows(torch.zeros_like(t.v) if grads.o is None else grads.o.to(t.v.dtype), config.tma)
    dS = None if grads.state is None else grads.state.contiguous()
    inverse, scores, gates = run_inverse(c, True)
    assert scores is not None, "asked for"
    w, states = c.v.new_empty((c.B, c.T, c.HV, c.V)), c.q.new_empty((c.chunks, c.HV, c.K, c.V))
    run_forward(c, inverse, None, gates, config.warps, w=w, states=states)
    dh0 = None if c.h0 is None else torch.empty_like(c.h0)
    dy, after = run_reverse(c, do, s_do, inverse, scores, gates, dS, dh0, config.warps)
    found = run_gradients(c, do, s_do, scores, gates, w, dy, states, after, config.parallel)
    dq, dk, dp = (None if x is None else sum_groups(x, c.HV // c.H).to(c.q.dtype) for x in (found.dq, found.dk, found.dp))
    every = (dq, dk, found.dv, dp, found.dg, found.dbeta, dh0)
    return Gradients(*(x if want else None for x, want in zip(every, wanted, strict=True)))
