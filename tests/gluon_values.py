"""What the values of a Gluon kernel are when it runs as Python (`gluon_simulator`): numbers, tensors, pointers."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch


class Int(int):
    """A scalar of a kernel."""

    def to(self, dtype: Any) -> Any:
        return torch.tensor(float(self)) if dtype.is_floating_point else self


def _wrapped(name: str) -> Any:
    def method(self: Int, other: Any) -> Any:
        found = getattr(int, name)(self, other) if isinstance(other, int) else NotImplemented
        return Int(found) if type(found) is int else found

    return method


for _name in ("add", "sub", "mul", "mod", "floordiv", "and", "radd", "rsub", "rmul"):
    setattr(Int, f"__{_name}__", _wrapped(f"__{_name}__"))


def _scalar(x: Any) -> Any:
    return Int(x) if isinstance(x, torch.Tensor) and x.dim() == 0 and not x.is_floating_point() else x


class Tile(torch.Tensor):
    """A tensor of a kernel, whose bits may be taken for those of another dtype."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)


def least(a: Any, b: Any) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b)) if isinstance(a, torch.Tensor) else Int(min(a, b))


def where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else a if condition else b


def scan(x: torch.Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> torch.Tensor:
    rows = list(x.unbind(axis))
    return torch.stack(list(itertools.accumulate(rows, combine)), axis)


class Pointer:
    """A position in a tensor's memory, or a block of them."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at - offset)


def load(p: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    at = torch.as_tensor(p.at)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    assert bool(((at >= 0) & (at < p.memory.numel()) | ~inside).all()), "a load outside of its tensor"
    found = p.memory[torch.where(inside, at, 0)]
    return _scalar(torch.where(inside, found, torch.as_tensor(other, dtype=found.dtype)))


def store(p: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    at = torch.as_tensor(p.at)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    assert bool(((at >= 0) & (at < p.memory.numel()) | ~inside).all()), "a store outside of its tensor"
    p.memory[at[inside]] = value.expand_as(at)[inside].to(p.memory.dtype)


def small_product(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """Of operands in registers, which the matrix units read as tf32: without their last 13 bits."""
    a, b = ((x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b))
    return acc + a @ b
