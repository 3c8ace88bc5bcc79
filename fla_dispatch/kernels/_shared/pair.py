"""Maps before and after a recurrence whose values and gradients are kernels of their own, where torch would take many passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from ...device import package_version, profile
from ...errors import DoubleBackwardError
from ...requirements import Gpu

Tensors = tuple[torch.Tensor | None, ...]


class Pair(NamedTuple):
    """A map of tensors and its gradient.

    forward(*tensors) -> outputs; backward(tensors, output gradients, wanted) -> a gradient for each tensor, None where not wanted
    (an output that nothing depends on has the gradient None). Numbers are bound to both. sources: the tensors that each output
    depends on, all where left out; an output has a gradient where one of them has.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[[Tensors, Tensors, tuple[bool, ...]], Tensors]
    sources: tuple[tuple[int, ...], ...] | None = None


@functools.cache
def _able(device: torch.device) -> bool:
    """Whether Triton compiles for this device, as for the variants of the rooms."""
    return Gpu().refuse_gpu(profile(device)) is None and (package_version("triton") or (0,)) >= (3, 5)


def fusable(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels may take the place of torch: plain tensors on a GPU that Triton compiles for, and nobody who looks at operations.

    A trace is left to its compiler, which fuses torch's operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    assert first is not None
    if not first.is_cuda or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or any(type(x) not in (torch.Tensor, Parameter) for x in tensors if x is not None):
        return False
    return _able(first.device)


class _Apply(torch.autograd.Function):
    """A Pair for autograd."""

    @staticmethod
    def forward(ctx: Any, pair: Pair, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.pair = pair
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = pair.forward(*tensors)
        if pair.sources is not None:
            need = ctx.needs_input_grad[1:]
            ctx.mark_non_differentiable(*[y for y, found in zip(outputs, pair.sources, strict=True) if not any(need[i] for i in found)])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                f"{ctx.pair.name}: backward was called with create_graph=True: expected a first derivative, got a request for a "
                "differentiable one. To fix: leave create_graph out, or take second derivatives through torch.func."
            )
        return None, *ctx.pair.backward(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])


def apply(pair: Pair, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The outputs, with a gradient where one is recorded."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        found: tuple[torch.Tensor, ...] = _Apply.apply(pair, *tensors)
        return found
    return pair.forward(*tensors)
