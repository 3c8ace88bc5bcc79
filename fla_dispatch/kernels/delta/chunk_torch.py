"""Equations (5) to (7) and their gradients in vectorised torch, chunks of C tokens: CPUs, unknown devices, and the oracle of long calls.

All of a chunk but its state is computed for all chunks at once: pairs, the triangular solve of (6) for values and for p exp(E), so that
w = u - f S, and products with q, k. A loop over chunks carries the state, two products a chunk; backward is a loop forward for the
states, a loop back for their gradients, and the rest at once. forward is plain differentiable torch, so it also serves under torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .._shared.chunks import Chunks, chunks_of
from .._shared.torch_math import expand_heads, outside_autocast, sum_groups
from . import MIN_LOG_DECAY
from .configs import TorchConfig
from .pairs import Gates, columns, from_start, gates, pairs, rows, to_end
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, sequences, state_dtype


class _Call(NamedTuple):
    """A call in chunks, [B, NT, HV, C, ...] in the accumulation dtype, with what (5) to (7) make of it before any state is known."""

    chunks: Chunks
    q: torch.Tensor
    k: torch.Tensor
    p: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor  # [..., C, 1]
    h0: torch.Tensor  # [N, HV, K, V]
    of_M: Gates
    of_X: Gates
    decay: torch.Tensor  # [B, NT, HV, K or 1, 1] exp(G_end): of a state over the chunk
    G: torch.Tensor  # [..., C, K or 1] exp(G): to each token
    E: torch.Tensor  # exp(E)
    end: torch.Tensor  # exp(G_end - G): from each token
    M: torch.Tensor
    X: torch.Tensor
    u: torch.Tensor  # (I + beta M)^-1 beta v
    f: torch.Tensor  # (I + beta M)^-1 beta p exp(E)


def _prepare(config: TorchConfig, t: Tensors, o: Options) -> _Call:
    acc, group = state_dtype(t), t.v.shape[2] // t.q.shape[2]
    HV, V = t.v.shape[2:]
    chunks = chunks_of(t.cu, t.q.shape[1], t.q.device, config.C)
    q, k = (chunks.split(expand_heads(x.to(acc), group)) for x in (t.q, t.k))
    p = k if t.p is None else chunks.split(expand_heads(t.p.to(acc), group))
    v, beta = chunks.split(t.v.to(acc)), chunks.split(t.beta.to(acc))[..., None]
    if t.g is None:
        g = torch.zeros_like(beta)
    else:
        g = chunks.split(t.g.to(acc).clamp(min=MIN_LOG_DECAY))
        g = g if o.decay == "channel" else g[..., None]
    h0 = t.v.new_zeros((sequences(t), HV, t.q.shape[3], V), dtype=acc) if t.h0 is None else t.h0.to(acc)
    of_M, of_X = gates(g, strict=True, early=o.early), gates(g)
    G, E, end = from_start(g).exp(), from_start(g, o.early).exp(), to_end(g).exp()
    M, X = pairs(p, k, of_M), pairs(q, k, of_X)
    solved = torch.linalg.solve_triangular(beta * M, beta * torch.cat([v, E * p], -1), upper=False, unitriangular=True)
    return _Call(chunks, q, k, p, v, beta, h0, of_M, of_X, G[..., -1:, :].mT, G, E, end, M, X, solved[..., :V], solved[..., V:])


def _walk(
    chunks: Chunks, start: torch.Tensor, advance: Callable[[int, torch.Tensor], torch.Tensor], *, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry a state from chunk to chunk: advance(j, S) is the state after chunk j of the one before it.

    Returns the states before each chunk in the order of the walk, [B, NT, HV, K, V], and the final state of each sequence.
    """
    opens, closes = (chunks.last, chunks.first) if reverse else (chunks.first, chunks.last)
    before: list[torch.Tensor] = [start] * chunks.NT
    steps = reversed(range(chunks.NT)) if reverse else range(chunks.NT)
    if chunks.sequence is None:
        S = start
        for j in steps:
            before[j] = S
            S = advance(j, S)
        final = S
    else:
        padded = final = torch.cat([start, torch.zeros_like(start[:1])])  # one extra row takes the writes of unused chunks
        S = torch.zeros_like(padded[:1])
        for j in steps:
            n = chunks.sequence[j : j + 1]
            before[j] = S = torch.where(opens[j], padded[n], S)
            S = advance(j, S)
            final = torch.where(closes[j], final.index_copy(0, n, S), final)
        final = final[:-1]
    rows_of = start.shape[0] if chunks.sequence is None else 1
    stacked = torch.stack(before, 1) if before else start.new_zeros((rows_of, 0, *start.shape[1:]))
    return stacked, final


def _states(c: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(6) and (7): the state before each chunk, and the final ones."""
    ends = c.end * c.k

    def advance(j: int, S: torch.Tensor) -> torch.Tensor:
        return c.decay[:, j] * S + ends[:, j].mT @ (c.u[:, j] - c.f[:, j] @ S)

    return _walk(c.chunks, c.h0, advance, reverse=False)


def _own(state: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """A final state as a tensor of its own: without tokens it is the initial state itself."""
    return state.clone() if state is given else state.contiguous()


@outside_autocast
def forward(config: TorchConfig, t: Tensors, o: Options) -> Outputs:
    c = _prepare(config, t, o)
    S, final = _states(c)
    out = o.scale * ((c.G * c.q) @ S + c.X @ (c.u - c.f @ S))
    return Outputs(
        o=c.chunks.join(out).to(t.v.dtype).contiguous(),
        state=_own(final, t.h0) if o.final_state else c.v.new_empty(0),
    )


@outside_autocast
def backward(config: TorchConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = _prepare(config, t, o)
    chunks, acc, group = c.chunks, state_dtype(t), t.v.shape[2] // t.q.shape[2]
    do = torch.zeros_like(c.v) if grads.o is None else o.scale * chunks.split(grads.o.to(acc))
    D_end = torch.zeros_like(c.h0) if grads.state is None else grads.state.to(acc)
    S, _ = _states(c)
    inside, reads, ends = c.X.mT @ do, c.G * c.q, c.end * c.k

    def advance(j: int, D: torch.Tensor) -> torch.Tensor:
        dw = inside[:, j] + ends[:, j] @ D
        return c.decay[:, j] * D + reads[:, j].mT @ do[:, j] - c.f[:, j].mT @ dw

    D, dh0 = _walk(chunks, D_end, advance, reverse=True)
    w = c.u - c.f @ S
    dy = torch.linalg.solve_triangular((c.beta * c.M).mT, inside + ends @ D, upper=True, unitriangular=True)
    dv = c.beta * dy
    dbeta = (dy * (c.v - (c.E * c.p) @ S - c.M @ w)).sum(-1)
    dX, dM = do @ w.mT, -dv @ w.mT
    dq = c.G * (do @ S.mT) + rows(dX, c.k, c.of_X)
    dp = rows(dM, c.k, c.of_M) - c.E * (dv @ S.mT)
    at_end = c.end * (w @ D.mT)
    dk = at_end + columns(dX, c.q, c.of_X) + columns(dM, c.p, c.of_M)
    dg = None
    if t.g is not None:
        reduce = (lambda x: x) if o.decay == "channel" else (lambda x: x.sum(-1, keepdim=True))
        dE = reduce(c.p * dp)
        last = reduce((c.k * at_end).sum(-2, keepdim=True) + (c.decay * S * D).sum(-1)[..., None, :])
        later = (reduce(c.q * dq - c.k * dk) + dE).flip(-2).cumsum(-2).flip(-2) + last
        dg = chunks.join(later - dE if o.early else later).reshape(t.g.shape).to(t.g.dtype)
    if t.p is None:
        dk = dk + dp
    found = (
        sum_groups(chunks.join(dq), group).to(t.q.dtype), sum_groups(chunks.join(dk), group).to(t.k.dtype), chunks.join(dv).to(t.v.dtype),
        None if t.p is None else sum_groups(chunks.join(dp), group).to(t.p.dtype), dg, chunks.join(dbeta).to(t.beta.dtype),
        None if t.h0 is None else dh0.to(t.h0.dtype),
    )  # fmt: skip
    return Gradients(*(x.contiguous() if want and x is not None else None for x, want in zip(found, wanted, strict=True)))
