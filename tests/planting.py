"""Variants that tests plant into scalar_decay for the length of a block."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from fla_dispatch import registry
from fla_dispatch.kernels.scalar_decay import chunk_torch
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.registry import Variant

PLANTED = "fla_dispatch_planted_variant"


def qkv(T: int = 20, *, grad: bool = False, dtype: torch.dtype = torch.float32, K: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, T, 2, K, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def planted_module(calls: list[str]) -> types.ModuleType:
    """A variant that computes as chunk_torch does and keeps a record of its calls."""
    module = types.ModuleType(PLANTED)

    def forward(config: Any, tensors: Any, options: Any) -> Any:
        calls.append("forward")
        return chunk_torch.forward(TorchConfig(16), tensors, options)

    def backward(config: Any, residuals: Any, grads: Any, options: Any, wanted: Any) -> Any:
        calls.append("backward")
        return chunk_torch.backward(TorchConfig(16), residuals, grads, options, wanted)

    module.forward, module.backward = forward, backward
    return module


@contextlib.contextmanager
def planted(variant: Variant, module: types.ModuleType | None = None) -> Iterator[None]:
    """A variant of scalar_decay for the length of a block; without a module its import fails."""
    registry._loaded.pop(variant.module, None)
    if module is not None:
        sys.modules[variant.module] = module
    registry.register_variant("scalar_decay", variant)
    try:
        yield
    finally:
        registry.unregister_variant("scalar_decay", variant.name)
        registry._loaded.pop(variant.module, None)
        sys.modules.pop(variant.module, None)


def cheap(name: str = "planted_torch", *requirements: Any, seconds: float = 1e-9, module: str = PLANTED) -> Variant:
    return Variant(name, module, requirements, lambda problem, config, direction: seconds)
