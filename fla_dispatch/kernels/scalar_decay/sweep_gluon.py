"""`sweep_gluon`: the sweep of `sweep_triton` for Hopper, written against its matrix units (equations (4) to (7)).

Forward and each of dq, dk, dv are one launch of one kernel with permuted arguments.
"""

from __future__ import annotations

from .configs import GluonConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, empty_outputs
from .sweep.backward import Buffers
from .sweep.gluon_sweep import CHUNK, COLUMNS, Normaliser, run_sweep
from .sweep.gradients import Arriving, arriving, leaving
from .sweep.host import DECAYS, Call, exact, prepare


def _decay(o: Options) -> int:
    return DECAYS.get(o.decay, 1)


def forward(config: GluonConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, CHUNK, tma=True)
    z_out = out.z if o.final_state and o.normalize else None
    run_sweep(
        c, c.q, c.s_q, c.k, c.s_k, c.v, c.s_v, out.o, shared=3, scale=o.scale, decay=_decay(o), reverse=False, w=c.beta, W=2, skip=c.skip,
        s_in=c.h0, s_out=out.state if o.final_state else None, transposed=False, exact=False, with_rows=None, dot=None, dot_c=None,
        normaliser=Normaliser(1, None, c.z0, z_out, out.weight) if o.normalize else Normaliser(), **config._asdict(),
    )  # fmt: skip
    return out


def backward(config: GluonConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = prepare(t, o, CHUNK, tma=True)
    a = arriving(c, residuals, grads, o, tma=True)
    out = Buffers(c, o, COLUMNS, states=t.h0 is not None or t.z0 is not None, gates=t.g is not None or t.beta is not None)
    _gradients(config, c, o, a, out)
    return leaving(c, residuals, out, wanted)


def _gradients(config: GluonConfig, c: Call, o: Options, a: Arriving, out: Buffers) -> None:
    """dq = f(do, v, k), dk = f'(v, do, q), dv = f'(k, q, do) of equation (5); dq and dv carry row sums for (6).

    With normalize, r_t weighs do_t wherever it stands; do in dq and dk has u_t, the gradient of the normaliser, as one more column.
    """
    same = {**config._asdict(), "scale": o.scale, "decay": _decay(o), "w": a.w}
    sums = exact(c, o)
    do_rows, do_columns = (1, 2) if o.normalize else (2, 1)
    q, v = (None if out.dot_q is None else (x, stride) for x, stride in ((c.q, c.s_q), (c.v, c.s_v)))
    run_sweep(
        c, a.do, a.s_do, c.v, c.s_v, c.k, c.s_k, out.dq, shared=12, reverse=False, W=do_rows, skip=None, s_in=c.h0, s_out=None,
        transposed=True, exact=sums, with_rows=q, dot=out.dot_q, dot_c=None,
        normaliser=Normaliser(2, a.u, c.z0) if o.normalize else Normaliser(), **same,
    )  # fmt: skip
    run_sweep(
        c, c.v, c.s_v, a.do, a.s_do, c.q, c.s_q, out.dk, shared=4, reverse=True, W=do_columns, skip=None, s_in=a.dS, s_out=None,
        transposed=True, exact=False, with_rows=None, dot=None, dot_c=None,
        normaliser=Normaliser(3, a.u, a.dz, out.dz0) if o.normalize else Normaliser(), **same,
    )  # fmt: skip
    run_sweep(
        c, c.k, c.s_k, c.q, c.s_q, a.do, a.s_do, out.dv, shared=3, reverse=True, W=do_columns, skip=c.skip, s_in=a.dS, s_out=out.dh0,
        transposed=False, exact=sums, with_rows=v, dot=out.dot_v, dot_c=out.dot_skip, normaliser=Normaliser(), **same,
    )  # fmt: skip
