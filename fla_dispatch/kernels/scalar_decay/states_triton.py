"""`states_triton`: the states at the ends of all chunks in memory, then every chunk by itself (equations (4), (7), (9) to (13)).

For value heads that share q and k, which then share their products and add up dq and dk in registers, and for gates per token, whose
gradients need no second term of any operand where both states of a chunk are at hand. States come from segments in parallel.
"""

from __future__ import annotations

from typing import Any

import torch

from .configs import StatesConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .states.keys import run_keys
from .states.outputs import run_outputs
from .states.queries import run_queries
from .states.store import run_store
from .states.values import run_values
from .sweep.gradients import arriving
from .sweep.host import Call, prepare
from .sweep.scan import compose
from .sweep.segments import Segments, cut, run_segments


def _rest(config: StatesConfig) -> dict[str, Any]:
    """What kernels of single chunks take: 64 rows for each four warps, which share columns and would repeat fewer rows."""
    return {"SEG": config.SEG, "BT": config.BT, "HEADS": config.HEADS, "warps": config.BT // 16, "stages": config.stages, "tma": config.tma}


def _cut(config: StatesConfig, c: Call, t: Tensors) -> tuple[StatesConfig, Segments]:
    """Segments, and the config with their length: the whole sequence, in chunks, where SEG is 0."""
    assert config.SEG or t.cu is None, "sequences of a pack have several lengths"
    config = config._replace(SEG=config.SEG or max(1, -(-c.T // config.BT)) * config.BT)
    return config, cut(c, t, config.SEG)


def _states(
    config: StatesConfig,
    c: Call,
    o: Options,
    s: Segments,
    b: tuple[torch.Tensor, int],  # k, or q with reverse; token stride
    x: tuple[torch.Tensor, int],  # v, or do with reverse; token stride
    start: torch.Tensor | None,
    final: torch.Tensor | None,
    beside: torch.Tensor | None = None,
    *,
    whole: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[chunks, HV, K, V]: S before each chunk, or with reverse the gradient R of the state after it; and <S, R> with S beside.

    whole: each sequence is one segment, and one walk does.
    """
    w = None if reverse else c.beta
    walk: dict[str, Any] = {"reverse": reverse, "SEG": config.SEG, "BT": config.BT, "units": s.units, "offsets": s.offsets, "stages": 2}
    if whole and c.T:  # of no tokens there is no walk: composing no segments passes states on
        return run_store(c, o, *b, *x, w, start, beside, final, warps=4, **walk)
    local = run_segments(c, o, *b, *x, w, None, exact=False, BE=64, warps=4, tma=False, **walk)
    ends, _ = compose(s, local, start, None, final, None, c.N, reverse=reverse)
    return run_store(c, o, *b, *x, w, ends, beside, warps=4, **walk)


def forward(config: StatesConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c, whole = prepare(t, o, config.BT, config.tma), config.SEG == 0
    config, s = _cut(config, c, t)
    final = out.state if o.final_state else None
    states, _ = _states(config, c, o, s, (c.k, c.s_k), (c.v, c.s_v), c.h0, final, whole=whole, reverse=False)
    run_outputs(c, o, states, out.o, chunks=states.shape[0], offsets=s.offsets, **_rest(config))
    return out


def backward(config: StatesConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t, want = residuals.tensors, Gradients(*wanted)
    c, whole = prepare(t, o, config.BT, config.tma), config.SEG == 0
    config, s = _cut(config, c, t)
    a = arriving(c, residuals, grads, o, config.tma)
    dh0 = None if c.h0 is None else torch.empty_like(c.h0)
    states, _ = _states(config, c, o, s, (c.k, c.s_k), (c.v, c.s_v), c.h0, None, whole=whole, reverse=False)
    gated = t.g is not None
    beside = states if gated else None
    after, overlap = _states(config, c, o, s, (c.q, c.s_q), (a.do, a.s_do), a.dS, dh0, beside, whole=whole, reverse=True)
    rest: dict[str, Any] = {"chunks": states.shape[0], "offsets": s.offsets, **_rest(config)}
    shares, rows = run_queries(c, o, a.do, a.s_do, states, gates=gated, **rest)
    dg = torch.empty_like(t.g, memory_format=torch.contiguous_format) if gated else None
    found = run_values(c, o, a.do, a.s_do, after, rows, overlap, dg, **rest)
    dq, dk = (x[0] if x.shape[0] == 1 else x.sum(0) for x in (shares, run_keys(c, o, a.do, a.s_do, after, **rest)))
    return Gradients(
        q=dq.to(t.q.dtype) if want.q else None,
        k=dk.to(t.k.dtype) if want.k else None,
        v=found.dv if want.v else None,
        g=found.dg if want.g else None,
        beta=found.dbeta if want.beta else None,
        skip=found.dskip.sum(0).to(t.skip.dtype) if want.skip else None,
        h0=dh0 if want.h0 else None,
        z0=None,
    )
