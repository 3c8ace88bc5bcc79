"""Small calls of every op, and their results with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fla_dispatch import registry

OPS = ["linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2", "delta", "gated_delta", "kda", "comba", "delta_product"]
LENGTHS = (50, 51, 63, 64, 65, 2, 5, 7, 9, 10, 11, 12, 13, 14, 17, 31, 33, 100, 127, 130)  # no head dim among them


def example(name: str, T: int, *, dtype: torch.dtype = torch.float32, where: str = "cpu", **options: Any) -> tuple[Any, dict[str, Any]]:
    op = registry.get_op(name)
    small = {"B": 3, "T": T, "H": 4, "HV": 4, "K": 16, "V": 24, "G": 4, "N": 16, "P": 24}
    return op.example({s: small[s] for s in op.sizes}, dtype, where, **options)


def leaves(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]


def results(call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs and, where something requires gradients, every gradient."""
    o, state = call(*args, **kwargs)
    found = [o] + ([] if state is None else [state])
    wanted = leaves(args, kwargs)
    if wanted:
        found += torch.autograd.grad(sum(x.float().sin().sum() for x in found), wanted)
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
