"""BoundHandle: a call with its plan and options fixed, for hot loops over tensors of one shape."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CallError
from ..sequences import SeqInfo
from .function import finished, needs_grad, run_recording
from .plan import Plan

if TYPE_CHECKING:
    from .handle import OpHandle


def _is_tensors(x: object) -> bool:
    """Whether an argument brings tensors, and so belongs to each call rather than to the options that are bound."""
    return isinstance(x, (torch.Tensor, SeqInfo)) or (isinstance(x, tuple) and any(isinstance(y, torch.Tensor) for y in x))


def _stateless(function: Callable[..., Any] | None) -> bool:
    """Whether a contract's prepare or finish holds nothing of the example call."""
    return function is None or (isinstance(function, types.FunctionType) and function.__closure__ is None)


class BoundHandle:
    """Runs the plan that `OpHandle.bind` resolved; made by `handle.bind(*example_arguments)`.

    A call takes the tensors that bind was given, in the same places; options stay as bound. Where the recurrence takes
    the arguments as they are, a call compares their shapes, dtypes, devices and contiguity with the example's and runs;
    where the op computes with them first (or unpacks a SeqInfo), its contract runs each time and only choosing is saved.
    """

    __slots__ = ("_device", "_expected", "_facts", "_finish", "_grad", "_names", "_options", "_options_given", "_sources", "handle", "plan")

    def __init__(self, handle: OpHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bridge = handle.bridge
        self.handle = handle
        self._names = tuple(name for name, x in kwargs.items() if _is_tensors(x))
        self._options_given = {name: x for name, x in kwargs.items() if name not in self._names}
        _, tensors, self._options, prepare, self._finish = handle.contract(*args, **kwargs)
        given = (*args, *(kwargs[name] for name in self._names))
        sources = [None if x is None else next((i for i, y in enumerate(given) if y is x), -1) for x in tensors]
        as_they_are = prepare is None and _stateless(self._finish) and -1 not in sources and {*sources} - {None} == {*range(len(given))}
        self._sources = tuple(sources) if as_they_are else None
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
        return self._run(tensors, self._finish, grad)

    def _run(self, tensors: Any, finish: Callable[..., Any] | None, grad: bool) -> Any:
        bridge, plan, options = self.handle.bridge, self.plan, self._options
        bridge.check(tensors, options)
        if grad and torch.is_grad_enabled():
            if not self._grad:
                raise CallError(
                    f"{self.handle.name}: bound call: expected tensors without gradient as in bind, got one that requires it. "
                    "To fix: bind with tensors that require gradients, or call under torch.no_grad()."
                )
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
