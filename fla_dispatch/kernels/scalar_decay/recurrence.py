"""The recurrence's interface: its tensors, options and outputs, and what can be known about a call without running it."""

from __future__ import annotations

import functools
import math
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
    g: torch.Tensor | None  # [B, T, HV] log decay per token, <= 0
    beta: torch.Tensor | None  # [B, T, HV] weight of each token's update
    skip: torch.Tensor | None  # [HV] weight of v_t itself in o_t; never with normalize
    h0: torch.Tensor | None  # [N, HV, K, V] float32, initial state
    z0: torch.Tensor | None  # [N, HV, K] float32, initial normaliser
    cu: torch.Tensor | None  # [N + 1] int, cumulative lengths of a pack (then B == 1)
    host: torch.Tensor | None  # [N + 1] int on the CPU: the same, for checks
    segments: torch.Tensor | None  # [len(SEGMENTS), N + 1] int: cumulative segment counts


class Options(NamedTuple):
    """Trace-time constants of a call.

    decay: none | token (tensor g) | retention | lightning (constants per value head, built below the op from `rate`).
    """

    scale: float
    decay: str
    rate: float
    normalize: bool
    final_state: bool


class Outputs(NamedTuple):
    """Outputs; empty(0) where not asked for."""

    o: torch.Tensor  # [B, T, HV, V], v's dtype
    state: torch.Tensor  # [N, HV, K, V] float32
    z: torch.Tensor  # [N, HV, K] float32
    weight: torch.Tensor  # [B, T, HV] float32: r_t of equation (3)


class Residuals(NamedTuple):
    """What backward needs: the inputs, and outputs where a gradient formula asks for them."""

    tensors: Tensors
    o: torch.Tensor | None  # normalize only
    weight: torch.Tensor | None  # normalize only


class Gradients(NamedTuple):
    """Gradients of the differentiable tensors, None where not wanted; also the order of `wanted`."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    g: torch.Tensor | None
    beta: torch.Tensor | None
    skip: torch.Tensor | None
    h0: torch.Tensor | None
    z0: torch.Tensor | None


class OutputGrads(NamedTuple):
    """Gradients that arrive: None where an output was not used."""

    o: torch.Tensor | None
    state: torch.Tensor | None
    z: torch.Tensor | None


@functools.cache
def log_decay(decay: str, rate: float, heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Constant log decays per value head, [HV]; built once per device.

    retention: log(1 - 2^(-5 - h)) (RetNet, section 2.1); lightning: -(8 / HV) * rate * h, the linear-bias slopes of
    Lightning Attention, where rate = 1 - layer_idx / num_layers.
    """
    with torch.inference_mode(False), torch.no_grad():
        if decay == "retention":
            values = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
        elif decay == "lightning":
            values = [-(8.0 / heads) * rate * h for h in range(heads)]
        else:
            raise AssertionError(f"no constant decay named {decay}")
        return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


def state_dtype(t: Tensors) -> torch.dtype:
    """float64 for the reference's float64 inputs, else float32."""
    return torch.float64 if t.q.dtype == torch.float64 else torch.float32


def sequences(t: Tensors) -> int:
    """N: rows of a dense batch, sequences of a pack."""
    return t.q.shape[0] if t.cu is None else t.cu.shape[0] - 1


def empty_outputs(t: Tensors, o: Options) -> tuple[torch.Tensor, ...]:
    B, T, _, K = t.q.shape
    HV, V = t.v.shape[2:]
    N, acc = sequences(t), state_dtype(t)
    return Outputs(
        o=t.v.new_empty((B, T, HV, V)),
        state=t.v.new_empty((N, HV, K, V) if o.final_state else (0,), dtype=acc),
        z=t.v.new_empty((N, HV, K) if o.final_state and o.normalize else (0,), dtype=acc),
        weight=t.v.new_empty((B, T, HV) if o.normalize else (0,), dtype=acc),
    )


def residuals(t: Tensors, out: Outputs, o: Options) -> Residuals:
    return Residuals(
        tensors=t,
        o=out.o if o.normalize else None,
        weight=out.weight if o.normalize else None,
    )


def check(t: Tensors, o: Options) -> None:
    """Checks of values, from host tensors only; nothing synchronises."""
    assert t.skip is None or not o.normalize, "equation (2)"
    if t.host is not None:
        check_lengths("scalar_decay", t.host, t.q.shape[1])


def facts(t: Tensors, o: Options) -> tuple[object, ...]:
    """Cheap facts that determine the Key: finer than it, never coarser (lengths by power of two, small counts exactly)."""
    q, _, v, g, beta, skip, h0, _, cu, _, segments = t
    _, decay, _, normalize, final_state = o
    B, T, H, K = q.shape
    _, _, HV, V = v.shape
    n = T if T <= 1 else 1 << (T - 1).bit_length()
    count = B * HV if cu is None else (cu.shape[0] - 1) * HV
    return (
        q.dtype, q.device, K, V, HV, H, n, count if count < 1024 else 1 << (count - 1).bit_length(),
        None if g is None else g.dtype, None if beta is None else beta.dtype,
        None if skip is None else skip.dtype, h0 is None,
        None if cu is None else ((cu.shape[0] - 1), -(-T // max(1, cu.shape[0] - 1)), segments is None),
        decay, normalize, final_state,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(t: Tensors, o: Options, grad: bool) -> Problem:
    T, H, K = t.q.shape[1:]
    HV, V = t.v.shape[2:]
    N = sequences(t)
    packed = t.cu is not None
    roles = [("qkv", _name(t.q.dtype))]
    roles += [(role, _name(x.dtype)) for role, x in (("g", t.g), ("beta", t.beta), ("skip", t.skip)) if x is not None]
    decay = o.decay if o.decay in ("none", "token") else "head"
    return Problem(
        recurrence="scalar_decay",
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
        flags=(("decay", decay), ("normalize", str(o.normalize).lower())),
        interpret=interpreting(),
    )


def flops(t: Tensors, o: Options) -> int:
    """Operations of the chunk form with 64-token chunks: a.b^T and P.c inside a chunk, a.S and b^T.c across."""
    B, T, _, K = t.q.shape
    HV, V = t.v.shape[2:]
    return 2 * B * T * HV * (64 * K + 64 * V + 2 * K * V)
