"""Equations (1) to (6) as loops over rows and value heads: the meaning of a step, and the oracle. Any dtype up to float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._shared.torch_math import outside_autocast
from . import EPS, EPS_NORM
from .recurrence import Options, Outputs, Tensors, head_decay, limited, wide


def _factors(t: Tensors, o: Options, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of equation (4), numbers."""
    acc = wide(t)
    one = t.q.new_ones((), dtype=acc)
    if o.decay == "none":
        return one, one
    if o.decay == "token":
        return t.g[b, h].to(acc).exp(), one
    if o.decay != "ssd":
        return head_decay(o.decay, o.rate, t.v.shape[1], t.q.device, acc)[h], one
    d = t.g[b, h].to(acc) + (0 if t.bias is None else t.bias[h].to(acc))
    d = F.softplus(d) if o.softplus else d
    d = d.clamp(o.low, o.high) if limited(o) else d
    return (d * t.A[h].to(acc)).exp(), d


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    B, HV, _ = t.v.shape
    group, acc = HV // t.q.shape[1], wide(t)
    out = torch.zeros_like(t.v, memory_format=torch.contiguous_format)
    slots = range(B) if t.slots is None else t.slots.tolist()
    for b, s in enumerate(slots):
        for h in range(HV if s >= 0 else 0):
            q, k, v = t.q[b, h // group].to(acc), t.k[b, h // group].to(acc), t.v[b, h].to(acc)
            if o.l2norm:
                q, k = (x / ((x * x).sum() + EPS_NORM).sqrt() for x in (q, k))  # (6)
            a, weight = _factors(t, o, b, h)  # (4)
            S = a * t.state[s, h].to(acc) + weight * k[:, None] * v[None, :]  # (1)
            y = o.scale * (q @ S)  # (2)
            t.state[s, h] = S.to(t.state.dtype)
            if o.normalize:
                z = a * t.z[s, h].to(acc) + weight * k  # (3)
                y = y / (o.scale * (q @ z) + EPS)
                t.z[s, h] = z.to(t.z.dtype)
            if t.D is not None:
                y = y + t.D[h].to(acc) * v  # (5)
            if t.gate is not None:
                y = y * F.silu(t.gate[b, h].to(acc))
            out[b, h] = y.to(out.dtype)
    return Outputs(out)
