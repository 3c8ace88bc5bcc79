"""The one autograd.Function, and the road that a call of a recurrence takes.

Eager calls on plain tensors run the plan's functions directly. Traces, fake and meta tensors, dispatch modes and tensor
subclasses go through the library ops of the bridge. Under a torch.func transform a torch variant runs as plain
differentiable code, because transforms must see its operations.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from ..errors import DoubleBackwardError
from .bridge import Bridge
from .plan import Plan

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, types.NoneType))
_FIRST = 4  # arguments of RecurrenceFunction before the tensors


class RecurrenceFunction(torch.autograd.Function):
    """Any recurrence with its gradient: with a plan it runs the plan, without one the library ops.

    The combined form (`forward(ctx, ...)`) is some 10 us cheaper per call than `setup_context`, which only torch.func needs.
    """

    @staticmethod
    def forward(ctx: Any, bridge: Bridge, plan: Plan | None, options: Any, choice: str | None, *tensors: Any) -> tuple[Any, ...]:
        t = bridge.tensors(*tensors)
        if plan is None:
            outputs = bridge.outputs(*bridge.forward_op(*tensors, *options, True, choice))
        else:
            outputs = plan.forward(plan.forward_config, t, options)
        saved = bridge.residuals(t, outputs, options)
        ctx.save_for_backward(*saved[0], *saved[1:])
        ctx.set_materialize_grads(False)
        ctx.bridge, ctx.plan, ctx.options, ctx.choice = bridge, plan, options, choice
        return tuple(outputs[: bridge.n_carried])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        bridge, plan = ctx.bridge, ctx.plan
        saved, need = ctx.saved_tensors, ctx.needs_input_grad
        wanted = tuple([need[_FIRST + i] for i in bridge.positions])
        if torch.compiler.is_compiling():
            found = bridge.backward_op(*saved, *grads, *ctx.options, wanted, ctx.choice)
        else:
            if torch.is_grad_enabled():
                raise DoubleBackwardError(
                    f"{bridge.name}: backward was called with create_graph=True: expected a first derivative, got a request for a "
                    "differentiable one. To fix: leave create_graph out, or differentiate mode='reference' through torch.func."
                )
            if plan is None or torch._C._len_torch_dispatch_stack():
                bridge.count_flops()
                found = bridge.backward_op(*saved, *grads, *ctx.options, wanted, ctx.choice)
            else:
                n = bridge.n_tensors
                residuals = bridge.saved(bridge.tensors(*saved[:n]), *saved[n:])
                found = plan.backward(plan.backward_config, residuals, bridge.output_grads(*grads), ctx.options, wanted)
        result = [None] * (_FIRST + bridge.n_tensors)
        for i, want, x in zip(bridge.positions, wanted, found, strict=True):
            result[_FIRST + i] = x if want else None
        return tuple(result)


def needs_grad(bridge: Bridge, tensors: Any) -> bool:
    """Whether a tensor that may get a gradient asks for one."""
    for i in bridge.positions:
        x = tensors[i]
        if x is not None and x.requires_grad:
            return True
    return False


def _through_ops(bridge: Bridge, tensors: Any, options: Any, choice: str | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and needs_grad(bridge, tensors):
        return RecurrenceFunction.apply(bridge, None, options, choice, *tensors) + bridge.hidden
    return bridge.forward_op(*tensors, *options, False, choice)


def run(bridge: Bridge, tensors: Any, options: Any, choice: str | None) -> tuple[Any, ...]:
    """All outputs of a recurrence; None for those that carry no gradient when a gradient is recorded.

    Raises CallError for values that break the contract (packings), RefusedError where nothing may run the call.
    """
    if torch.compiler.is_compiling():
        return _through_ops(bridge, tensors, options, choice)
    if torch._C._are_functorch_transforms_active():
        bridge.check(tensors, options)
        plan = bridge.plans.lookup(tensors, options, None, choice)
        return plan.forward(plan.forward_config, tensors, options)
    if torch._C._len_torch_dispatch_stack() or not _PLAIN.issuperset(map(type, tensors)) or tensors[0].is_meta:
        bridge.count_flops()
        return _through_ops(bridge, tensors, options, choice)
    bridge.check(tensors, options)
    if torch.is_grad_enabled() and needs_grad(bridge, tensors):
        plan = bridge.plans.lookup(tensors, options, True, choice)
        return RecurrenceFunction.apply(bridge, plan, options, choice, *tensors) + bridge.hidden
    plan = bridge.plans.lookup(tensors, options, False, choice)
    return plan.forward(plan.forward_config, tensors, options)
