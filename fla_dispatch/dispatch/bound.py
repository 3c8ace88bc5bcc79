"""BoundHandle: a call with its plan and options fixed, for hot loops over tensors of one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from ..errors import CallError
from ..sequences import SeqInfo
from .function import finished, needs_grad, run_recording
from .memory import Repeat, at_rest, remember, sources_of, stateless
from .plan import Plan

if TYPE_CHECKING:
    from .handle import OpHandle


def _is_tensors(x: object) -> bool:
    """Whether an argument brings tensors, and so belongs to each call rather than to the options that are bound."""
    return isinstance(x, (torch.Tensor, SeqInfo)) or (isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x))


class BoundHandle:
    """Runs the plan that `OpHandle.bind` resolved; made by `handle.bind(*example_arguments)`.

    A call takes the tensors that bind was given, in the same places; options stay as bound. Where the recurrence takes
    the arguments as they are, a call compares their shapes, dtypes, devices and contiguity with the example's and runs, from the
    third on as a remembered call does (memory.py); where the op computes with them first (or unpacks a SeqInfo), its contract runs
    each time and only choosing is saved.
    """

    __slots__ = (
        "_device", "_expected", "_facts", "_finish", "_grad", "_names", "_options", "_options_given", "_repeats", "_sources", "handle",
        "plan",
    )  # fmt: skip

    def __init__(self, handle: OpHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bridge = handle.bridge
        self.handle = handle
        self._names = tuple(name for name, x in kwargs.items() if _is_tensors(x))
        self._options_given = {name: x for name, x in kwargs.items() if name not in self._names}
        _, tensors, self._options, prepare, self._finish = handle.contract(*args, **kwargs)
        given = (*args, *(kwargs[name] for name in self._names))
        sources = sources_of(tensors, given)
        as_they_are = prepare is None and stateless(self._finish) and sources is not None
        self._sources = sources if as_they_are else None
        self._repeats: dict[bool, Repeat | None] = {}  # by whether gradients are on; None: seen once
        self._expected = tuple((x.shape, x.dtype, x.get_device(), x.is_contiguous()) for x in given) if as_they_are else ()
        if prepare is not None:
            tensors = prepare(tensors)
        self._device = tensors[0].device
        bridge.check(tensors, self._options)
        self._grad = torch.is_grad_enabled() and needs_grad(bridge, tensors)
        self.plan: Plan = bridge.plans.lookup(tensors, self._options, self._grad, handle.choice())
        self._facts = bridge.plans.facts(tensors, self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the bound plan. Raises CallError when the tensors are not like the example's, or want a gradient it had not."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return self.handle(*args, **kwargs, **self._options_given)
        if self._sources is None:
            return self._through_contract(args, kwargs)
        given = (*args, *[kwargs.pop(name) for name in self._names]) if kwargs and kwargs.keys() == {*self._names} else args
        if kwargs or len(given) != len(self._expected):
            self._wrong_arguments()
        repeat = self._repeats.get(torch.is_grad_enabled())
        if repeat is not None and forward_ad._current_level < 0 and repeat.alike(*given):
            found = repeat.play(given)
            if found is not None:
                return found
        grad = False
        try:
            for x, (shape, dtype, device, contiguous) in zip(given, self._expected):  # noqa: B905  strict costs, lengths are equal
                if x.shape != shape or x.dtype is not dtype or x.get_device() != device or x.is_contiguous() is not contiguous:
                    self._wrong_tensor(x, shape, dtype, contiguous)
                if x.requires_grad:
                    grad = True
        except AttributeError:  # None, an array: no tensor
            self._wrong_arguments()
        # tuple.__new__ makes the NamedTuple without a call of its Python __new__
        tensors = tuple.__new__(self.handle.bridge.tensors, [None if i is None else given[i] for i in self._sources])
        return self._run(tensors, self._finish, grad, given)

    def _run(self, tensors: Any, finish: Callable[..., Any] | None, grad: bool, given: tuple[Any, ...] = ()) -> Any:
        bridge, plan, options = self.handle.bridge, self.plan, self._options
        bridge.check(tensors, options)
        recording = grad and torch.is_grad_enabled()
        if recording and not self._grad:
            raise CallError(
                f"{self.handle.name}: bound call: expected tensors without gradient as in bind, got one that requires it. "
                "To fix: bind with tensors that require gradients, or call under torch.no_grad()."
            )
        enabled = torch.is_grad_enabled()
        if given and enabled not in self._repeats:
            self._repeats[enabled] = None
        elif given and self._sources is not None and self._repeats[enabled] is None and at_rest(given):
            result, self._repeats[enabled] = remember(bridge, plan, tensors, options, finish, None, given, self._sources, recording)
            return result
        if recording:
            outputs = run_recording(bridge, plan, tensors, options, None)
        else:
            outputs = plan.forward(plan.forward_config, tensors, options)
        return finished(outputs, options, finish)

    def _through_contract(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.keys() != {*self._names}:
            self._wrong_arguments()
        _, tensors, options, prepare, finish = self.handle.contract(*args, **kwargs, **self._options_given)
        if prepare is not None:
            tensors = prepare(tensors)
        if options != self._options or self.handle.bridge.plans.facts(tensors, options) != self._facts:
            raise CallError(
                f"{self.handle.name}: bound call: expected the sizes, dtypes and device class of bind, got others. "
                "To fix: bind again for these tensors, or call the handle."
            )
        return self._run(tensors, finish, needs_grad(self.handle.bridge, tensors))

    def _wrong_arguments(self) -> None:
        raise CallError(
            f"{self.handle.name}: bound call: expected the tensors of bind in the same places"
            f"{', ' + ', '.join(self._names) + ' by name' if self._names else ''}, got others. "
            "To fix: pass the same tensor arguments as in bind; options are bound already."
        )

    def _wrong_tensor(self, x: torch.Tensor, shape: torch.Size, dtype: torch.dtype, contiguous: bool) -> None:
        device, layout = self._device, "contiguous" if contiguous else "not contiguous"
        got = f"{list(x.shape)} {x.dtype} on {x.device}, {'contiguous' if x.is_contiguous() else 'not contiguous'}"
        raise CallError(
            f"{self.handle.name}: bound call: expected {list(shape)} {dtype} on {device}, {layout}, got {got}. "
            "To fix: bind again for these tensors, or call the handle."
        )

    def __repr__(self) -> str:
        return f"{self.handle!r}.bind(...)"
