"""What torch variants share: computing outside autocast, and group expansion of query heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a torch variant's `forward(config, tensors, ...)` with autocast off: its accumulations are float32 on purpose."""

    @functools.wraps(function)
    def run(config: Any, first: Any, *rest: Any) -> Any:
        tensors = getattr(first, "tensors", first)
        kind = tensors[0].device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(config, first, *rest)
        with torch.autocast(kind, enabled=False):
            return function(config, first, *rest)

    return run


def expand_heads(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., H, D] -> [..., H * group, D]: value head j uses query head j // group."""
    return x if group == 1 else x.repeat_interleave(group, dim=-2)


def sum_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., HV, D] -> [..., HV / group, D]: the sum over each query head's value heads, in x's own (float32) precision."""
    return x if group == 1 else x.unflatten(-2, (-1, group)).sum(-2)
