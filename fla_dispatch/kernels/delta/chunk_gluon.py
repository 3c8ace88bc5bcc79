"""`chunk_gluon`: `chunk_triton` whose inverses are made by a kernel for Hopper."""

from __future__ import annotations

from .chunk_triton import backward_by, forward_by
from .chunks.gluon_inverse import run_inverse
from .configs import ChunkConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors


def forward(config: ChunkConfig, t: Tensors, o: Options) -> Outputs:
    return forward_by(run_inverse, config, t, o)


def backward(config: ChunkConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    return backward_by(run_inverse, config, residuals, grads, o, wanted)
