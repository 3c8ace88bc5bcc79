"""`chunk_triton`: sequences cut into segments that run in parallel: a pass for segment states, their composition, then sweeps.

For few heads and long sequences, where one block per head would leave the GPU empty. A segment is a whole number of chunks,
so its state is written once per SEG tokens, and the second read of k and v comes from L2 when segments are short enough.
Exact: segments compose by equation (7).
"""

from __future__ import annotations

import torch

from .configs import SegmentConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .sweep.backward import Buffers, run_backward
from .sweep.forward import run_forward
from .sweep.gradients import arriving, leaving
from .sweep.host import Call, exact, prepare
from .sweep.scan import compose
from .sweep.segments import Segments, cut, run_segments


def _tiles(config: SegmentConfig) -> dict[str, int]:
    """The launch arguments that every kernel takes."""
    return {"SEG": config.SEG, "BT": config.BT, "BE": config.BE, "warps": config.warps, "stages": config.stages, "tma": config.tma}


def _forward_states(
    config: SegmentConfig, c: Call, o: Options, s: Segments, out: Outputs | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States before each segment; the final ones go to `out`."""
    rest = _tiles(config)
    local = run_segments(
        c, o, c.k, c.s_k, c.v, c.s_v, c.beta, None, reverse=False, exact=out is None and exact(c, o), units=s.units,
        offsets=s.offsets, **rest,
    )  # fmt: skip
    wanted = out is not None and o.final_state
    state, z = (out.state, out.z if o.normalize else None) if wanted else (None, None)
    return compose(s, local, c.h0, c.z0, state, z, c.N, reverse=False)


def forward(config: SegmentConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, config.BT, config.tma)
    s = cut(c, t, config.SEG)
    h0, z0 = _forward_states(config, c, o, s, out)
    run_forward(c, o, out, units=s.units, offsets=s.offsets, h0=h0, z0=z0, **_tiles(config))
    return out


def backward(config: SegmentConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t, o, config.BT, config.tma)
    s = cut(c, t, config.SEG)
    a = arriving(c, residuals, grads, o, config.tma)
    out = Buffers(c, o, config.BE, states=t.h0 is not None or t.z0 is not None, gates=t.g is not None or t.beta is not None)
    h0, z0 = _forward_states(config, c, o, s, None)
    rest = _tiles(config)
    weight = a.w if o.normalize else None
    local = run_segments(
        c, o, c.q, c.s_q, a.do, a.s_do, weight, a.u, reverse=True, exact=exact(c, o), units=s.units, offsets=s.offsets, **rest
    )
    dS, dz = compose(s, local, a.dS, a.dz, out.dh0, out.dz0, c.N, reverse=True)
    run_backward(c, o, a.do, a.s_do, a.w, a.u, dS, dz, out, units=s.units, offsets=s.offsets, h0=h0, z0=z0, split=config.split, **rest)
    return leaving(c, residuals, out, wanted)
