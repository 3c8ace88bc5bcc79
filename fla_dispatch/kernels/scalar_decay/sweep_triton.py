"""`sweep_triton`: one launch forward and one backward, the state of a whole sequence in registers (equations (4) to (7)).

Nothing but q, k, v is read and nothing but o written; backward reads q, k, v, do and writes dq, dk, dv.
"""

from __future__ import annotations

from .configs import SweepConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .sweep.backward import Buffers, run_backward
from .sweep.forward import run_forward
from .sweep.gradients import arriving, leaving
from .sweep.host import prepare


def forward(config: SweepConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, config.BT, config.tma)
    run_forward(c, o, out, BT=config.BT, BE=config.BE, warps=config.warps, stages=config.stages, tma=config.tma)
    return out


def backward(config: SweepConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t, o, config.BT, config.tma)
    a = arriving(c, residuals, grads, o, config.tma)
    out = Buffers(c, o, config.BE, states=t.h0 is not None or t.z0 is not None, gates=t.g is not None or t.beta is not None)
    run_backward(c, o, a.do, a.s_do, a.w, a.u, a.dS, a.dz, out, **config._asdict())
    return leaving(c, residuals, out, wanted)
