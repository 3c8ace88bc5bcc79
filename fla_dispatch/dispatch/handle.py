"""What a user holds: `op(name, mode)` gives an OpHandle, `use(...)` scopes choices, `bind` fixes a plan for a hot loop."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import registry, settings
from ..registry import Variant
from .bridge import get_bridge
from .function import finished, run, run_ops
from .memory import Memory, memory_of
from .tiers import check_choice

if TYPE_CHECKING:
    from .bound import BoundHandle
    from .explanation import Explanation

_is_compiling = torch.compiler.is_compiling
_scope: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("fla_dispatch_use", default=None)

#: The innermost scope again, for traced code: a trace guards a module attribute, and cannot read a ContextVar. It belongs
#: to the process, so a compiled function sees the scope that was entered last in any thread.
traced_scope: dict[str, str] = {}
_entered: list[dict[str, str]] = []  # the scopes of all threads that are not left yet, in the order of entering
_entering = threading.Lock()


@contextlib.contextmanager
def use(**choices: str) -> Iterator[None]:
    """Choose modes, families or variants by op for a `with` block: `with use(retention="reference"): ...`.

    Wins over estimates and measurements, never over requirements; a handle's own mode wins over it. "auto" takes an outer
    choice back. Enter it outside of compiled functions; they are compiled anew per choice. Raises UnknownNameError.
    """
    global traced_scope
    for name, choice in choices.items():
        check_choice(registry.get_recurrence(registry.get_op(name).recurrence), choice, f"use({name}=...)")
    merged = {**(_scope.get() or {}), **choices}
    token = _scope.set(merged)
    with _entering:
        _entered.append(merged)
        traced_scope = merged
    try:
        yield
    finally:
        _scope.reset(token)
        with _entering:  # threads leave in any order: what is left first must not come back
            _entered[:] = [scope for scope in _entered if scope is not merged]
            traced_scope = _entered[-1] if _entered else {}


class OpHandle:
    """An op that can be called; made by `op(name, mode)`. A value: picklable, copyable, equal by name and mode."""

    __slots__ = ("bridge", "contract", "memory", "mode", "name")

    def __init__(self, name: str, mode: str) -> None:
        found = registry.get_op(name)
        self.name, self.mode = name, mode
        self.contract = found.contract  #: documents the arguments, the equation and the result
        self.bridge = get_bridge(found.recurrence)
        self.memory: Memory | None = None  #: found by the first call outside of traces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op; the arguments and the result are those of its contract (see `help(handle.contract)`).

        Raises CallError (a ValueError) for a wrong call and RefusedError when the forced choice must refuse it.
        """
        if not _is_compiling() and _scope.get() is None:
            if self.memory is None:
                self.memory = memory_of(self)
            found = self.memory.recall(args, kwargs)
            if found is not None:
                return found
        _, tensors, options, prepare, finish = self.contract(*args, **kwargs)
        if prepare is not None:
            tensors = prepare(tensors)
            if not _is_compiling() and _scope.get() is None and self.memory is not None:
                found = self.memory.prepared(tensors, options)
                if found is not None:
                    return finished(found, options, finish)
        if _is_compiling():
            outputs = run_ops(self.bridge, tensors, options, self.choice())
        elif self.mode == "auto" and not settings.current.use and _scope.get() is None:
            outputs = run(self.bridge, tensors, options, None)
        else:
            outputs = run(self.bridge, tensors, options, self.choice())
        return finished(outputs, options, finish)

    def choice(self) -> str | None:
        """What is forced now, or None: the handle's mode, then `use`, then the setting."""
        if self.mode != "auto":
            return self.mode
        scope = traced_scope if torch.compiler.is_compiling() else _scope.get()
        found = scope.get(self.name) if scope else None
        if found is None and settings.current.use:
            found = dict(settings.current.use).get(self.name)
        return None if found == "auto" else found

    def source(self) -> str:
        """What forces the choice, for people."""
        if self.mode != "auto":
            return "the handle's mode"
        return "use(...)" if self.name in (_scope.get() or {}) else "the setting FLA_DISPATCH_USE"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.contract)

    def variants(self) -> tuple[Variant, ...]:
        """Every variant of the op's recurrence with its requirements, in declared order."""
        return registry.get_recurrence(self.bridge.name).variants

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which variant these arguments would run, why, and why not the others; computes nothing."""
        from .explanation import explain_call

        return explain_call(self, args, kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> BoundHandle:
        """Fix plan and options from example arguments, for calls with tensors of the same shapes, dtypes and device."""
        from .bound import BoundHandle

        return BoundHandle(self, args, kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpHandle) and (self.name, self.mode) == (other.name, other.mode)

    def __hash__(self) -> int:
        return hash((self.name, self.mode))

    def __reduce__(self) -> tuple[Any, ...]:
        return op, (self.name, self.mode)

    def __repr__(self) -> str:
        return f"fla_dispatch.op({self.name!r}, mode={self.mode!r})"


def op(name: str, mode: str = "auto") -> OpHandle:
    """The handle of an op. mode: "auto", "reference", a family ("chunk": its cheapest variant) or a variant's name.

    Raises UnknownNameError, a ValueError with the nearest names, for an unknown op or mode.
    """
    if mode != "auto":
        check_choice(registry.get_recurrence(registry.get_op(name).recurrence), mode, f"op({name!r})")
    return OpHandle(name, mode)


def ops() -> list[str]:
    """Names of all ops."""
    return registry.op_names()
