"""A function of a variant as a tape: the buffers that it makes and the kernels that it launches, for tensors of one layout.

A variant's Python works out the same strides, constants and grids at every call of one layout. `watched` runs it once and notes what it
made and launched; the tape does just that again, with the addresses of that call. A function that does anything else on a device (an
operator of torch, a kernel past `launch`) has no tape, and runs as it is written.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import launch as launching

_aten = torch.ops.aten
_MAKES = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_address = torch.Tensor.data_ptr
_low_bits = (15).__and__
_new = tuple.__new__


#: The most layouts that tapes are kept for, where everything else is equal.
LAYOUTS = 8


def layout_of(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether other tensors are like these, as one C call: of plain type and all different, of these shapes, strides, dtypes and devices,
    requiring gradients as these do, and under no other mode, transform, autocast or inference mode than now."""
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


class Queue(NamedTuple):
    """How a kind of device is asked for its current device, for whether a graph is being captured, and for a device's current stream."""

    device: Callable[[], int | None]
    capturing: Callable[[], bool]
    stream: Callable[[int | None], int]


#: The kinds of devices whose launches may be taped.
QUEUES: dict[str, Queue] = {}
if hasattr(torch._C, "_cuda_getCurrentRawStream"):
    QUEUES["cuda"] = Queue(torch._C._cuda_getDevice, torch._C._cuda_isCurrentStreamCapturing, torch._C._cuda_getCurrentRawStream)


def _hooks() -> Any:
    """Where Triton keeps what it calls around every launch."""
    import triton

    return triton.knobs.runtime


class Buffer(NamedTuple):
    """A tensor that a function makes; like: the given tensor whose layout it has, or -1."""

    like: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Step(NamedTuple):
    """One launch, the buffers that are made before it, and those that nothing after it reads.

    Addresses stand in the order (given tensors, then buffers and views as they come); shifted: (of which address, bytes) for each view.
    The launcher takes grid, stream, head (function, metadata, and three hooks that are absent) and the arguments: up to the last tensor
    those that `pick` takes out of the addresses followed by `rest`, then `tail`.
    """

    made: tuple[Buffer, ...]
    shifted: tuple[tuple[int, int], ...]
    run: Callable[..., Any]
    grid: tuple[int, ...]
    head: tuple[Any, ...]
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    rest: tuple[Any, ...]
    tail: tuple[Any, ...]
    done: tuple[int, ...]


class Tape:
    """What a function did, to be done again for other tensors of the same layout."""

    __slots__ = ("_aligned", "_device", "_hooks", "_index", "_kept", "_kind", "_out", "_queue", "_standing", "_steps")

    def __init__(
        self, device: torch.device, aligned: list[int], steps: tuple[Step, ...], kind: type[Any], results: tuple[Any, ...], kept: list[Any]
    ) -> None:
        self._aligned = operator.itemgetter(*aligned) if len(aligned) > 1 else lambda addresses: tuple(addresses[i] for i in aligned)
        self._queue, self._device, self._index, self._hooks = QUEUES[device.type], device, device.index, _hooks()
        self._steps, self._kind, self._kept = steps, kind, kept
        self._standing = tuple(x for x in results if type(x) is not int)  # None, and what stands for outputs that were not asked for
        buffers, standing = sum(len(step.made) for step in steps), iter(range(len(self._standing)))
        out = [x if type(x) is int else buffers + next(standing) for x in results]
        self._out = operator.itemgetter(*out) if len(out) > 1 else operator.itemgetter(slice(out[0], out[0] + 1))

    def ready(self) -> bool:
        """Whether launches now are like those that were watched: on the current device, into no graph, with nobody looking on."""
        queue, hooks = self._queue, self._hooks
        return (
            queue.device() == self._index
            and not queue.capturing()
            and launching._recorded is None
            and not getattr(hooks.launch_enter_hook, "calls", hooks.launch_enter_hook)  # a chain of hooks, a hook or None
            and not getattr(hooks.launch_exit_hook, "calls", hooks.launch_exit_hook)
        )

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """The function's outputs for these tensors; None, and nothing done, where one that began at a multiple of 16 bytes does not."""
        addresses = [*map(_address, given)]
        if any(map(_low_bits, self._aligned(addresses))):
            return None
        stream = self._queue.stream(self._index)
        buffers: list[Any] = []
        x: Any
        for made, shifted, run, grid, head, pick, rest, tail, done in self._steps:
            for like, shape, stride, dtype in made:
                if like < 0:
                    x = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
                else:
                    x = torch.empty_like(given[like])
                buffers.append(x)
                addresses.append(x.data_ptr())
            x = None
            for of, shift in shifted:
                addresses.append(addresses[of] + shift)
            run(*grid, stream, *head, *pick((*addresses, *rest)), *tail)
            for i in done:
                buffers[i] = None
        return _new(self._kind, self._out((*buffers, *self._standing)))


class _Source(NamedTuple):
    """What the address of a tensor follows from: a given tensor or a buffer, and bytes from its begin."""

    buffer: bool
    i: int
    shift: int = 0


class _Launched(NamedTuple):
    """A launch as it was seen, with a _Source for each tensor of the call; after: the number of buffers that there were."""

    after: int
    run: Callable[..., Any]
    grid: tuple[int, ...]
    head: tuple[Any, ...]
    args: tuple[Any, ...]


class Watch(TorchDispatchMode):
    """Notes what a function makes while it is entered, and launches that come to `append`. fault: why there can be no tape, or ''."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.fault, self._thread = "", threading.get_ident()
        self._given, self._device = given, given[0].device
        self._by_id = {id(x): i for i, x in enumerate(given)}
        self._by_storage: dict[int, list[tuple[_Source, int]]] = {}
        for i, x in enumerate(given):
            self._by_storage.setdefault(x.untyped_storage()._cdata, []).append((_Source(False, i), x.data_ptr()))
        self._buffers: list[Buffer] = []
        self._launches: list[_Launched] = []
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in _MAKES:
            self._make(found)
        elif not func.is_view:
            self._no(str(func))
        return found

    def _no(self, why: str) -> None:
        self.fault = self.fault or why

    def _make(self, x: torch.Tensor) -> None:
        if x.dim() == 1 and x.shape[0] == 0:  # stands for an output that was not asked for
            return
        if x.device != self._device or x.layout is not torch.strided:
            self._no(f"a buffer on {x.device}")
        # the storage of a buffer that has ended may have been where this one's is
        self._by_storage[x.untyped_storage()._cdata] = [(_Source(True, len(self._buffers)), x.data_ptr())]
        layout = (tuple(x.shape), x.stride(), x.dtype)
        whole = x.is_contiguous()
        like = next((i for i, y in enumerate(self._given) if whole and y.is_contiguous() and (y.shape, y.stride(), y.dtype) == layout), -1)
        self._buffers.append(Buffer(like, *layout))

    def append(self, one: launching.Launch) -> None:
        """Runs a launch that `launch` writes down here, and notes it if this thread is watched."""
        if 0 in one.grid:
            return
        with torch.cuda.device_of(one.args[0]), _disable_current_modes():  # scratch memory is no buffer of the function's
            compiled = _run(one)
        if threading.get_ident() != self._thread:
            return
        if not hasattr(compiled, "function"):
            self._no("a kernel that is interpreted")
            return
        args = (*one.args, *[one.constants[p.name] for p in one.kernel.params[len(one.args) :]])
        run = _with_scratch(compiled.run) if one.constants.get("TMA") else compiled.run
        head = (compiled.function, compiled.packed_metadata, None, None, None)
        if not one.constants.get("TMA"):
            run, head = _direct(run, head)
        self._launches.append(_Launched(len(self._buffers), run, (*one.grid, 1, 1)[:3], head, tuple(map(self._source, args))))

    def _source(self, x: Any) -> Any:
        """What stands for an argument: a _Source for a tensor of the call, an address for one that was there before, else itself."""
        if not isinstance(x, torch.Tensor):
            if x is not None and not isinstance(x, (int, float, str)):
                self._no(f"an argument of type {type(x).__name__}")
            return x
        if id(x) in self._by_id:
            return _Source(False, self._by_id[id(x)])
        found = self._by_storage.get(x.untyped_storage()._cdata)
        if found is None:
            self._kept.append(x)  # made once and kept by the variant, as decays of heads are
            return x.data_ptr()
        if len(found) > 1:
            self._no("a view of one of several tensors that share memory")
        source, begin = found[0]
        return source._replace(shift=x.data_ptr() - begin)

    def _results(self, result: Any) -> tuple[Any, ...]:
        """Outputs as numbers of buffers; None, and what stands for outputs that were not asked for, as they are."""
        found: list[Any] = []
        for x in result:
            if x is None or (x.dim() == 1 and x.shape[0] == 0):
                found.append(x)
                continue
            source = self._source(x)
            layout = (tuple(x.shape), x.stride(), x.dtype)
            if not isinstance(source, _Source) or not source.buffer or source.shift or self._buffers[source.i][1:] != layout:
                self._no("an output that is no buffer")
                return ()
            found.append(source.i)
        return tuple(found)

    def tape(self, result: Any) -> Tape | None:
        """The tape of what was watched, whose outputs these are; None where there can be none."""
        results = self._results(result)
        if not self._launches or self._launches[-1].after != len(self._buffers):
            self._no("no launch, or buffers after the last")
        aligned = [i for i, x in enumerate(self._given) if x.data_ptr() % 16 == 0]
        views = {x.i for one in self._launches for x in one.args if isinstance(x, _Source) and x.shift and not x.buffer}
        if not views <= {*aligned}:
            self._no("a view of a tensor that begins at no multiple of 16 bytes")
        if self.fault:
            return None
        last = {x.i: n for n, one in enumerate(self._launches) for x in one.args if isinstance(x, _Source) and x.buffer}
        kept = {x for x in results if type(x) is int}
        given = {_Source(False, i): i for i in range(len(self._given))}
        steps, place, count, before = [], given, len(given), 0
        for n, one in enumerate(self._launches):
            for i in range(before, one.after):
                place[_Source(True, i)] = count
                count += 1
            shifted = []
            end = 1 + max(i for i, x in enumerate(one.args) if isinstance(x, _Source))
            for x in one.args[:end]:
                if isinstance(x, _Source) and x not in place:
                    place[x] = count
                    shifted.append((place[x._replace(shift=0)], x.shift))
                    count += 1
            rest = [x for x in one.args[:end] if not isinstance(x, _Source)]
            static = iter(range(count, count + len(rest)))
            pick = operator.itemgetter(*[place[x] if isinstance(x, _Source) else next(static) for x in one.args[:end]])
            done = tuple(i for i in range(one.after) if i not in kept and max(last.get(i, 0), _made_at(self._launches, i)) == n)
            made = tuple(self._buffers[before : one.after])
            steps.append(Step(made, tuple(shifted), one.run, one.grid, one.head, pick, tuple(rest), one.args[end:], done))
            before = one.after
        return Tape(self._device, aligned, tuple(steps), type(result), results, self._kept)


def _made_at(launches: list[_Launched], buffer: int) -> int:
    """The launch before which a buffer is made."""
    return next(n for n, one in enumerate(launches) if buffer < one.after)


def _run(one: launching.Launch) -> Any:
    """Launch as `launch` does; returns what was launched, which is right for all calls of one layout."""
    key = launching._key(one.kernel, one.args, one.constants, one.warps, one.stages)
    if key is not None:
        launching._run(*one)
        return launching._compiled.get(key, (None,))[0]
    options = {**one.constants, "num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    return launching._call(one.kernel[one.grid], one.args, options, one.constants)


def _direct(run: Any, head: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The C function under Triton's launcher, and what it takes between stream and arguments; the launcher itself where it does more."""
    if not hasattr(run, "launch") or getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return run, head
    marks, found = [object() for _ in range(6)], []
    probe = copy.copy(run)
    probe.launch = lambda *args: found.append(args)
    probe(1, 1, 1, *marks[:1], *head, *marks[1:])
    inner = found[0][4 : len(found[0]) - 5]
    plain = found[0] == (1, 1, 1, marks[0], *inner, *marks[1:]) and not any(x is y for x in inner for y in marks)
    return (run.launch, inner) if plain else (run, head)


def _with_scratch(run: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that is called with an allocator of scratch memory, as launches of kernels with descriptors are."""
    return lambda *args: launching._call(run, args, {}, {"TMA": True})


_watching = threading.Lock()


def watched(run: Callable[[], Any], given: Sequence[torch.Tensor]) -> tuple[Any, Tape | None]:
    """What `run` returns, and its tape if it can have one. given: every tensor that it reads, without repetition.

    The watch stands where `record` writes launches down, and runs them; launches of other threads pass through it unnoted.
    """
    if given[0].device.type not in QUEUES or launching._recorded is not None or not _watching.acquire(blocking=False):
        return run(), None
    watch = Watch(given)
    try:
        launching._recorded = watch  # type: ignore[assignment]
        with watch:
            result = run()
    finally:
        launching._recorded = None
        _watching.release()
    return result, watch.tape(result)


class TapedBackward:
    """A variant's backward that plays tapes, for the residuals of one layout of the forward's tensors.

    What else its Python may look at is part of what is compared: which gradients came and how they lie, and which are wanted.
    """

    __slots__ = ("_function", "_known")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Tape | None]]] = {}

    def __call__(self, config: Any, residuals: Any, grads: Any, options: Any, wanted: tuple[bool, ...]) -> Any:
        several = (*residuals[0], *residuals[1:], *grads)
        given = [x for x in several if x is not None]
        key = (wanted, len(given), *[x is None for x in grads])
        known = self._known.setdefault(key, [])
        for alike, tape in known:
            if alike(*given):
                found = tape(given) if tape is not None and tape.ready() else None
                return self._function(config, residuals, grads, options, wanted) if found is None else found
        run = functools.partial(self._function, config, residuals, grads, options, wanted)
        if len(known) >= LAYOUTS or len({*map(id, given)}) < len(given):
            return run()
        alike = layout_of(given)
        result, tape = watched(run, given)
        known.append((alike, tape))
        return result
