"""Equations (1) to (4) as a loop over t, and (8) to (10) as a loop back: the meaning of the recurrence, and the oracle.

Any dtype up to float64, any device, packing and states. forward is plain differentiable torch. The gradient of a gate is the direct
one, a_t rowsum(S_{t-1} dR_t), not the sum over tokens of (10).
"""

from __future__ import annotations

import itertools

import torch

from .._shared.torch_math import expand_heads, outside_autocast, sum_groups
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, state_dtype


def _decays(t: Tensors, o: Options) -> torch.Tensor:
    """a_t = exp(g_t), [B, T, HV, K or 1, 1]; exp(-inf) = 0 resets the state."""
    acc = state_dtype(t)
    if t.g is None:
        return t.v.new_ones((*t.v.shape[:3], 1, 1), dtype=acc)
    a = t.g.to(acc).exp()[..., None]
    return a if o.decay == "channel" else a[..., None]


def _spans(t: Tensors) -> list[tuple[int, int]]:
    """Begin and end of each sequence in the time dimension; one span for all rows of a dense batch."""
    if t.cu is None:
        return [(0, t.q.shape[1])]
    ends = (t.cu if t.host is None else t.host).tolist()
    return list(itertools.pairwise(ends))


def _start(t: Tensors, n: int) -> torch.Tensor:
    """S_0 of span n, [rows, HV, K, V]."""
    if t.h0 is not None:
        return t.h0.to(state_dtype(t)) if t.cu is None else t.h0[n : n + 1].to(state_dtype(t))
    HV, V = t.v.shape[2:]
    return t.v.new_zeros((t.q.shape[0], HV, t.q.shape[3], V), dtype=state_dtype(t))


def _cast(t: Tensors) -> tuple[torch.Tensor, ...]:
    """q, k, p, v and beta in the accumulation dtype with expanded heads, [B, T, HV, ...]."""
    acc, group = state_dtype(t), t.v.shape[2] // t.q.shape[2]
    q, k, p = (expand_heads(x.to(acc), group) for x in (t.q, t.k, t.k if t.p is None else t.p))
    return q, k, p, t.v.to(acc), t.beta.to(acc)


def _read(x: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """x S: [B, HV, K] times [B, HV, K, V]."""
    return torch.einsum("bhk,bhkv->bhv", x, S)


def _outer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y^T, [B, HV, K, V]."""
    return x[..., :, None] * y[..., None, :]


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    q, k, p, v, beta = _cast(t)
    a = _decays(t, o)
    out, states = [], []
    for n, (begin, end) in enumerate(_spans(t)):
        S = _start(t, n)
        for i in range(begin, end):
            R = a[:, i] * S  # (1)
            e = v[:, i] - _read(p[:, i], S if o.early else R)
            S = R + _outer(k[:, i], beta[:, i, :, None] * e)  # (2), (3)
            out.append(o.scale * _read(q[:, i], S))  # (4)
        states.append(S)
    return Outputs(
        o=(torch.stack(out, 1) if out else v.new_zeros(v.shape)).to(t.v.dtype),
        state=torch.cat(states) if o.final_state else v.new_empty(0),
    )


@outside_autocast
def backward(config: None, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    q, k, p, v, beta = _cast(t)
    a, group, acc = _decays(t, o), t.v.shape[2] // t.q.shape[2], state_dtype(t)
    do = torch.zeros_like(v) if grads.o is None else grads.o.to(acc)
    dq, dk, dp, dv, dbeta = (torch.zeros_like(x) for x in (q, k, p, v, beta))
    da, dh0 = torch.zeros_like(a), []
    for n, (begin, end) in enumerate(_spans(t)):
        rows = slice(None) if t.cu is None else slice(n, n + 1)
        S, e = [_start(t, n)], []
        for i in range(begin, end):
            R = a[:, i] * S[-1]
            e.append(v[:, i] - _read(p[:, i], S[-1] if o.early else R))
            S.append(R + _outer(k[:, i], beta[:, i, :, None] * e[-1]))
        D = torch.zeros_like(S[0]) if grads.state is None else grads.state[rows].to(acc)
        for i in reversed(range(begin, end)):
            before, after, error = S[i - begin], S[i - begin + 1], e[i - begin]
            D = D + o.scale * _outer(q[:, i], do[:, i])  # (8)
            dw = torch.einsum("bhkv,bhk->bhv", D, k[:, i])
            dv[:, i] = beta[:, i, :, None] * dw
            dbeta[:, i] = (dw * error).sum(-1)
            dq[:, i] = o.scale * torch.einsum("bhkv,bhv->bhk", after, do[:, i])  # (9)
            dk[:, i] = torch.einsum("bhkv,bhv->bhk", D, beta[:, i, :, None] * error)
            dp[:, i] = -torch.einsum("bhkv,bhv->bhk", before if o.early else a[:, i] * before, dv[:, i])
            removed = _outer(p[:, i], dv[:, i])
            dR = D if o.early else D - removed
            da[:, i] = (dR * before).sum((-1, -2) if a.shape[-2] == 1 else -1, keepdim=True)
            D = a[:, i] * dR - removed if o.early else a[:, i] * dR
        dh0.append(D)
    if t.p is None:
        dk, dp = dk + dp, None
    dg = None if t.g is None else (a * da).reshape(t.g.shape).to(t.g.dtype)
    found = (
        sum_groups(dq, group).to(t.q.dtype), sum_groups(dk, group).to(t.k.dtype), dv.to(t.v.dtype),
        None if dp is None or t.p is None else sum_groups(dp, group).to(t.p.dtype), dg, dbeta.to(t.beta.dtype),
        None if t.h0 is None else torch.cat(dh0).to(t.h0.dtype),
    )  # fmt: skip
    return Gradients(*(x if want else None for x, want in zip(found, wanted, strict=True)))
