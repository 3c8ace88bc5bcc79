"""`recurrent_triton`: token by token with the state in registers, equations (1) to (3) in float32: decode and short lengths.

The sweep's kernels with the token body; exact float32 products, so it is also the accurate choice for float32 inputs.
"""

from __future__ import annotations

from . import sweep_triton
from .configs import RecurrentConfig, SweepConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors


def _sweep(config: RecurrentConfig) -> SweepConfig:
    return SweepConfig(BT=0, BE=config.BE, warps=config.warps, stages=1)


def forward(config: RecurrentConfig, t: Tensors, o: Options) -> Outputs:
    return sweep_triton.forward(_sweep(config), t, o)


def backward(config: RecurrentConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    return sweep_triton.backward(_sweep(config), residuals, grads, o, wanted)
