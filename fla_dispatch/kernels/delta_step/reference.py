"""Equations (1) to (7) as loops over rows, value heads and updates: the meaning of a step, and the oracle. Any dtype up to float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._shared.torch_math import outside_autocast
from . import EPS_NORM
from .recurrence import Options, Outputs, Tensors, wide


def _decay(t: Tensors, o: Options, b: int, h: int) -> torch.Tensor:
    """a of equation (7), a number or [K, 1]."""
    acc = wide(t)
    if t.g is None:
        return t.q.new_ones((), dtype=acc)
    x = t.g[b, h].to(acc)
    if o.gate != "given":
        x = x if t.dt_bias is None else x + t.dt_bias[h].to(acc)
        rate = 1 if t.A_log is None else t.A_log[h].to(acc).exp()
        x = -rate * F.softplus(x) if o.gate == "softplus" else o.lower_bound * torch.sigmoid(rate * x)
    return x.exp()[:, None] if o.decay == "channel" else x.exp()


def _weight(o: Options, beta: torch.Tensor) -> torch.Tensor:
    """b of equation (6)."""
    if o.weight == "given":
        return beta
    return torch.sigmoid(beta) * (2 if o.weight == "doubled" else 1)


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    B, n = t.q.shape[0], o.updates
    HV, V = t.v.shape[-2:]
    group, acc = HV // t.q.shape[1], wide(t)
    k, v, beta = ((x.to(acc) if n > 1 else x.to(acc).unsqueeze(1)) for x in (t.k, t.v, t.beta))  # [B, n, ...]
    p = k if t.p is None else t.p.to(acc).unsqueeze(1)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / ((x * x).sum() + EPS_NORM).sqrt() if o.l2norm else x  # (5)

    out = t.v.new_zeros((B, HV, V))
    for b, s in enumerate(range(B) if t.slots is None else t.slots.tolist()):
        for h in range(HV if s >= 0 else 0):
            before = t.state[s, h].to(acc)
            S = _decay(t, o, b, h) * before  # (1)
            for i in range(n):
                removed = unit(p[b, i, h // group]) @ (before if o.early else S)
                w = _weight(o, beta[b, i, h]) * (v[b, i, h] - removed)  # (2)
                S = S + unit(k[b, i, h // group])[:, None] * w  # (3)
            out[b, h] = (o.scale * (unit(t.q[b, h // group].to(acc)) @ S)).to(out.dtype)  # (4)
            t.state[s, h] = S.to(t.state.dtype)
    return Outputs(out)
