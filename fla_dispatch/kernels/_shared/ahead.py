"""Ahead-of-time compilation of recorded launches for a device that need not be here, with the resources they take.

`compile_launch(launch, arch)` compiles exactly what a call would launch: the signature comes from the launch's own arguments.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Compiled(NamedTuple):
    """Resources of one compiled kernel: shared memory in bytes, and the binary."""

    name: str
    arch: str
    shared: int
    binary: bytes
    metadata: Any


def target(arch: str) -> GPUTarget:
    """The compiler's target for `sm90`, `gfx942`, ..."""
    return GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)


def source(launch: Launch) -> ASTSource:
    """The kernel with the argument types, constants and alignments that this launch has on a GPU."""
    fn = launch.kernel
    names = [p.name for p in fn.params]
    free = {p.name for p in fn.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name not in free and value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif name not in free and value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    for name in names[len(launch.args) :]:
        signature[name], constants[name] = "constexpr", launch.constants[name]
    return _source_class(fn)(fn, signature, constants, aligned)


def _source_class(fn: Any) -> Any:
    if not fn.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def launch_key(launch: Launch) -> tuple[Any, ...]:
    """Equal keys compile to equal kernels."""
    s = source(launch)
    return (launch.kernel.__module__, launch.kernel.__name__, str(s.signature), str(s.constants), str(s.attrs), launch.warps, launch.stages)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile for `arch`; raises what the compiler raises."""
    return _compile(_Keyed(launch), arch)


class _Keyed:
    """A launch, hashed by what it compiles to."""

    def __init__(self, launch: Launch):
        self.launch, self.key = launch, launch_key(launch)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@functools.cache
def _compile(keyed: _Keyed, arch: str) -> Compiled:
    launch = keyed.launch
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source(launch), target=target(arch), options=options)
    code = kernel.asm.get("cubin") or kernel.asm.get("hsaco")
    return Compiled(launch.kernel.__name__, arch, kernel.metadata.shared, code, kernel.metadata)
