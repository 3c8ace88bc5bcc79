"""The one place that launches a Triton kernel: directly with its config, never through an autotuner.

Inside `record()` launches are written down instead of run, with CPU or meta tensors and no GPU: that is how kernels are
compiled ahead of time for other devices, with exactly the arguments that a call would pass.
"""

from __future__ import annotations

import contextlib
import contextvars
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
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, grid, args, constants, warps, stages)
    else:
        _run(kernel, grid, args, constants, warps, stages)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> None:
    # floating-point fusion is set on purpose: compilers change its default between releases
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if constants.get("TMA"):  # descriptors made by a kernel live in scratch memory, whose allocator is a context variable
        contextvars.copy_context().run(_with_scratch, kernel[grid], args, constants, options)
    else:
        kernel[grid](*args, **constants, **options)


def _with_scratch(run: Any, args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]) -> None:
    import triton

    triton.set_allocator(_scratch)
    run(*args, **constants, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Scratch of one launch, in the order of the current stream: it may be reused as soon as the kernel is launched."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


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


def token_rows(x: torch.Tensor, aligned: bool = False) -> tuple[torch.Tensor, int]:
    """x [B, T, H, D] as rows of one token stride: (tensor, stride of a token in elements).

    Token t of row b is at (b * T + t) * stride, heads adjacent, last dim contiguous: true of contiguous tensors and of
    slices of a fused projection. Anything else is copied. aligned: so is what does not begin each token at a multiple of 16 bytes.
    """
    B, T, H, D = x.shape
    sb, st, sh, sd = x.stride()
    if sd == 1 and (sh == D or H == 1):
        stride = sb if T == 1 and B > 1 else st
        if (B == 1 or sb == T * stride) and not (aligned and (x.data_ptr() | stride * x.element_size()) % 16):
            return x, stride
    return x.clone(memory_format=torch.contiguous_format) if x.is_contiguous() else x.contiguous(), H * D
