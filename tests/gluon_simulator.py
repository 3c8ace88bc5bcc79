"""Runs a Gluon kernel as Python on CPU tensors: what it computes, and how its partitions meet.

Partitions are threads of which one runs at a time, by a schedule; a barrier counts arrivals and bytes as the hardware's does, and
when no partition can go on the kernel hangs here as it would there (an AssertionError). Products and copies happen as early as they may
or as late as they must, by the schedule, so what is read too early or overwritten too early comes out wrong. What shared memory
wants before others may see a write is checked: a fence, then a meeting of the partition's warps. Time and registers are not seen.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from gluon_values import Int, Pointer, Tile, least, load, scan, small_product, store, where
from triton.runtime.jit import KernelInterface

from fla_dispatch.kernels._shared import launch as launching


class Schedule(NamedTuple):
    """Who goes on where several may: the first of `order`, or by lot where it is empty; whether copies and products are late."""

    late: bool = False
    order: tuple[str, ...] = ()
    seed: int = 0


class Rows:
    """A tensor descriptor of two dimensions."""

    def __init__(self, base: Pointer, shape: list[Any], strides: list[Any], block_shape: list[int], layout: Any) -> None:
        self.base, self.shape, self.stride, self.block, self.layout = base, [int(x) for x in shape], int(strides[0]), block_shape, layout

    def places(self, row: int, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        r, c = torch.arange(self.block[0])[:, None] + int(row), torch.arange(self.block[1])[None, :] + int(column)
        return int(self.base.at) + r * self.stride + c, (r >= 0) & (r < self.shape[0]) & (c >= 0) & (c < self.shape[1])


# -- what partitions share ---------------------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: a phase completes with `count` arrivals and all bytes that were announced."""

    def __init__(self) -> None:
        self.count = self.arrived = self.bytes = self.completed = 0

    def init(self, count: int) -> None:
        self.count = count

    def expect(self, size: int) -> None:
        self.update(1, size)

    def update(self, arrivals: int, size: int) -> None:
        self.arrived, self.bytes = self.arrived + arrivals, self.bytes + size
        assert self.arrived <= self.count, "more arrivals at a barrier than it counts"
        if self.arrived == self.count and self.bytes == 0:
            self.completed, self.arrived = self.completed + 1, 0

    def passes(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the one that runs has the other."""
        return self.completed & 1 != parity


class Shared:
    """Shared memory."""

    def __init__(self, block: Block, data: torch.Tensor) -> None:
        self.block, self.data, self.dtype, self.shape = block, data, data.dtype, data.shape

    def index(self, i: int) -> Shared:
        return Shared(self.block, self.data[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.block, self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.block, self.data.permute(order))

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.dtype and x.shape == self.shape, "a store into shared memory of another form"
        assert not self.block.now.leaving, "a store into shared memory before the warps have met after store_wait"
        self.data.copy_(x)
        self.block.now.written, self.block.now.fenced = True, False

    def load(self, layout: Any) -> torch.Tensor:
        self.block.now.reading = True
        return self.data.clone().as_subclass(Tile)


class Product:
    """A product in flight."""

    def __init__(self, a: Shared, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None

    def run(self) -> None:
        product = self.a.data.float() @ self.b.data.float()
        before = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = before + product if self.use_acc else product


class _Stopped(BaseException):
    """Another partition has failed."""


class Partition:
    """Warps that run one function, and what they have yet to do before others may rely on them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.go = threading.Semaphore(0)
        self.blocked: Callable[[], bool] | None = None
        self.ended = False
        self.error: BaseException | None = None
        self.written = self.fenced = self.reading = self.leaving = False
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []

    def published(self, what: str) -> None:
        assert not self.written, f"{self.name}: {what} before a fence and a meeting of the warps after a store into shared memory"


class Block:
    """One program under a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.lot = schedule, random.Random(schedule.seed)
        self.now = Partition("before")
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.stopped = False

    def specialize(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(functions) - 1 == len(warps) == len(registers) and all(r % 8 == 0 for r in registers)
        self.now.published("partitions begin")
        partitions = [Partition(f.__name__) for f, _ in functions]
        threads = [threading.Thread(target=self._body, args=(p, *f), daemon=True) for p, f in zip(partitions, functions, strict=True)]
        for thread in threads:
            thread.start()
        try:
            while alive := [p for p in partitions if not p.ended]:
                self._step(alive)
        finally:
            self.stopped = True
            for p, thread in zip(partitions, threads, strict=True):
                p.go.release()
                thread.join()

    def _step(self, alive: list[Partition]) -> None:
        ready = [p for p in alive if p.blocked is None or p.blocked()]
        if ready:
            order = self.schedule.order
            p = min(ready, key=lambda p: order.index(p.name)) if order else self.lot.choice(ready)
            p.blocked, self.now = None, p
            p.go.release()
            self.back.acquire()
            if p.error is not None:
                raise p.error
        elif self.copies:
            self.copies.pop(0)()
        else:
            raise AssertionError(f"{', '.join(p.name for p in alive)} wait for ever")

    def _body(self, p: Partition, function: Any, args: tuple[Any, ...]) -> None:
        p.go.acquire()
        try:
            if not self.stopped:
                function(*args)
                assert not p.products and not p.stores, f"{p.name} ends with work in flight"
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the thread of the test
            p.error = error
        p.ended = True
        self.back.release()

    def pause(self, blocked: Callable[[], bool] | None = None) -> None:
        p = self.now
        if p.name == "before":
            return
        p.blocked = blocked
        self.back.release()
        p.go.acquire()
        if self.stopped:
            raise _Stopped

    def empty(self, dtype: torch.dtype, shape: list[int], layout: Any, value: torch.Tensor | None = None) -> Any:
        if dtype == torch.int64:
            bars = [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=lambda i: bars[int(i)])
        found = Shared(self, torch.full(shape, math.nan, dtype=dtype))
        if value is not None:
            found.store(value)
        return found

    def fence(self) -> None:
        self.now.fenced = True

    def meet(self) -> None:
        p = self.now
        p.reading = p.leaving = False
        p.written = p.written and not p.fenced
        self.pause()

    def arrive(self, bar: Barrier) -> None:
        self.now.published("arrives")
        assert not self.now.reading, f"{self.now.name} arrives before its warps have met after reading"
        bar.update(1, 0)
        self.pause()

    def wait(self, bar: Barrier, phase: int, pred: Any = True) -> None:
        if pred:
            self.pause(lambda: bar.passes(int(phase)))
            assert bar.passes(int(phase))

    def copy_in(self, rows: Rows, at: list[Any], bar: Barrier, target: Shared) -> None:
        def copy() -> None:
            places, inside = rows.places(*at)
            found = rows.base.memory[torch.where(inside, places, 0)]
            target.data.copy_(torch.where(inside, found, torch.zeros((), dtype=found.dtype)))
            bar.update(0, -target.data.numel() * target.data.element_size())

        self._begin(copy, self.copies)

    def copy_out(self, rows: Rows, at: list[Any], source: Shared) -> None:
        def copy() -> None:
            places, inside = rows.places(*at)
            rows.base.memory[places[inside]] = source.data[inside]

        self.now.published("a copy to global memory")
        self._begin(copy, self.now.stores)

    def _begin(self, work: Callable[[], None], later: list[Callable[[], None]]) -> None:
        if self.schedule.late:
            later.append(work)
        else:
            work()

    def store_wait(self, pending: int) -> None:
        stores = self.now.stores
        while len(stores) > pending:
            stores.pop(0)()
        self.now.leaving = True

    def mma(self, a: Shared, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async, "products are asynchronous here"
        self.now.published("a product")
        product = Product(a, b, acc, use_acc)
        self.now.products.append(product)
        if not self.schedule.late:
            product.run()
        self.pause()
        return product

    def mma_wait(self, outstanding: int, deps: list[Product]) -> Any:
        flying = self.now.products
        while len(flying) > outstanding:
            product = flying.pop(0)
            if product.value is None:
                product.run()
        assert not any(x in flying for x in deps), "a product is used before it is waited for"
        self.now.reading = True
        return deps[0].value if len(deps) == 1 else tuple(x.value for x in deps)


# -- kernels -----------------------------------------------------------------------------------------------------------------


def _language(block: Block, program: int) -> dict[str, Any]:
    """What stands for Gluon's names inside one program."""

    def layout(*args: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(args=args)

    def nothing(*args: Any) -> None:
        return None

    nvmma: Any = types.SimpleNamespace(get_default_for=lambda *args: layout(*args))
    gl = types.SimpleNamespace(
        program_id=lambda axis: Int(program if axis == 0 else 0), load=load, store=store, maximum=lambda a, b: Int(max(a, b)),
        minimum=least, cdiv=lambda a, b: Int(-(-a // b)), exp2=torch.exp2, where=where, cast=lambda x, dtype: x,
        associative_scan=scan, expand_dims=lambda x, axis: x.unsqueeze(axis),
        sum=lambda x, axis: x.sum(axis), zeros=lambda shape, dtype, at: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, at: torch.full(shape, float(value), dtype=dtype), arange=lambda a, b, at: torch.arange(a, b),
        convert_layout=lambda x, at: x, static_range=range, allocate_shared_memory=block.empty, warp_specialize=block.specialize,
        float32=torch.float32, int64=torch.int64, int32=torch.int32, NVMMASharedLayout=nvmma, NVMMADistributedLayout=layout,
        SliceLayout=layout, SwizzledSharedLayout=layout, DotOperandLayout=layout,
        PaddedSharedLayout=types.SimpleNamespace(with_identity_for=layout),
    )  # fmt: skip
    bars: Any = types.SimpleNamespace(
        init=Barrier.init, expect=Barrier.expect, arrive=block.arrive, wait=block.wait, MBarrierLayout=nothing
    )
    return {
        "gl": gl, "tl": gl, "mma_v2": small_product,
        "tma": types.SimpleNamespace(make_tensor_descriptor=Rows, store_wait=block.store_wait), "mbarrier": bars,
        "barrier": block.meet, "fence_async_shared": block.fence, "copy_in": block.copy_in, "copy_out": block.copy_out,
        "warpgroup_mma": block.mma, "warpgroup_mma_wait": block.mma_wait,
    }  # fmt: skip


def _namespace(names: dict[str, Any], language: dict[str, Any], made: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A module of kernels with Gluon replaced, in its own functions and those that it imports."""
    if id(names) not in made:
        found = made[id(names)] = dict(names)
        for name, x in names.items():
            if isinstance(x, KernelInterface):  # device functions of Gluon, and of Triton that these call
                found[name] = types.FunctionType(x.fn.__code__, _namespace(x.fn.__globals__, language, made))
            elif type(x).__name__ == "constexpr":
                found[name] = x.value
        found |= language
    return made[id(names)]


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], schedule: Schedule) -> None:
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
        language = _language(Block(schedule), program[0])
        types.FunctionType(kernel.fn.__code__, _namespace(kernel.fn.__globals__, language, {}))(**values)


@contextmanager
def simulated(schedule: Schedule) -> Iterator[list[str]]:
    """Launches of Gluon kernels run here, others as ever; the list gets the names of what was simulated."""
    seen: list[str] = []
    before = launching._run

    def instead(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> None:
        if not (hasattr(kernel, "is_gluon") and kernel.is_gluon()):
            return before(kernel, grid, args, constants, warps, stages)
        seen.append(kernel.__name__)
        run(kernel, grid, args, constants, schedule)
        return None

    launching._run = instead
    try:
        yield seen
    finally:
        launching._run = before
