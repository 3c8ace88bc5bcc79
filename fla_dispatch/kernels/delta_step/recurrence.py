"""The interface of a step: its tensors, options and output, and what can be known about a call without running it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...device import interpreting, profile
from ...problem import Problem
from .._shared.steps import check_pool_layout


class Tensors(NamedTuple):
    """Inputs in the order of the equations; None where absent. state is updated in place. n only where a token has several updates."""

    q: torch.Tensor  # [B, H, K]
    k: torch.Tensor  # [B, H, K] or [B, n, H, K]
    v: torch.Tensor  # [B, HV, V] or [B, n, HV, V]
    p: torch.Tensor | None  # [B, H, K] what is removed is read with; k where absent
    state: torch.Tensor  # [S, HV, K, V] float32 or bfloat16
    slots: torch.Tensor | None  # [B] int, rows of the pool; negative: padding
    g: torch.Tensor | None  # [B, HV] or [B, HV, K] log decay, or the raw input of a gate
    beta: torch.Tensor  # [B, HV] or [B, n, HV] weight of each update, or its logit
    A_log: torch.Tensor | None  # [HV] log of a gate's rate
    dt_bias: torch.Tensor | None  # [HV] or [HV, K] added to the raw input of a gate


class Options(NamedTuple):
    """Trace-time constants of a call.

    decay: none | token (g [B, HV]) | channel (g [B, HV, K]); early: what is removed is read before the state decays; weight: given |
    sigmoid | doubled, equation (6); gate: given | softplus | bounded, equation (7); updates: of a token.
    """

    scale: float
    decay: str
    early: bool
    l2norm: bool
    weight: str
    gate: str
    lower_bound: float
    updates: int


class Outputs(NamedTuple):
    """The output of the token; the states are where they were."""

    o: torch.Tensor  # [B, HV, V], v's dtype


class Saved(NamedTuple):
    """Nothing is kept for a backward: there is none."""

    tensors: Tensors


class Nothing(NamedTuple):
    """Gradients, of inputs and of outputs: a step has none."""


def wide(t: Tensors) -> torch.dtype:
    """The dtype of the arithmetic: float64 for the reference's float64 inputs, else float32."""
    return torch.float64 if t.q.dtype == torch.float64 else torch.float32


def empty_outputs(t: Tensors, o: Options) -> tuple[torch.Tensor, ...]:
    return Outputs(t.v.new_empty((t.q.shape[0], *t.v.shape[-2:])))


def residuals(t: Tensors, out: Outputs, o: Options) -> Saved:
    return Saved(t)


def check(t: Tensors, o: Options) -> None:
    """The pool can be updated where it is."""
    check_pool_layout("step", "state", t.state)


def facts(t: Tensors, o: Options) -> tuple[object, ...]:
    """Cheap facts that determine the Key: finer than it, never coarser (small counts exactly, others by power of two)."""
    q, _, v, p, state, slots, g, beta, A_log, dt_bias = t
    _, decay, early, l2norm, weight, gate, _, updates = o
    B, H, K = q.shape
    HV, V = v.shape[-2:]
    count = B * HV
    return (
        q.dtype, q.device, K, V, HV, H, count if count < 1024 else 1 << (count - 1).bit_length(), p is None, state.dtype,
        None if slots is None else slots.dtype, None if g is None else g.dtype, beta.dtype, None if A_log is None else A_log.dtype,
        None if dt_bias is None else dt_bias.dtype, decay, early, l2norm, weight, gate, updates,
    )  # fmt: skip


def problem(t: Tensors, o: Options, grad: bool) -> Problem:
    B, H, K = t.q.shape
    HV, V = t.v.shape[-2:]
    roles = (
        ("qkv", t.q), ("state", t.state), ("slots", t.slots), ("g", t.g), ("beta", t.beta), ("A_log", t.A_log), ("dt_bias", t.dt_bias),
    )  # fmt: skip
    flags = {
        "decay": o.decay, "early": str(o.early).lower(), "removal": "k" if t.p is None else "p", "l2norm": str(o.l2norm).lower(),
        "weight": o.weight, "gate": o.gate, "updates": str(o.updates),
    }  # fmt: skip
    return Problem(
        recurrence="delta_step",
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
    """p times the state and k w^T onto it for each update, and q times it."""
    B, _, K = t.q.shape
    HV, V = t.v.shape[-2:]
    return 2 * B * HV * K * V * (2 * o.updates + 1)
