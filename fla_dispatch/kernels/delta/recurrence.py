"""The recurrence's interface: its tensors, options and outputs, and what can be known about a call without running it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...device import interpreting, profile
from ...problem import Problem
from ...sequences import check_lengths


class Tensors(NamedTuple):
    """Inputs in the order of the equations; None where absent."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    p: torch.Tensor | None  # [B, T, H, K] what is removed is read with; k where absent
    g: torch.Tensor | None  # [B, T, HV] or [B, T, HV, K] log decay, <= 0
    beta: torch.Tensor  # [B, T, HV] weight of each update
    h0: torch.Tensor | None  # [N, HV, K, V] float32, initial state
    cu: torch.Tensor | None  # [N + 1] int, cumulative lengths of a pack (then B == 1)
    host: torch.Tensor | None  # [N + 1] int on the CPU: the same, for checks
    segments: torch.Tensor | None  # [len(SEGMENTS), N + 1] int: cumulative segment counts


class Options(NamedTuple):
    """Trace-time constants of a call.

    decay: none | token (g [B, T, HV]) | channel (g [B, T, HV, K]); early: what is removed is read before the state decays.
    """

    scale: float
    decay: str
    early: bool
    final_state: bool


class Outputs(NamedTuple):
    """Outputs; empty(0) where not asked for."""

    o: torch.Tensor  # [B, T, HV, V], v's dtype
    state: torch.Tensor  # [N, HV, K, V] float32


class Residuals(NamedTuple):
    """What backward needs: the inputs; the rest is computed again."""

    tensors: Tensors


class Gradients(NamedTuple):
    """Gradients of the differentiable tensors, None where not wanted; also the order of `wanted`."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    p: torch.Tensor | None
    g: torch.Tensor | None
    beta: torch.Tensor | None
    h0: torch.Tensor | None


class OutputGrads(NamedTuple):
    """Gradients that arrive: None where an output was not used."""

    o: torch.Tensor | None
    state: torch.Tensor | None


def state_dtype(t: Tensors) -> torch.dtype:
    """float64 for the reference's float64 inputs, else float32."""
    return torch.float64 if t.q.dtype == torch.float64 else torch.float32


def sequences(t: Tensors) -> int:
    """N: rows of a dense batch, sequences of a pack."""
    return t.k.shape[0] if t.cu is None else t.cu.shape[0] - 1


def empty_outputs(t: Tensors, o: Options) -> tuple[torch.Tensor, ...]:
    B, T, _, K = t.q.shape
    HV, V = t.v.shape[2:]
    return Outputs(
        o=t.v.new_empty((B, T, HV, V)),
        state=t.v.new_empty((sequences(t), HV, K, V) if o.final_state else (0,), dtype=state_dtype(t)),
    )


def residuals(t: Tensors, out: Outputs, o: Options) -> Residuals:
    return Residuals(t)


def check(t: Tensors, o: Options) -> None:
    """Checks of values, from host tensors only; nothing synchronises."""
    assert (t.g is None) == (o.decay == "none") and (t.g is None or t.g.dim() == (4 if o.decay == "channel" else 3)), "options.decay"
    if t.host is not None:
        check_lengths("delta", t.host, t.k.shape[1])


def facts(t: Tensors, o: Options) -> tuple[object, ...]:
    """Cheap facts that determine the Key: finer than it, never coarser (lengths by power of two, small counts exactly)."""
    _, k, v, p, g, beta, h0, cu, _, segments = t
    _, decay, early, final_state = o
    B, T, H, K = k.shape
    _, _, HV, V = v.shape
    n = T if T <= 1 else 1 << (T - 1).bit_length()
    count = B * HV if cu is None else (cu.shape[0] - 1) * HV
    return (
        k.dtype, k.device, K, V, HV, H, n, count if count < 1024 else 1 << (count - 1).bit_length(),
        p is None, None if g is None else g.dtype, beta.dtype, h0 is None,
        None if cu is None else ((cu.shape[0] - 1), -(-T // max(1, cu.shape[0] - 1)), segments is None),
        decay, early, final_state,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(t: Tensors, o: Options, grad: bool) -> Problem:
    T, H, K = t.k.shape[1:]  # q has fewer tokens before `delta_product` is prepared
    HV, V = t.v.shape[2:]
    N = sequences(t)
    packed = t.cu is not None
    roles = [("qkv", _name(t.q.dtype))]
    roles += [(role, _name(x.dtype)) for role, x in (("g", t.g), ("beta", t.beta)) if x is not None]
    return Problem(
        recurrence="delta",
        device=profile(t.q.device),
        dtypes=tuple(roles),
        K=K,
        V=V,
        group=HV // H,
        BH=N * HV,
        T=T,
        N=N,
        mean_length=-(-T // N) if packed and N else T,
        packed=packed,
        initial_state=t.h0 is not None,
        final_state=o.final_state,
        grad=grad,
        flags=(("decay", o.decay), ("early", str(o.early).lower()), ("removal", "k" if t.p is None else "p")),
        interpret=interpreting(),
    )


def flops(t: Tensors, o: Options) -> int:
    """Operations of the chunk form with 64-token chunks: (5), the inverse of (6) and two products with it, and four with the state."""
    B, T, _, K = t.k.shape
    HV, V = t.v.shape[2:]
    return 2 * B * T * HV * (64 * (2 * K + 2 * V) + 64 * 32 + 3 * K * V)
