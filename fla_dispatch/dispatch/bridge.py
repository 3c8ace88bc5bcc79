"""The torch.library ops of a recurrence: what torch.compile, fake tensors and dispatch modes see of it.

    fla_dispatch::<recurrence>_forward(tensors, options, bool grad, str? choice) -> outputs
    fla_dispatch::<recurrence>_backward(tensors, saved outputs, output gradients, options, bool[] wanted, str? choice) -> gradients

Both are opaque to compilers, choose their variant when they run (so one graph serves all lengths), and return new contiguous
tensors that alias nothing; what was not asked for is empty(0). Schemas follow from the recurrence's NamedTuples: tensors that it
updates in place are `Tensor(a!)`, which compilers turn into functions and back, and without gradients there is no backward. Eager
calls do not come through here.
"""

from __future__ import annotations

import sys
import threading
import types
import typing
from collections.abc import Sequence
from typing import Any

import torch

from .. import registry
from .plan import Plans, asked

NAMESPACE = "fla_dispatch"
_SCALARS = {float: "float", int: "int", bool: "bool", str: "str"}


def _tensor_arguments(fields: type[Any], mutates: tuple[str, ...]) -> list[str]:
    hints = typing.get_type_hints(fields)
    written = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(mutates)}
    optional = {name: "?" if types.NoneType in typing.get_args(hints[name]) else "" for name in fields._fields}
    return [f"Tensor{written.get(name, '')}{optional[name]} {name}" for name in fields._fields]


def _option_arguments(options: type[Any]) -> list[str]:
    hints = typing.get_type_hints(options)
    return [f"{_SCALARS[hints[name]]} {name}" for name in options._fields]


def _fresh(outputs: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Contiguous tensors that share memory neither with an input nor with each other; empty(0) for None."""
    taken = {x.untyped_storage()._cdata for x in inputs if x is not None}
    result = []
    for x in outputs:
        x = like.new_empty(0) if x is None else x.contiguous()
        if x.untyped_storage()._cdata in taken:
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(x.untyped_storage()._cdata)
        result.append(x)
    return tuple(result)


class Bridge:
    """One recurrence as the dispatcher sees it: its plans, the positions of its tensors, and its two library ops."""

    def __init__(self, name: str) -> None:
        r = registry.get_recurrence(name)
        self.name = name
        self.plans = Plans(name)
        self.tensors, self.options, self.outputs, self.saved, self.output_grads = r.tensors, r.options, r.outputs, r.saved, r.output_grads
        self.residuals, self.check, self.empty_outputs, self.flops = r.residuals, r.check, r.empty_outputs, r.flops
        self.valued, self.written = r.valued, tuple(r.tensors._fields.index(x) for x in r.mutates)
        self.positions = tuple(r.tensors._fields.index(x) for x in r.differentiable)
        self.others = tuple(i for i in range(len(r.tensors._fields)) if i not in self.positions)
        self.n_tensors, self.n_options, self.n_saved = len(r.tensors._fields), len(r.options._fields), len(r.saved._fields) - 1
        self.n_carried = len(r.output_grads._fields)
        self.n_outputs = len(r.outputs._fields)
        self.none_kept: tuple[None, ...] = (None,) * self.n_saved
        self.nothing: tuple[None, ...] = (None,) * self.n_outputs
        self.rest = self.nothing[1:]
        self.wanted_before: dict[tuple[Any, ...], tuple[tuple[bool, ...], tuple[int, ...]]] = {}
        self._define(r)

    def _define(self, r: registry.Recurrence) -> None:
        tensors, options = _tensor_arguments(r.tensors, r.mutates), _option_arguments(r.options)
        forward = [*tensors, *options, "bool grad", "str? choice"]
        saved = [f"Tensor? saved_{name}" for name in r.saved._fields[1:]]
        grads = [f"Tensor? grad_{name}" for name in r.output_grads._fields]
        backward = [*tensors, *saved, *grads, *options, "bool[] wanted", "str? choice"]
        self._library = torch.library.Library(NAMESPACE, "FRAGMENT")
        directions = (
            ("forward", forward, len(r.outputs._fields), self._forward, self._fake_forward),
            ("backward", backward, len(r.differentiable), self._backward, self._fake_backward),
        )[: 2 if r.differentiable else 1]
        for suffix, arguments, count, kernel, fake in directions:
            op = f"{self.name}_{suffix}"
            schema = f"{op}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * count)})"
            self._library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            self._library.impl(op, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=self._library)
        packets = getattr(torch.ops, NAMESPACE)
        self._packets = tuple(getattr(packets, f"{self.name}_{suffix}") for suffix, *_ in directions)
        self.forward_op = self._packets[0].default
        self.backward_op: Any = self._packets[1].default if r.differentiable else None

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The outputs of the forward op: a schema with one result returns no tuple."""
        found = self.forward_op(*args)
        return (found,) if self.n_outputs == 1 else found

    def wanted(self, where: tuple[int, ...], need: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        """Which gradients the autograd.Function wants, and for each tensor it was given the gradient's position, or -1.

        where: positions of those tensors; need: needs_input_grad of the Function, whose first argument is no tensor.
        """
        asking = [i for i, wants in zip(where, need[1:], strict=True) if wants]
        return tuple([i in asking for i in self.positions]), tuple([self.positions.index(i) if i in asking else -1 for i in where])

    def remember_wanted(self, where: tuple[int, ...], need: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        self.wanted_before[where, need] = found = self.wanted(where, need)
        return found

    def _split(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """Tensors and options of the arguments of the forward op."""
        n, m = self.n_tensors, self.n_options
        return self.tensors(*args[:n]), self.options(*args[n : n + m])

    def _split_backward(self, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """Residuals, output gradients and options of the arguments of the backward op."""
        n, s, g = self.n_tensors, self.n_saved, self.n_carried
        residuals = self.saved(self.tensors(*args[:n]), *args[n : n + s])
        grads = self.output_grads(*map(asked, args[n + s : n + s + g]))
        return residuals, grads, self.options(*args[n + s + g : n + s + g + self.n_options])

    def _forward(self, *args: Any) -> tuple[torch.Tensor, ...] | torch.Tensor:
        tensors, options = self._split(args)
        grad, choice = args[-2:]
        self.check(tensors, options)
        plan = self.plans.lookup(tensors, options, grad, choice)
        found = _fresh(plan.forward(plan.forward_config, tensors, options), tensors, tensors[0])
        return found if self.n_outputs > 1 else found[0]

    def _fake_forward(self, *args: Any) -> tuple[torch.Tensor, ...] | torch.Tensor:
        found = tuple(self.empty_outputs(*self._split(args)))
        return found if self.n_outputs > 1 else found[0]

    def _backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        residuals, grads, options = self._split_backward(args)
        wanted, choice = args[-2:]
        tensors = residuals.tensors
        plan = self.plans.lookup(tensors, options, True, choice)
        assert plan.backward is not None
        found = plan.backward(plan.backward_config, residuals, grads, options, tuple(wanted))
        return _fresh(found, [*tensors, *residuals[1:], *grads], tensors[0])

    def _fake_backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        tensors = self.tensors(*args[: self.n_tensors])
        wanted = args[-2]
        return tuple(
            torch.empty_like(tensors[i], memory_format=torch.contiguous_format) if want else tensors[0].new_empty(0)
            for i, want in zip(self.positions, wanted, strict=True)
        )

    def count_flops(self) -> None:
        """Tell torch's flop counter the formulas of both ops, and every counter that counts now.

        Importing the counter imports triton, so it is told once somebody else has imported it.
        """
        counter = sys.modules.get("torch.utils.flop_counter")
        if counter is None:
            return
        formulas = dict(zip(self._packets, (self._forward_flops, self._backward_flops), strict=False))
        counter.flop_registry.update(formulas)
        for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            active = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if active is not None:
                active.update({packet: f for packet, f in formulas.items() if packet not in active})

    def _forward_flops(self, *args: Any, out_val: Any = None) -> int:
        return self.flops(*self._split(args))

    def _backward_flops(self, *args: Any, out_val: Any = None) -> int:
        residuals, _, options = self._split_backward(args)
        return 3 * self.flops(residuals.tensors, options)


_bridges: dict[str, Bridge] = {}
_making = threading.Lock()


def get_bridge(name: str) -> Bridge:
    """The bridge of a recurrence, made on first use (outside traces: making one registers library ops)."""
    found = _bridges.get(name)
    if found is None:
        with _making:
            if name not in _bridges:
                _bridges[name] = Bridge(name)
            found = _bridges[name]
    return found


def load_bridges() -> None:
    """Make the bridges of all rooms, so that a trace meets none that is missing."""
    for name in registry.recurrence_names():
        get_bridge(name).count_flops()
