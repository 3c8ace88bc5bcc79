"""A planted Triton variant: its one launch is of a kernel whose compilation misbehaves as the config says."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

from fla_dispatch import registry
from fla_dispatch.kernels._shared.launch import launch
from fla_dispatch.registry import Variant
from fla_dispatch.requirements import Gpu

NAME = "planted_triton"


class CompilationError(Exception):
    """Named like Triton's."""


class _Metadata(NamedTuple):
    shared: int


class _Compiled(NamedTuple):
    metadata: _Metadata


class Kernel:
    """What a jitted function looks like to `launch` and to the compiler module."""

    def __init__(self, kind: str) -> None:
        self.kind = self.__name__ = kind
        self.params: tuple[Any, ...] = ()
        self.arg_names: tuple[str, ...] = ()

    def warmup(self, *args: Any, grid: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool) -> _Compiled:
        if self.kind == "hang":
            time.sleep(1000)
        if self.kind == "abort":
            os.abort()
        if self.kind == "compile_error":
            raise CompilationError("planted")
        return _Compiled(_Metadata(1 << 20 if self.kind == "huge" else 1024))


def forward(config: Any, tensors: Any, options: Any) -> Any:
    launch(Kernel(config.kind), (1,), (), {}, 4, 1)


def backward(config: Any, residuals: Any, grads: Any, options: Any, wanted: tuple[bool, ...]) -> Any:
    launch(Kernel(config.kind), (1,), (), {}, 4, 1)


VARIANT = Variant(NAME, __name__, (Gpu(nvidia_only=("sm1",)),), lambda problem, config, direction: 1.0)


def plant() -> None:
    if all(v.name != NAME for v in registry.get_recurrence("scalar_decay").variants):
        registry.register_variant("scalar_decay", VARIANT)


def withdraw() -> None:
    registry.unregister_variant("scalar_decay", NAME)


plant()
