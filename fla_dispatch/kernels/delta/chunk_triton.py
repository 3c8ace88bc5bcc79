"""`chunk_triton`: the inverse of every chunk at once, then one pass over time with the state in registers (equations (6) and (7)).

Forward writes the inverses (with `scores` the scores too) and outputs: no w, no state but the last. Backward computes both again,
passes over time once more for w and the states of all chunks, back in time for gradients of states, and then takes every chunk by itself.
A gate per key channel becomes part of q and k before the passes, and of the gradients after them: neither pass knows it.
With SEG, segments of sequences run in parallel: passes for what each makes of zero and of the identity, then their composition, exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._shared.launch import token_rows
from .._shared.torch_math import sum_groups
from .chunks.channel import run_channel
from .chunks.channels import run_channels
from .chunks.forward import run_forward
from .chunks.gradients import run_gradients
from .chunks.host import Call, prepare
from .chunks.inverse import run_inverse
from .chunks.reverse import run_reverse
from .chunks.segments import gradients_after, states_before, transitions_of
from .chunks.states import run_states
from .configs import ChunkConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs

#: Inverses, with `scores` (True) scores, and cumulative gates of all chunks, as `inverse.run_inverse` says.
Inverse = Callable[[Call, bool], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]


def forward(config: ChunkConfig, t: Tensors, o: Options) -> Outputs:
    return forward_by(run_inverse, config, t, o)


def backward(config: ChunkConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    return backward_by(run_inverse, config, residuals, grads, o, wanted)


def forward_by(invert: Inverse, config: ChunkConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c, warps = prepare(t, o, config), config.warps
    if o.decay == "channel":
        c, inverse, scores, _ = run_channel(c, config.parallel, False)
        gates = None
    else:
        inverse, scores, gates = invert(c, config.scores)
    h0, state = c.h0, out.state if o.final_state else None
    if config.SEG:
        h0 = states_before(c, inverse, gates, transitions_of(c, inverse, gates, warps), warps, state)
        state = None
    run_forward(c, inverse, scores, gates, warps, h0, o=out.o, state=state)
    return out


def backward_by(
    invert: Inverse, config: ChunkConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]
) -> Gradients:
    t = residuals.tensors
    c, warps = prepare(t, o, config), config.warps
    do, s_do = token_rows(torch.zeros_like(t.v) if grads.o is None else grads.o.to(t.v.dtype), config.tma)
    dS = None if grads.state is None else grads.state.contiguous()
    dh0 = None if c.h0 is None else torch.empty_like(c.h0)
    given, gates, pairs = c, None, None
    if o.decay == "channel":
        c, inverse, scores, pairs = run_channel(c, config.parallel, True)
    else:
        inverse, scores, gates = invert(c, True)
    assert scores is not None, "asked for"
    w, dy = (c.v.new_empty((c.B, c.T, c.HV, c.V)) for _ in range(2))
    states, after = (c.q.new_empty((c.chunks, c.HV, c.K, c.V)) for _ in range(2))
    h0, first = c.h0, dh0
    if config.SEG:
        transitions = transitions_of(c, inverse, gates, warps)
        h0 = states_before(c, inverse, gates, transitions, warps, None)
        dS = gradients_after(c, do, s_do, inverse, scores, gates, dS, transitions, dh0, warps)
        first = None
    run_forward(c, inverse, None, gates, warps, h0, w=w, states=states)
    run_reverse(c, do, s_do, inverse, scores, gates, dS, first, dy, after, warps)
    if pairs is None:
        found = run_gradients(c, do, s_do, gates, w, dy, states, after, config.parallel, config.BK)
    else:
        found = run_channels(given, run_states(c, do, s_do, pairs, w, dy, states, after))
    dq, dk, dp = (None if x is None else sum_groups(x, c.HV // given.H).to(c.q.dtype) for x in (found.dq, found.dk, found.dp))
    every = (dq, dk, found.dv, dp, found.dg, found.dbeta, dh0)
    return Gradients(*(x if want else None for x, want in zip(every, wanted, strict=True)))
