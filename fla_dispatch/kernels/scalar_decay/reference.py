"""Equations (1) to (3) as a loop over t, and their gradients as a loop back: the meaning of the recurrence, and the oracle.

Any dtype up to float64, any device, packing and states. forward is plain differentiable torch.
"""

from __future__ import annotations

import itertools

import torch

from .._shared.torch_math import expand_heads, outside_autocast, sum_groups
from . import EPS
from .recurrence import Gradients, Options, OutputGrads, Outputs, Residuals, Tensors, log_decay, state_dtype


def _decays(t: Tensors, o: Options) -> torch.Tensor:
    """a_t = exp(g_t), [B, T, HV]; exp(-inf) = 0 resets the state."""
    B, T, HV = t.v.shape[:3]
    acc = state_dtype(t)
    if o.decay == "token":
        return t.g.to(acc).exp()
    if o.decay == "none":
        return t.v.new_ones((B, T, HV), dtype=acc)
    return log_decay(o.decay, o.rate, HV, t.v.device, acc).exp().expand(B, T, HV)


def _spans(t: Tensors) -> list[tuple[int, int]]:
    """Begin and end of each sequence in the time dimension; one span for all rows of a dense batch."""
    if t.cu is None:
        return [(0, t.q.shape[1])]
    ends = (t.cu if t.host is None else t.host).tolist()
    return list(itertools.pairwise(ends))


def _start(t: Tensors, n: int, *, z: bool) -> torch.Tensor:
    """S_0 or z_0 of span n, [rows, HV, K(, V)]."""
    given = t.z0 if z else t.h0
    if given is not None:
        return given.to(state_dtype(t)) if t.cu is None else given[n : n + 1].to(state_dtype(t))
    HV, V = t.v.shape[2:]
    shape = (t.q.shape[0], HV, t.q.shape[3]) + (() if z else (V,))
    return t.v.new_zeros(shape, dtype=state_dtype(t))


def _cast(t: Tensors) -> tuple[torch.Tensor, ...]:
    """q, k, v and beta in the accumulation dtype with expanded heads, [B, T, HV, ...], and skip [HV]."""
    acc, group = state_dtype(t), t.v.shape[2] // t.q.shape[2]
    q, k, v = (x.to(acc) for x in (t.q, t.k, t.v))
    beta = torch.ones_like(v[..., 0]) if t.beta is None else t.beta.to(acc)
    skip = v.new_zeros(v.shape[2]) if t.skip is None else t.skip.to(acc)
    return expand_heads(q, group), expand_heads(k, group), v, beta, skip


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    q, k, v, beta, skip = _cast(t)
    a = _decays(t, o)
    out, weights, states, normalisers = [], [], [], []
    for n, (begin, end) in enumerate(_spans(t)):
        S, z = _start(t, n, z=False), _start(t, n, z=True)
        for i in range(begin, end):
            bk = beta[:, i, :, None] * k[:, i]
            S = a[:, i, :, None, None] * S + bk[..., None] * v[:, i, :, None, :]  # (1)
            y = o.scale * torch.einsum("bhk,bhkv->bhv", q[:, i], S) + skip[:, None] * v[:, i]  # (2)
            if o.normalize:
                z = a[:, i, :, None] * z + bk  # (3)
                r = 1 / (o.scale * (q[:, i] * z).sum(-1) + EPS)
                y = r[..., None] * y
                weights.append(r)
            out.append(y)
        states.append(S)
        normalisers.append(z)
    empty = v.new_empty(0)
    none = v.new_zeros(v.shape)
    return Outputs(
        o=(torch.stack(out, 1) if out else none).to(t.v.dtype),
        state=torch.cat(states) if o.final_state else empty,
        z=torch.cat(normalisers) if o.final_state and o.normalize else empty,
        weight=(torch.stack(weights, 1) if weights else none[..., 0]) if o.normalize else empty,
    )


@outside_autocast
def backward(config: None, residuals: Residuals, grads: OutputGrads, o: Options, wanted: tuple[bool, ...]) -> Gradients:
    """The loop run backwards: with R_t = dL/dS_t and y_t = dL/dz_t,

    R_t <- R_t + scale q_t (r_t do_t)^T,   y_t <- y_t + scale u_t q_t,   u_t = -r_t (do_t . o_t)
    dq_t = scale (S_t r_t do_t + u_t z_t),  dk_t = beta_t (R_t v_t + y_t),  dv_t = beta_t R_t^T k_t + skip do_t,
    dbeta_t = k_t . (R_t v_t + y_t),  dg_t = a_t (<R_t, S_{t-1}> + y_t . z_{t-1}),  R_{t-1} = a_t R_t,  y_{t-1} = a_t y_t,
    dskip = sum_t do_t . v_t.
    """
    t = residuals.tensors
    q, k, v, beta, skip = _cast(t)
    a, group, acc = _decays(t, o), t.v.shape[2] // t.q.shape[2], state_dtype(t)
    do = torch.zeros_like(v) if grads.o is None else grads.o.to(acc)
    u = torch.zeros_like(v[..., 0])
    if o.normalize:
        u = -residuals.weight * (do * residuals.o.to(acc)).sum(-1)
        do = do * residuals.weight[..., None]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dg, dbeta, dh0, dz0 = torch.zeros_like(a), torch.zeros_like(beta), [], []
    for n, (begin, end) in enumerate(_spans(t)):
        rows = slice(None) if t.cu is None else slice(n, n + 1)
        S, z = [_start(t, n, z=False)], [_start(t, n, z=True)]
        for i in range(begin, end):
            bk = beta[:, i, :, None] * k[:, i]
            S.append(a[:, i, :, None, None] * S[-1] + bk[..., None] * v[:, i, :, None, :])
            z.append(a[:, i, :, None] * z[-1] + bk)
        R = torch.zeros_like(S[0]) if grads.state is None else grads.state[rows].to(acc)
        y = torch.zeros_like(z[0]) if grads.z is None else grads.z[rows].to(acc)
        for i in reversed(range(begin, end)):
            St, zt, Sp, zp = S[i - begin + 1], z[i - begin + 1], S[i - begin], z[i - begin]
            R = R + o.scale * q[:, i, :, :, None] * do[:, i, :, None, :]
            y = y + o.scale * u[:, i, :, None] * q[:, i]
            dq[:, i] = o.scale * (torch.einsum("bhkv,bhv->bhk", St, do[:, i]) + u[:, i, :, None] * zt)
            to_k = torch.einsum("bhkv,bhv->bhk", R, v[:, i]) + y
            dk[:, i] = beta[:, i, :, None] * to_k
            dbeta[:, i] = (k[:, i] * to_k).sum(-1)
            dv[:, i] = beta[:, i, :, None] * torch.einsum("bhkv,bhk->bhv", R, k[:, i]) + skip[:, None] * do[:, i]
            dg[:, i] = a[:, i] * ((R * Sp).sum((-1, -2)) + (y * zp).sum(-1))
            R, y = a[:, i, :, None, None] * R, a[:, i, :, None] * y
        dh0.append(R)
        dz0.append(y)

    found = (
        sum_groups(dq, group).to(t.q.dtype), sum_groups(dk, group).to(t.k.dtype), dv.to(t.v.dtype),
        dg.to(t.g.dtype) if t.g is not None else None, dbeta.to(t.beta.dtype) if t.beta is not None else None,
        (do * v).sum((0, 1, 3)).to(t.skip.dtype) if t.skip is not None else None,
        torch.cat(dh0).to(t.h0.dtype) if t.h0 is not None else None, torch.cat(dz0).to(t.z0.dtype) if t.z0 is not None else None,
    )  # fmt: skip
    return Gradients(*(x if want else None for x, want in zip(found, wanted, strict=True)))
