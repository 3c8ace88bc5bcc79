"""The interface of a step: its tensors, options and output, and what can be known about a call without running it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...device import interpreting, profile
from ...problem import Problem
from .._shared.steps import check_pool_layout


class Tensors(NamedTuple):
    """Inputs in the order of the equations; None where absent. state and z are updated in place."""

    q: torch.Tensor  # [B, H, K]
    k: torch.Tensor  # [B, H, K]
    v: torch.Tensor  # [B, HV, V]
    state: torch.Tensor  # [S, HV, K, V] float32 or bfloat16
    z: torch.Tensor | None  # [S, HV, K] float32
    slots: torch.Tensor | None  # [B] int, rows of the pools; negative: padding
    g: torch.Tensor | None  # [B, HV] log decay (decay token), or raw step size dt (decay ssd)
    A: torch.Tensor | None  # [HV] rate of decay (ssd)
    bias: torch.Tensor | None  # [HV] added to dt (ssd)
    D: torch.Tensor | None  # [HV] or [HV, V] skip
    gate: torch.Tensor | None  # [B, HV, V] gate of the output


class Options(NamedTuple):
    """Trace-time constants of a call.

    decay: none | token (g) | ssd (g, A: equation (4)) | retention | lightning (constants per value head, from `rate`);
    low, high: limits of a step size.
    """

    scale: float
    decay: str
    rate: float
    normalize: bool
    l2norm: bool
    softplus: bool
    low: float
    high: float


class Outputs(NamedTuple):
    """The output of the token; the states are where they were."""

    o: torch.Tensor  # [B, HV, V], v's dtype


class Saved(NamedTuple):
    """Nothing is kept for a backward: there is none."""

    tensors: Tensors


class Nothing(NamedTuple):
    """Gradients, of inputs and of outputs: a step has none."""


@functools.cache
def head_decay(decay: str, rate: float, heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Constant decays a_h per value head, [HV]; built once per device.

    retention: 1 - 2^(-5 - h); lightning: exp(-(8 / HV) * rate * h). See the ops of these names.
    """
    with torch.inference_mode(False), torch.no_grad():
        if decay == "retention":
            values = [1.0 - 2.0 ** (-5 - h) for h in range(heads)]
        elif decay == "lightning":
            values = [math.exp(-(8.0 / heads) * rate * h) for h in range(heads)]
        else:
            raise AssertionError(f"no constant decay named {decay}")
        return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


def limited(o: Options) -> bool:
    """Whether the limits of a step size change any: a softplus is positive."""
    return o.decay == "ssd" and (o.high != math.inf or o.low > 0.0 or not o.softplus)


def wide(t: Tensors) -> torch.dtype:
    """The dtype of the arithmetic: float64 for the reference's float64 inputs, else float32."""
    return torch.float64 if t.q.dtype == torch.float64 else torch.float32


def empty_outputs(t: Tensors, o: Options) -> tuple[torch.Tensor, ...]:
    return Outputs(t.v.new_empty(t.v.shape))


def residuals(t: Tensors, out: Outputs, o: Options) -> Saved:
    return Saved(t)


def check(t: Tensors, o: Options) -> None:
    """The pools can be updated where they are."""
    check_pool_layout("step", "state", t.state)
    if t.z is not None:
        check_pool_layout("step", "z", t.z)


def facts(t: Tensors, o: Options) -> tuple[object, ...]:
    """Cheap facts that determine the Key: finer than it, never coarser (small counts exactly, others by power of two)."""
    q, _, v, state, _, slots, g, A, bias, D, gate = t
    B, H, K = q.shape
    _, HV, V = v.shape
    count = B * HV
    return (
        q.dtype, q.device, K, V, HV, H, count if count < 1024 else 1 << (count - 1).bit_length(), state.dtype,
        None if slots is None else slots.dtype, None if g is None else g.dtype, None if A is None else A.dtype,
        None if bias is None else bias.dtype, None if D is None else (D.dtype, D.dim()), None if gate is None else gate.dtype,
        o.decay, o.normalize, o.l2norm, o.softplus, limited(o),
    )  # fmt: skip


def problem(t: Tensors, o: Options, grad: bool) -> Problem:
    _, H, K = t.q.shape
    B, HV, V = t.v.shape
    roles = (
        ("qkv", t.q), ("state", t.state), ("slots", t.slots), ("g", t.g), ("A", t.A), ("bias", t.bias), ("D", t.D), ("gate", t.gate),
    )  # fmt: skip
    flags = {
        "decay": o.decay if o.decay in ("none", "token", "ssd") else "head",
        "normalize": str(o.normalize).lower(),
        "l2norm": str(o.l2norm).lower(),
    }
    if o.decay == "ssd":
        flags["softplus"], flags["limit"] = str(o.softplus).lower(), str(limited(o)).lower()
        flags["skip"] = "none" if t.D is None else "head" if t.D.dim() == 1 else "channel"
    return Problem(
        recurrence="scalar_step",
        device=profile(t.q.device),
        dtypes=tuple((role, str(x.dtype).removeprefix("torch.")) for role, x in roles if x is not None),
        K=K,
        V=V,
        group=HV // H,
        BH=B * HV,
        T=1,
        N=B,
        mean_length=1,
        packed=False,
        initial_state=True,
        final_state=True,
        grad=grad,
        flags=tuple(flags.items()),
        interpret=interpreting(),
    )


def flops(t: Tensors, o: Options) -> int:
    """k v^T onto the state, and q times it."""
    B, HV, V = t.v.shape
    return 4 * B * HV * t.q.shape[2] * V
