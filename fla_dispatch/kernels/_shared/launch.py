"""The one place that launches a Triton kernel: directly with its config, never through an autotuner.

Inside `record()` launches are written down instead of run, with CPU or meta tensors and no GPU: that is how kernels are
compiled ahead of time for other devices, with exactly the arguments that a call would pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One kernel launch: positional arguments (tensors, numbers, None), compile-time constants, warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> None:
    """Run `kernel` on the device of its first argument; an empty grid runs nothing."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, warps, stages))
        return
    if 0 in grid:
        return
    device = args[0].device
    # floating-point fusion is set on purpose: compilers change its default between releases
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    else:
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them (one thread at a time)."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def tile(n: int) -> int:
    """The padded width of a dimension: a power of two, at least 16 (the smallest matrix-unit operand)."""
    return max(16, 1 << (n - 1).bit_length())


def token_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, T, H, D] as rows of one token stride: (tensor, stride of a token in elements).

    Token t of row b is at (b * T + t) * stride, heads adjacent, last dim contiguous: true of contiguous tensors and of
    slices of a fused projection. Anything else is copied.
    """
    B, T, H, D = x.shape
    sb, st, sh, sd = x.stride()
    if sd == 1 and (sh == D or H == 1):
        if T == 1 and B > 1:
            return x, sb
        if B == 1 or sb == T * st:
            return x, st
    return x.contiguous(), H * D
