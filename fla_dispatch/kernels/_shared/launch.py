"""The one place that launches a Triton kernel: directly with its config, never through an autotuner.

Inside `record()` launches are written down instead of run, with CPU or meta tensors and no GPU: that is how kernels are
compiled ahead of time for other devices, with exactly the arguments that a call would pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
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


class _Layout(NamedTuple):
    """Positions of the arguments of a kernel that are tensors, integers that it is specialised on, and other integers."""

    tensors: tuple[int, ...]
    special: tuple[int, ...]
    free: tuple[int, ...]


#: Kernels by identity, each settled once: Triton would compute the name of a kernel to hash it.
_kernels: dict[int, Any] = {}


def settle(kernel: Any) -> int:
    """The kernel's number here. Triton names its callees before the kernel, so that its binary has one name on disk in every process.

    That name covers the constants that callees read only where the callees were named earlier: left alone, it depends on which
    kernel a process runs first, and another process compiles anew what is on disk.
    """
    number = id(kernel)
    if number not in _kernels:
        _kernels[number] = kernel
        if hasattr(kernel, "used_global_vals"):  # the interpreter's functions have none, and are not compiled
            for name in kernel.fn.__code__.co_names:
                callee = kernel.fn.__globals__.get(name)
                if hasattr(callee, "used_global_vals"):
                    settle(callee)
            kernel.cache_key  # noqa: B018  named when read
    return number


@functools.cache
def _layout(number: int, types: tuple[type, ...]) -> _Layout:
    kernel = _kernels[number]
    ints = [i for i, t in enumerate(types) if issubclass(t, int)]
    free = {i for i in ints if kernel.params[i].do_not_specialize}
    tensors = tuple(i for i, t in enumerate(types) if issubclass(t, torch.Tensor))
    return _Layout(tensors, tuple(i for i in ints if i not in free), tuple(sorted(free)))


#: Compiled kernels by what a launch is specialised on, with the order of their constants.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def _key(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> tuple[Any, ...] | None:
    """What names one compiled kernel for the usual arguments; None where Triton's own lookup must decide.

    Usual: pointers, and integers that are specialised on, are multiples of 16 (none is 1), and no integer needs 64 bits.
    """
    if not hasattr(kernel, "params"):  # the interpreter compiles nothing
        return None
    number, types = settle(kernel), tuple(map(type, args))
    at = _layout(number, types)
    bits = 0
    dtypes = []
    for i in at.tensors:
        x = args[i]
        bits |= x.data_ptr()
        dtypes.append(x.dtype)
    for i in at.special:
        bits |= args[i]
    wide = 0
    for i in at.special + at.free:
        wide |= args[i]
    if bits & 15 or wide >> 31:
        return None
    return (number, args[0].device, warps, stages, types, *dtypes, *constants, *constants.values())


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> None:
    """Launch, by way of the compiled kernel where this one has run before: the compiler's own lookup takes longer than a launch."""
    key = _key(kernel, args, constants, warps, stages)
    found = None if key is None else _compiled.get(key)
    if found is not None:
        compiled, names = found
        _call(compiled[(*grid, 1, 1)[:3]], (*args, *[constants[name] for name in names]), {}, constants)
        return
    # floating-point fusion is set on purpose: compilers change its default between releases
    compiled = _call(kernel[grid], args, {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}, constants)
    if key is not None and hasattr(compiled, "packed_metadata"):
        _compiled[key] = compiled, tuple(p.name for p in kernel.params[len(args) :])


def _call(run: Any, args: tuple[Any, ...], options: dict[str, Any], constants: dict[str, Any]) -> Any:
    if constants.get("TMA"):  # descriptors made by a kernel live in scratch memory, whose allocator is a context variable
        return contextvars.copy_context().run(_with_scratch, run, args, options)
    return run(*args, **options)


def _with_scratch(run: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    import triton

    triton.set_allocator(_scratch)
    return run(*args, **options)


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
