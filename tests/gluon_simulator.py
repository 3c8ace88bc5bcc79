"""Runs a Gluon kernel as Python on CPU tensors: what it computes, not how its threads meet.

Every copy and product is done where it stands, so a missing wait is not seen here; indices, masks, decays and signs are.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fla_dispatch.kernels._shared import launch as launching


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


class Pointer:
    """A position in a tensor's memory, or a block of them."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at - offset)


def _load(p: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    at = torch.as_tensor(p.at)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    assert bool(((at >= 0) & (at < p.memory.numel()) | ~inside).all()), "a load outside of its tensor"
    found = p.memory[torch.where(inside, at, 0)]
    return _scalar(torch.where(inside, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(p: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    at = torch.as_tensor(p.at)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    assert bool(((at >= 0) & (at < p.memory.numel()) | ~inside).all()), "a store outside of its tensor"
    p.memory[at[inside]] = value.expand_as(at)[inside].to(p.memory.dtype)


class Rows:
    """A tensor descriptor of two dimensions."""

    def __init__(self, base: Pointer, shape: list[Any], strides: list[Any], block_shape: list[int], layout: Any) -> None:
        self.base, self.shape, self.stride, self.block, self.layout = base, [int(x) for x in shape], int(strides[0]), block_shape, layout

    def places(self, row: int, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        r, c = torch.arange(self.block[0])[:, None] + int(row), torch.arange(self.block[1])[None, :] + int(column)
        return int(self.base.at) + r * self.stride + c, (r >= 0) & (r < self.shape[0]) & (c >= 0) & (c < self.shape[1])


class Shared:
    """Shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.dtype and x.shape == self.shape, "a store into shared memory of another form"
        self.data.copy_(x)

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()


def _copy_in(rows: Rows, at: list[Any], bar: Any, target: Shared, pred: Any = True) -> None:
    if pred:
        places, inside = rows.places(*at)
        found = rows.base.memory[torch.where(inside, places, 0)]
        target.store(torch.where(inside, found, torch.zeros((), dtype=found.dtype)))


def _copy_out(rows: Rows, at: list[Any], source: Shared) -> None:
    places, inside = rows.places(*at)
    rows.base.memory[places[inside]] = source.data[inside]


def _mma(a: Shared, b: Shared, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> torch.Tensor:
    product = a.data.float() @ b.data.float()
    return acc + product if use_acc else product


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _language(program: int, warps: int) -> types.SimpleNamespace:
    """What stands for `gl` inside one program."""

    def empty(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        data = torch.zeros(shape, dtype=dtype)
        return Shared(data.fill_(math.nan) if dtype.is_floating_point else data)

    def layout(*args: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(args=args)

    nvmma: Any = types.SimpleNamespace(get_default_for=lambda *args: layout(*args))
    return types.SimpleNamespace(
        constexpr=lambda x: x, program_id=lambda axis: Int(program if axis == 0 else 0), num_warps=lambda: warps, load=_load, store=_store,
        maximum=lambda a, b: Int(max(a, b)), minimum=lambda a, b: Int(min(a, b)), cdiv=lambda a, b: Int(-(-a // b)), exp2=torch.exp2,
        where=torch.where, sum=lambda x, axis: x.sum(axis), zeros=lambda shape, dtype, at: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, at: torch.full(shape, float(value), dtype=dtype), arange=lambda a, b, at: torch.arange(a, b),
        convert_layout=lambda x, at: x, static_range=range, allocate_shared_memory=empty, float32=torch.float32, int64=torch.int64,
        int32=torch.int32, bfloat16=torch.bfloat16, SliceLayout=layout, NVMMADistributedLayout=layout, NVMMASharedLayout=nvmma,
    )  # fmt: skip


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int) -> None:
    """All programs of a grid, one after the other. Tensors are contiguous, or rows of a larger one: their memory is taken from there."""
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False)) | constants
    for name, x in values.items():
        if isinstance(x, torch.Tensor):
            memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,), x.storage_offset())
            values[name] = Pointer(memory)
        elif isinstance(x, int) and not isinstance(x, bool) and name not in constants:
            values[name] = Int(x)
    for program in itertools.product(*map(range, grid)):
        names_here = _globals(kernel, program[0], warps)
        types.FunctionType(kernel.fn.__code__, names_here)(**values)


def _globals(kernel: Any, program: int, warps: int) -> dict[str, Any]:
    """The kernel's module with Gluon replaced, its device functions included."""
    found = dict(kernel.fn.__globals__)
    for name, x in found.items():
        if hasattr(x, "is_gluon") and x.is_gluon():
            found[name] = types.FunctionType(x.fn.__code__, found)
    tma = types.SimpleNamespace(make_tensor_descriptor=Rows, store_wait=_nothing)
    mbarrier = types.SimpleNamespace(init=_nothing, expect=_nothing, wait=_nothing, MBarrierLayout=_nothing)
    found |= {"gl": _language(program, warps), "tma": tma, "mbarrier": mbarrier, "barrier": _nothing, "fence_async_shared": _nothing}
    found |= {"copy_in": _copy_in, "copy_out": _copy_out, "warpgroup_mma": _mma, "warpgroup_mma_wait": lambda n, deps: deps[0]}
    return {**found, "LOG2E": 1 / math.log(2)}


@contextmanager
def simulated() -> Iterator[list[str]]:
    """Launches of Gluon kernels run here, others as ever; the list gets the names of what was simulated."""
    seen: list[str] = []
    before = launching._run

    def instead(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> None:
        if not (hasattr(kernel, "is_gluon") and kernel.is_gluon()):
            return before(kernel, grid, args, constants, warps, stages)
        seen.append(kernel.__name__)
        run(kernel, grid, args, constants, warps)
        return None

    launching._run = instead
    try:
        yield seen
    finally:
        launching._run = before
