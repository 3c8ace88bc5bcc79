"""Equations (14) to (17) as maps with a gradient."""

from __future__ import annotations

import functools

import torch

from ..._shared.pair import Pair, Tensors
from .gated import run_gated
from .gated_backward import run_gated_backward
from .step_backward import run_step_backward
from .step_sizes import run_step_sizes


@functools.lru_cache(maxsize=64)
def steps(softplus: bool, limits: tuple[float, float] | None) -> Pair:
    """(dt, A, bias or None) -> (beta, g)."""

    def forward(dt: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return run_step_sizes(dt, bias, A, softplus, limits)

    def backward(tensors: Tensors, grads: Tensors, wanted: tuple[bool, ...]) -> Tensors:
        dt, A, bias = tensors
        assert dt is not None and A is not None
        dbeta, dg = (dt.new_zeros(dt.shape, dtype=torch.float32) if x is None else x for x in grads)
        ddt, dbias, dA = run_step_backward(dt, bias, A, dbeta, dg, softplus, limits)
        return (
            ddt if wanted[0] else None,
            dA.to(A.dtype) if wanted[1] else None,
            dbias.to(bias.dtype) if bias is not None and wanted[2] else None,
        )

    return Pair("mamba2", forward, backward)


@functools.lru_cache(maxsize=8)
def gate(dtype: torch.dtype) -> Pair:
    """(o, z) -> (y of dtype,)."""

    def forward(o: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (run_gated(o, z, dtype),)

    def backward(tensors: Tensors, grads: Tensors, wanted: tuple[bool, ...]) -> Tensors:
        o, z = tensors
        (dy,) = grads
        assert o is not None and z is not None and dy is not None
        do, dz = run_gated_backward(o, z, dy)
        return do if wanted[0] else None, dz if wanted[1] else None

    return Pair("mamba2", forward, backward)
