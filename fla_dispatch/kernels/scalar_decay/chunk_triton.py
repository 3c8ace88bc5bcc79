"""`chunk_triton`: sequences cut into segments that run in parallel: a pass for segment states, their composition, then sweeps.

For few heads and long sequences, where one block per head would leave the GPU empty. A segment is a whole number of chunks,
so its state is written once per SEG tokens, and the second read of k and v comes from L2 when segments are short enough.
Exact: segments compose by equation (7).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...sequences import SEGMENTS, segment_offsets
from .configs import SegmentConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .sweep.backward import Buffers, run_backward
from .sweep.forward import run_forward
from .sweep.gradients import arriving, leaving
from .sweep.host import Call, exact, prepare
from .sweep.scan import run_scan
from .sweep.segments import SegmentStates, run_segments


class _Segments(NamedTuple):
    units: int  # segments in all; a bound for a pack
    per_row: int  # segments per row of a dense batch
    offsets: torch.Tensor | None  # [N + 1] cumulative segment counts of a pack


def _segments(c: Call, t: Tensors, SEG: int) -> _Segments:
    if t.cu is None:
        per_row = -(-c.T // SEG)
        return _Segments(c.B * per_row, per_row, None)
    offsets = segment_offsets(t.cu, SEG) if t.segments is None else t.segments[SEGMENTS.index(SEG)]
    return _Segments(c.T // SEG + c.N, 0, offsets)


def _tiles(config: SegmentConfig) -> dict[str, int]:
    """The launch arguments that every kernel takes."""
    return {"SEG": config.SEG, "BT": config.BT, "BE": config.BE, "warps": config.warps, "stages": config.stages, "tma": config.tma}


def _compose(
    s: _Segments, local: SegmentStates, start: torch.Tensor | None, start_z: torch.Tensor | None,
    final: torch.Tensor | None, final_z: torch.Tensor | None, N: int, *, reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    scan = {"per_row": s.per_row, "N": N, "reverse": reverse}
    before = run_scan(local.states, local.decays, start, s.offsets, final, **scan)
    before_z = None if local.z is None else run_scan(local.z, local.decays, start_z, s.offsets, final_z, **scan)
    return before, before_z


def _forward_states(
    config: SegmentConfig, c: Call, o: Options, s: _Segments, out: Outputs | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States before each segment; the final ones go to `out`."""
    rest = _tiles(config)
    local = run_segments(
        c, o, c.k, c.s_k, c.v, c.s_v, c.beta, None, reverse=False, exact=out is None and exact(c, o), units=s.units,
        offsets=s.offsets, **rest,
    )  # fmt: skip
    wanted = out is not None and o.final_state
    state, z = (out.state, out.z if o.normalize else None) if wanted else (None, None)
    return _compose(s, local, c.h0, c.z0, state, z, c.N, reverse=False)


def forward(config: SegmentConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, config.BT, config.tma)
    s = _segments(c, t, config.SEG)
    h0, z0 = _forward_states(config, c, o, s, out)
    run_forward(c, o, out, units=s.units, offsets=s.offsets, h0=h0, z0=z0, **_tiles(config))
    return out


def backward(config: SegmentConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t, o, config.BT, config.tma)
    s = _segments(c, t, config.SEG)
    a = arriving(c, residuals, grads, o, config.tma)
    out = Buffers(c, o, config.BE, states=t.h0 is not None or t.z0 is not None, gates=t.g is not None or t.beta is not None)
    h0, z0 = _forward_states(config, c, o, s, None)
    rest = _tiles(config)
    weight = a.w if o.normalize else None
    local = run_segments(
        c, o, c.q, c.s_q, a.do, a.s_do, weight, a.u, reverse=True, exact=exact(c, o), units=s.units, offsets=s.offsets, **rest
    )
    dS, dz = _compose(s, local, a.dS, a.dz, out.dh0, out.dz0, c.N, reverse=True)
    run_backward(c, o, a.do, a.s_do, a.w, a.u, dS, dz, out, units=s.units, offsets=s.offsets, h0=h0, z0=z0, split=config.split, **rest)
    return leaving(c, residuals, out, wanted)
