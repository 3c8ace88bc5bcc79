"""Equations (4) to (7) in vectorised torch, chunks of C tokens: the CPU's fast path, and the fallback on unknown devices.

The part inside chunks is three batched matrix products over all chunks at once; a loop over chunks carries the state. One
function `sweep` serves the output and, with permuted arguments (5), every gradient. Packed sequences are gathered into
chunks that never cross a sequence end; the table of chunks is built from tensors, so nothing synchronises.
forward is plain differentiable torch, so it also serves under functorch transforms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._shared.chunks import Chunks, chunks_of
from .._shared.torch_math import expand_heads, outside_autocast, sum_groups
from . import EPS, MIN_LOG_DECAY
from .configs import TorchConfig
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, log_decay, sequences, state_dtype


class Sweep(NamedTuple):
    """Result of one sweep, chunked: out [B, NT, HV, C, E], state [N, HV, D, E], extra [N, HV, E or D]."""

    out: torch.Tensor
    state: torch.Tensor
    extra: torch.Tensor | None
    row_sum: torch.Tensor


def _carry(
    chunks: Chunks, start: torch.Tensor, decay: torch.Tensor, add: list[torch.Tensor], reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(7): the state before each chunk, [B, NT, HV, ...], and the final state per sequence, [N, HV, ...].

    start: [N, HV, ...]; decay: [B, NT, HV] factor of each chunk; add: per chunk [B, HV, ...].
    """
    opens, closes = (chunks.last, chunks.first) if reverse else (chunks.first, chunks.last)
    tail = (1,) * (start.dim() - 2)
    if chunks.sequence is None:
        S, final = start, start
    else:  # one extra row takes the writes of unused chunks
        final = torch.cat([start, torch.zeros_like(start[:1])])
        S = torch.zeros_like(final[:1])
        padded = final
    before: list[torch.Tensor] = [S] * chunks.NT
    for j in reversed(range(chunks.NT)) if reverse else range(chunks.NT):
        if chunks.sequence is not None:
            n = chunks.sequence[j : j + 1]
            S = torch.where(opens[j], padded[n], S)
        before[j] = S
        S = decay[:, j].view(*decay[:, j].shape, *tail) * S + add[j]
        if chunks.sequence is None:
            final = S
        else:
            final = torch.where(closes[j], final.index_copy(0, n, S), final)
    stacked = torch.stack(before, 1) if before else start.new_zeros((decay.shape[0], 0, *start.shape[1:]))
    return stacked, final if chunks.sequence is None else final[:-1]


def sweep(
    chunks: Chunks,
    a: torch.Tensor,  # [B, NT, HV, C, D]
    b: torch.Tensor,  # [B, NT, HV, C, D]
    c: torch.Tensor,  # [B, NT, HV, C, E]
    G: torch.Tensor,  # [B, NT, HV, C] inclusive cumulative log decay inside the chunk
    start: torch.Tensor,  # [N, HV, D, E]
    *,
    reverse: bool,
    col: torch.Tensor | None = None,  # [B, NT, HV, C] weight w_s of (7)
    u_row: torch.Tensor | None = None,  # [B, NT, HV, C] added to each row of a b^T
    u_col: torch.Tensor | None = None,  # the same for each column
    extra: torch.Tensor | None = None,  # [N, HV, E]: start of the state row that u multiplies
) -> Sweep:
    """f(a, b, c) of (5) with decays; reverse is f'. u adds a virtual column of ones to b (or a), its state row is `extra`."""
    total = G[..., -1:]
    order = torch.ones(chunks.C, chunks.C, dtype=torch.bool, device=G.device)
    if reverse:  # row s, column t >= s: exp(G_t - G_s)
        order, difference, to_row, to_end = order.triu(), G[..., None, :] - G[..., :, None], total - G, G
    else:  # row t, column s <= t: exp(G_t - G_s)
        order, difference, to_row, to_end = order.tril(), G[..., :, None] - G[..., None, :], G, total - G
    P = a @ b.transpose(-1, -2)
    if u_row is not None:
        P = P + u_row[..., :, None]
    if u_col is not None:
        P = P + u_col[..., None, :]
    P = P * difference.masked_fill(~order, -torch.inf).exp()
    w = to_end.exp()
    if col is not None:
        P = P * col[..., None, :]
        w = w * col
    wc = w[..., None] * c
    add = [b[:, j].transpose(-1, -2) @ wc[:, j] for j in range(chunks.NT)]
    before, state = _carry(chunks, start, total[..., 0].exp(), add, reverse)
    gate = to_row.exp()[..., None]
    out = P @ c + gate * (a @ before)
    final = None
    if extra is not None:
        rows = wc if u_col is None else u_col[..., None] * wc
        before, final = _carry(chunks, extra, total[..., 0].exp(), [rows[:, j].sum(-2) for j in range(chunks.NT)], reverse)
        lift = gate if u_row is None else gate * u_row[..., None]
        out = out + lift * before[..., None, :]
    return Sweep(out, state, final, P.sum(-1))


class _Call(NamedTuple):
    """A call in chunks, in the accumulation dtype."""

    chunks: Chunks
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    G: torch.Tensor
    beta: torch.Tensor | None
    skip: torch.Tensor | None  # [HV, 1, 1]
    h0: torch.Tensor
    z0: torch.Tensor


def _prepare(config: TorchConfig, t: Tensors, o: Options) -> _Call:
    acc, group = state_dtype(t), t.v.shape[2] // t.q.shape[2]
    HV, V = t.v.shape[2:]
    chunks = chunks_of(t.cu, t.q.shape[1], t.q.device, config.C)
    q, k = (chunks.split(expand_heads(x.to(acc), group)) for x in (t.q, t.k))
    v = chunks.split(t.v.to(acc))
    if o.decay == "token":
        g = chunks.split(t.g.to(acc).clamp(min=MIN_LOG_DECAY))
    elif o.decay == "none":
        g = torch.zeros_like(v[..., 0])
    else:
        g = log_decay(o.decay, o.rate, HV, t.v.device, acc)[:, None] * chunks.valid
    shape = (sequences(t), HV, t.q.shape[3])
    h0 = t.v.new_zeros((*shape, V), dtype=acc) if t.h0 is None else t.h0.to(acc)
    z0 = t.v.new_zeros(shape, dtype=acc) if t.z0 is None else t.z0.to(acc)
    G = g.cumsum(-1).expand(v.shape[:-1])
    beta = None if t.beta is None else chunks.split(t.beta.to(acc))
    return _Call(chunks, q, k, v, G, beta, None if t.skip is None else t.skip.to(acc)[:, None, None], h0, z0)


def _own(state: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """A final state as a tensor of its own: without tokens it is the initial state itself."""
    return state.clone() if state is given else state.contiguous()


@outside_autocast
def forward(config: TorchConfig, t: Tensors, o: Options) -> Outputs:
    c = _prepare(config, t, o)
    s = sweep(c.chunks, c.q, c.k, c.v, c.G, c.h0, reverse=False, col=c.beta)
    out, empty = o.scale * s.out, c.v.new_empty(0)
    if c.skip is not None:
        out = out + c.skip * c.v  # (2)
    z = weight = empty
    if o.normalize:
        ones = c.G.exp()  # decay of the chunk's start, as in `sweep`
        total = c.G[..., -1:]
        w = (total - c.G).exp() if c.beta is None else (total - c.G).exp() * c.beta
        rows = w[..., None] * c.k
        before, z = _carry(c.chunks, c.z0, total[..., 0].exp(), [rows[:, j].sum(-2) for j in range(c.chunks.NT)], False)
        inside = s.row_sum + ones * (c.q * before[..., None, :]).sum(-1)
        r = 1 / (o.scale * inside + EPS)  # (3)
        out = r[..., None] * out
        weight = c.chunks.join(r)
    return Outputs(
        o=c.chunks.join(out).to(t.v.dtype).contiguous(),
        state=_own(s.state, t.h0) if o.final_state else empty,
        z=_own(z, t.z0) if o.final_state and o.normalize else empty,
        weight=weight,
    )


@outside_autocast
def backward(config: TorchConfig, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    t = residuals.tensors
    c = _prepare(config, t, o)
    group = t.v.shape[2] // t.q.shape[2]
    chunks, acc = c.chunks, state_dtype(t)
    do = torch.zeros_like(c.v) if grads.o is None else chunks.split(grads.o.to(acc))
    dS = torch.zeros_like(c.h0) if grads.state is None else grads.state.to(acc)
    dz = torch.zeros_like(c.z0) if grads.z is None else grads.z.to(acc)
    r = u = None
    row = col = o.scale
    if o.normalize:
        r = chunks.split(residuals.weight.to(acc))
        u = -(do * chunks.split(residuals.o.to(acc))).sum(-1)
        row, col = o.scale * r[..., None], o.scale * r
    elif t.beta is None:
        col = torch.full_like(c.G, o.scale)
    else:
        col = torch.full_like(c.G, o.scale)
    weight = 1.0 if c.beta is None else c.beta[..., None]
    swap = lambda S: S.transpose(-1, -2)  # noqa: E731  the state of a sweep whose roles of rows and columns are exchanged
    # (5), with the scale and r_t on whichever side do stands
    dq = row * sweep(chunks, do, c.v, c.k, c.G, swap(c.h0), reverse=False, col=c.beta, u_row=u, extra=c.z0 if o.normalize else None).out
    back_k = sweep(chunks, c.v, do, c.q, c.G, swap(dS), reverse=True, col=col, u_col=u, extra=dz if o.normalize else None)
    back_v = sweep(chunks, c.k, c.q, do, c.G, dS, reverse=True, col=col)
    dk, dv = weight * back_k.out, weight * back_v.out
    dg = dbeta = dskip = None
    if t.g is not None:  # (6)
        dG = (c.q * dq).sum(-1) - (c.k * dk).sum(-1)
        inside = -dG.cumsum(-1)
        start = (c.h0 * back_v.state).sum((-1, -2))
        earlier, _ = _carry(chunks, start, torch.ones_like(dG[..., 0]), list(inside[..., -1].unbind(1)), False)
        dg = chunks.join(earlier[..., None] + inside + dG).to(t.g.dtype)
    if t.beta is not None:
        dbeta = chunks.join((c.v * back_v.out).sum(-1)).to(t.beta.dtype)
    if t.skip is not None:
        dv = dv + c.skip * do  # (8)
        dskip = (do * c.v).sum((0, 1, 3, 4)).to(t.skip.dtype)
    found = (
        sum_groups(chunks.join(dq), group).to(t.q.dtype), sum_groups(chunks.join(dk), group).to(t.k.dtype),
        chunks.join(dv).to(t.v.dtype), dg, dbeta, dskip,
        back_v.state.to(t.h0.dtype) if t.h0 is not None else None,
        back_k.extra.to(t.z0.dtype) if t.z0 is not None and back_k.extra is not None else None,
    )  # fmt: skip
    return Gradients(*(x.contiguous() if want and x is not None else None for x, want in zip(found, wanted, strict=True)))
