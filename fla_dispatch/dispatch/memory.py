"""Calls that passed every check, remembered: one like an earlier one goes straight to its kernels.

What checking, choosing and a variant's Python come to follows from the layouts of the tensors, the options and what the process is set
to. From the third call on that is alike in all of these, nothing of it is done again: the arguments are compared in one C call and the
tape of the variant (kernels/_shared/tape.py) is played with their addresses. Whatever is not alike takes the whole road, as do traces,
modes, transforms, autocast, captures of graphs, packs (their lengths are values), and calls that compute with torch.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .. import registry, settings, tuning
from ..kernels._shared.tape import LAYOUTS, QUEUES, Tape, TapedBackward, layout_of, watched
from .function import _functorch_active, _modes_active, finished, is_plain, needs_grad, run_recording
from .plan import Plan

if TYPE_CHECKING:
    from .bridge import Bridge
    from .handle import OpHandle

_deterministic = torch._C._get_deterministic_algorithms
_grad = torch.is_grad_enabled
_wrote = torch._C._increment_version
_new = tuple.__new__

#: Calls by options and sizes that are kept per op before the memory starts anew.
MOST = 4096


class TapedForward:
    """A variant's forward for tensors of one layout; given: how they are taken out of the recurrence's, in the order of the tape."""

    __slots__ = ("_function", "_given", "_tape")

    def __init__(self, function: Callable[..., Any], tape: Tape, given: Callable[[Any], Any]) -> None:
        self._function, self._tape, self._given = function, tape, given

    def __call__(self, config: Any, tensors: Any, options: Any) -> Any:
        found = self._tape(self._given(tensors))
        return self._function(config, tensors, options) if found is None else found


class Repeat(NamedTuple):
    """A remembered call: whether tensors are like its own, and what runs it for them, or returns None and has done nothing (always,
    where it is one that takes the whole road)."""

    alike: Callable[..., bool]
    play: Callable[[Sequence[torch.Tensor]], Any]


class Form(NamedTuple):
    """Arguments of certain names and types: how their tensors and options are taken out, and what is remembered of such calls.

    calls: by options, the size of the first tensor and modes; empty where a call was seen once.
    """

    tensors: Callable[[tuple[Any, ...]], Any]
    options: Callable[[tuple[Any, ...]], Any]
    calls: dict[tuple[Any, ...], list[Repeat]]


_NO_OPTIONS = operator.itemgetter(slice(0))


def _flat(pair: type[tuple[Any, ...]], count: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors among the arguments, with those of a pair of states; () where they are not as many as they were, or no tensors."""
    found: list[Any] = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif type(x) is pair:
            found.extend(x)
    return tuple(found) if len(found) == count and all(isinstance(x, torch.Tensor) for x in found) else ()


def _form(values: tuple[Any, ...]) -> Form | None:
    """How arguments of these types are taken apart; None where they hold what is neither a plain tensor nor a plain option."""
    at = [i for i, x in enumerate(values) if is_plain((type(x),)) and x is not None]
    pairs = [x for x in values if isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x)]
    options = [i for i, x in enumerate(values) if isinstance(x, (bool, int, float, str))]
    options += [i for i, x in enumerate(values) if isinstance(x, tuple) and all(isinstance(y, (int, float)) for y in x)]
    nothing = sum(x is None for x in values)
    if len(pairs) > 1 or len(at) + len(pairs) + len(options) + nothing < len(values) or len(at) < 2:
        return None
    tensors = functools.partial(_flat, type(pairs[0]), len(at) + len(pairs[0])) if pairs else operator.itemgetter(*at)
    return Form(tensors, operator.itemgetter(*options) if options else _NO_OPTIONS, {})


def _whole_road(given: Sequence[torch.Tensor]) -> None:
    return None


class Memory:
    """The remembered calls of an op in one mode; stale when settings, registrations or records change."""

    def __init__(self, handle: OpHandle) -> None:
        self._handle = handle
        self._refresh()

    def _refresh(self) -> None:
        self._forms: dict[tuple[Any, ...], Form | None] = {}
        self._prepared: dict[tuple[Any, ...], list[Repeat]] = {}
        self._keys = 0
        self._registry_epoch, self._settings_epoch, self._tuning_epoch = registry.epoch, settings.epoch, tuning.epoch

    def recall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call that is like a remembered one, or None: it takes the whole road.

        Not for traces, nor inside `use`. Raises what the call raises.
        """
        if registry.epoch != self._registry_epoch or settings.epoch != self._settings_epoch or tuning.epoch != self._tuning_epoch:
            self._refresh()
        values = (*args, *kwargs.values())
        kinds = (len(args), *kwargs, *map(type, values))
        form = self._forms.get(kinds)
        if form is None:
            if kinds in self._forms or len(self._forms) >= MOST:
                return None
            form = self._forms[kinds] = _form(values)
            if form is None:
                return None
        given = form.tensors(values)
        if not given or forward_ad._current_level >= 0:
            return None
        key = (form.options(values), given[0].numel(), _grad(), _deterministic())
        calls = form.calls.get(key)
        if calls is None:
            self._first(form.calls, key)
            return None
        for alike, play in calls:
            if alike(*given):
                return play(given)
        if len(calls) >= LAYOUTS or not at_rest(given):
            return None
        return self._learn(calls, given, args, kwargs)

    def _first(self, calls: dict[tuple[Any, ...], list[Repeat]], key: tuple[Any, ...]) -> None:
        """Note that a call was seen once."""
        self._keys += 1
        if self._keys > MOST:
            self._refresh()
        calls[key] = []

    def prepared(self, tensors: Any, options: Any) -> tuple[Any, ...] | None:
        """All outputs of a checked call whose tensors torch has prepared, if it is like a remembered one; `recall` came before."""
        kinds = (*map(type, tensors),)
        if not is_plain(kinds) or forward_ad._current_level >= 0:
            return None
        key = (options, kinds, tensors[0].numel(), _grad(), _deterministic())
        calls = self._prepared.get(key)
        if calls is None:
            self._first(self._prepared, key)
            return None
        given = [x for x in tensors if x is not None]
        for alike, play in calls:
            if alike(*given):
                found: tuple[Any, ...] | None = play(given)
                return found
        sources = sources_of(tensors, given)
        if len(calls) >= LAYOUTS or sources is None or not at_rest(given):
            return None
        bridge, choice = self._handle.bridge, self._handle.choice()
        bridge.check(tensors, options)
        recording = _grad() and needs_grad(bridge, tensors)
        plan = bridge.plans.lookup(tensors, options, recording, choice)
        outputs, repeat = remember(bridge, plan, tensors, options, tuple, choice, given, sources, recording)
        calls.append(repeat)
        return tuple(outputs)

    def _learn(self, calls: list[Repeat], given: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that has been seen before and remember it; None, and nothing run, where it is one that takes the whole road."""
        bridge, choice = self._handle.bridge, self._handle.choice()
        _, tensors, options, prepare, finish = self._handle.contract(*args, **kwargs)
        sources = sources_of(tensors, given)
        if prepare is not None or sources is None or not stateless(finish):
            calls.append(Repeat(layout_of(given), _whole_road))
            return None
        bridge.check(tensors, options)
        recording = _grad() and needs_grad(bridge, tensors)
        plan = bridge.plans.lookup(tensors, options, recording, choice)
        result, repeat = remember(bridge, plan, tensors, options, finish, choice, given, sources, recording)
        calls.append(repeat)
        return result


def sources_of(tensors: Sequence[Any], given: Sequence[Any]) -> list[int | None] | None:
    """For each tensor of a recurrence its place among those given; None unless they are the same tensors, each given once."""
    places = {id(x): i for i, x in enumerate(given)}
    sources = [None if x is None else places.get(id(x), -1) for x in tensors]
    return sources if {*sources} - {None} == {*range(len(given))} else None


def stateless(function: Callable[..., Any] | None) -> bool:
    """Whether a contract's prepare or finish holds nothing of one call."""
    return function is None or (isinstance(function, types.FunctionType) and function.__closure__ is None)


def remember(
    bridge: Bridge,
    plan: Plan,
    tensors: Any,
    options: Any,
    finish: Callable[..., Any] | None,
    choice: str | None,
    given: Sequence[torch.Tensor],
    sources: list[int | None],
    recording: bool,
) -> tuple[Any, Repeat]:
    """The result of a checked call, and the call to be remembered."""
    alike = layout_of(given)
    if any(getattr(tensors, name) is not None for name in bridge.valued):
        outputs = (
            run_recording(bridge, plan, tensors, options, choice) if recording else plan.forward(plan.forward_config, tensors, options)
        )
        return finished(outputs, options, finish), Repeat(alike, _whole_road)
    tape: Tape | None = None

    def forward(config: Any, tensors: Any, options: Any) -> Any:
        nonlocal tape
        outputs, tape = watched(functools.partial(plan.forward, config, tensors, options), given)
        return outputs

    if recording:
        outputs = run_recording(bridge, dataclasses.replace(plan, forward=forward), tensors, options, choice)
    else:
        outputs = forward(plan.forward_config, tensors, options)
    if tape is None:
        play: Callable[[Sequence[torch.Tensor]], Any] = _whole_road
    elif recording:
        play = _recorder(bridge, plan, tape, sources, options, finish, choice)
    else:
        play = _player(tape, tuple(i for i in (sources[i] for i in bridge.written) if i is not None), options, finish)
    return finished(outputs, options, finish), Repeat(alike, play)


def at_rest(given: Sequence[Any]) -> bool:
    """Whether a call is plain: of plain tensors on one device that can be taped, outside of modes, transforms, autocast and captures."""
    if _modes_active() or _functorch_active() or torch._C._is_any_autocast_enabled() or not is_plain(tuple(map(type, given))):
        return False
    device = given[0].device
    queue = QUEUES.get(device.type)
    here = queue is not None and queue.device() == device.index and not queue.capturing()
    return here and all(x.device == device for x in given)


def _player(
    tape: Tape, written: tuple[int, ...], options: Any, finish: Callable[..., Any] | None
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Runs a remembered call that records no gradient; written: places of the tensors that it updates in place."""
    ready, end = tape.ready, finish or _pair(options.final_state)
    first = None if len(written) != 1 else written[0]

    def play(given: Sequence[torch.Tensor]) -> Any:
        outputs = tape(given) if ready() else None
        if outputs is None:
            return None
        if first is not None:  # autograd cannot see that a kernel wrote
            _wrote((given[first],))
        elif written:
            _wrote([given[i] for i in written])
        return end(outputs)

    return play


def _pair(final_state: bool) -> Callable[[tuple[Any, ...]], Any]:
    """What the user gets where a contract has no finish."""
    return operator.itemgetter(0, 1) if final_state else lambda outputs: (outputs[0], None)


def _recorder(
    bridge: Bridge, plan: Plan, tape: Tape, sources: list[int | None], options: Any, finish: Callable[..., Any] | None, choice: str | None
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Runs a remembered call that records a gradient."""
    at = [sources.index(i) for i in range(sum(i is not None for i in sources))]
    forward = TapedForward(plan.forward, tape, operator.itemgetter(*at))
    taped = dataclasses.replace(plan, forward=forward, backward=None if plan.backward is None else TapedBackward(plan.backward))

    def play(given: Sequence[torch.Tensor]) -> Any:
        if not tape.ready():
            return None
        tensors = _new(bridge.tensors, [None if i is None else given[i] for i in sources])
        return finished(run_recording(bridge, taped, tensors, options, choice), options, finish)

    return play


_memories: dict[OpHandle, Memory] = {}


def memory_of(handle: OpHandle) -> Memory:
    """The memory that equal handles share."""
    found = _memories.get(handle)
    if found is None or found._handle.contract is not handle.contract:
        found = _memories[handle] = Memory(handle)
    return found
