"""The one autograd.Function, and the road that a call of a recurrence takes.

Eager calls on plain tensors run the plan's functions directly. Traces, fake and meta tensors, dispatch modes and tensor
subclasses go through the library ops of the bridge. Under a torch.func transform or in forward-mode differentiation a torch
variant runs as plain differentiable code, because these must see its operations.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..errors import DoubleBackwardError
from .bridge import Bridge
from .plan import Plan

_modes_active = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active


class RecurrenceFunction(torch.autograd.Function):
    """Any recurrence with its gradient: with a plan it runs the plan, without one the library ops.

    Arguments are one tuple (bridge, plan or None, tensors, options, choice) and, for autograd to see, once more the tensors
    that are present and may get a gradient: each further argument would cost 0.2 us, absent ones too. The combined form
    (`forward(ctx, ...)`) is some 10 us cheaper per call than `setup_context`, which only torch.func needs.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *present: Tensor) -> Any:
        bridge, plan, tensors, options, choice = call
        if plan is None:
            outputs = bridge.outputs(*bridge.forward(*tensors, *options, True, choice))
            where = tuple([i for i in bridge.positions if tensors[i] is not None])
            ctx.call = bridge, plan, where, options, choice
            ctx.save_for_backward(*present, *[tensors[i] for i in bridge.others], *bridge.residuals(tensors, outputs, options)[1:])
            ctx.set_materialize_grads(False)
            return tuple(outputs[: bridge.n_carried])
        outputs = plan.forward(plan.forward_config, tensors, options)
        ctx.call = bridge, plan, plan.present, options, choice
        if plan.others or plan.kept:
            kept = [None if i is None else outputs[i] for i in plan.kept]
            ctx.save_for_backward(*present, *[tensors[i] for i in plan.others], *kept)
        else:
            ctx.save_for_backward(*present)
        if len(plan.returned) == 1:
            return outputs[0]
        ctx.set_materialize_grads(False)
        return tuple([outputs[i] for i in plan.returned])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        bridge, plan, where, options, choice = ctx.call
        saved, need = ctx.saved_tensors, ctx.needs_input_grad
        tensors = [None] * bridge.n_tensors
        others = bridge.others if plan is None else plan.others
        for i, x in zip(where + others, saved):  # noqa: B905  saved holds the kept outputs after these
            tensors[i] = x
        kept = saved[len(where) + len(others) :] or bridge.none_kept
        if plan is None or torch.compiler.is_compiling():
            wanted, slots = bridge.wanted(where, need)
            found = _backward_op(bridge, (*tensors, *kept, *grads, *options, wanted, choice))
            return None, *[None if slot < 0 else found[slot] for slot in slots]
        _first_derivative(bridge)
        wanted, slots = bridge.wanted_before.get((where, need)) or bridge.remember_wanted(where, need)
        incoming = [None] * bridge.n_carried
        for i, x in zip(plan.returned, grads):  # noqa: B905  one gradient for each output that was returned
            incoming[i] = x
        if _modes_active():
            found = _backward_op(bridge, (*tensors, *kept, *incoming, *options, wanted, choice))
        else:
            residuals = bridge.saved(bridge.tensors(*tensors), *kept)
            found = plan.backward(plan.backward_config, residuals, bridge.output_grads(*incoming), options, wanted)
        return None, *[None if slot < 0 else found[slot] for slot in slots]


def _first_derivative(bridge: Bridge) -> None:
    """Backward runs with gradients recorded exactly when a derivative of it is asked for."""
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            f"{bridge.name}: backward was called with create_graph=True: expected a first derivative, got a request for a "
            "differentiable one. To fix: leave create_graph out, or take second derivatives through torch.func."
        )


def _backward_op(bridge: Bridge, args: tuple[Any, ...]) -> Any:
    if not torch.compiler.is_compiling():
        _first_derivative(bridge)
        bridge.count_flops()
    return bridge.backward_op(*args)


def needs_grad(bridge: Bridge, tensors: Any) -> bool:
    """Whether a tensor that may get a gradient asks for one."""
    for i in bridge.positions:
        x = tensors[i]
        if x is not None and x.requires_grad:
            return True
    return False


def run_recording(bridge: Bridge, plan: Plan, tensors: Any, options: Any, choice: str | None) -> tuple[Any, ...]:
    """All outputs with a gradient recorded; None for those that were not asked for or carry no gradient."""
    found = RecurrenceFunction.apply((bridge, plan, tensors, options, choice), *[tensors[i] for i in plan.present])
    if len(plan.returned) == 1:
        return found, *bridge.rest
    outputs = [*bridge.nothing]
    for i, x in zip(plan.returned, found, strict=True):
        outputs[i] = x
    return tuple(outputs)


def finished(outputs: tuple[Any, ...], options: Any, finish: Callable[..., Any] | None) -> Any:
    """What the user gets: of a contract without `finish` the output and the final state."""
    if finish is not None:
        return finish(outputs)
    return outputs[0], outputs[1] if options.final_state else None


def run_ops(bridge: Bridge, tensors: Any, options: Any, choice: str | None) -> tuple[Any, ...]:
    """All outputs through the library ops; the only road of traced code."""
    if not (torch.is_grad_enabled() and needs_grad(bridge, tensors)):
        return bridge.forward(*tensors, *options, False, choice)
    present: list[Tensor] = []
    for i in bridge.positions:
        x = tensors[i]
        if x is not None:  # Dynamo refuses one tensor in two places, as in retention(x, x, v)
            present.append(x.view_as(x) if any(x is y for y in present) else x)
    return RecurrenceFunction.apply((bridge, None, tensors, options, choice), *present) + bridge.nothing[bridge.n_carried :]


_plain_kinds: set[tuple[type, ...]] = set()


def is_plain(kinds: tuple[type, ...]) -> bool:
    """Whether all types are plain tensors or None; remembered, because there are few patterns and one check per call."""
    if kinds in _plain_kinds:
        return True
    found = all(kind in (Tensor, Parameter, NoneType) for kind in kinds)
    if found:
        _plain_kinds.add(kinds)
    return found


def run(bridge: Bridge, tensors: Any, options: Any, choice: str | None) -> tuple[Any, ...]:
    """All outputs of a recurrence outside of traces; None for those that carry no gradient when a gradient is recorded.

    Raises CallError for values that break the contract (packings), RefusedError where nothing may run the call.
    """
    if _functorch_active() or forward_ad._current_level >= 0:
        bridge.check(tensors, options)
        plan = bridge.plans.lookup(tensors, options, None, choice)
        return plan.forward(plan.forward_config, tensors, options)
    kinds = tuple(map(type, tensors))
    if not is_plain(kinds) or _modes_active() or tensors[0].is_meta:
        bridge.count_flops()
        return run_ops(bridge, tensors, options, choice)
    bridge.check(tensors, options)
    if torch.is_grad_enabled() and needs_grad(bridge, tensors):
        return run_recording(bridge, bridge.plans.lookup(tensors, options, True, choice), tensors, options, choice)
    plan = bridge.plans.lookup(tensors, options, False, choice)
    return plan.forward(plan.forward_config, tensors, options)
