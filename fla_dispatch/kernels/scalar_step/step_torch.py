"""`step_torch`: equations (1) to (6) for all rows at once, in float32: CPUs and unknown devices.

The slots that are no padding are found on the host, so a GPU is waited for when there are slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._shared.torch_math import expand_heads, outside_autocast
from . import EPS, EPS_NORM
from .recurrence import Options, Outputs, Tensors, head_decay, limited, wide


def _factors(t: Tensors, o: Options) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """a and b of equation (4), [B, HV] or [HV]; None for one."""
    acc = wide(t)
    if o.decay == "none":
        return None, None
    if o.decay == "token":
        return t.g.to(acc).exp(), None
    if o.decay != "ssd":
        return head_decay(o.decay, o.rate, t.v.shape[1], t.q.device, acc), None
    d = t.g.to(acc)
    d = d if t.bias is None else d + t.bias.to(acc)
    d = F.softplus(d) if o.softplus else d
    d = d.clamp(o.low, o.high) if limited(o) else d
    return (d * t.A.to(acc)).exp(), d


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPS_NORM).rsqrt()


def _step(t: Tensors, o: Options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, state and normaliser after the step, of rows that all have a slot of their own: state and z hold those alone."""
    group, acc = t.v.shape[1] // t.q.shape[1], wide(t)
    q, k, v = t.q.to(acc), t.k.to(acc), t.v.to(acc)
    if o.l2norm:
        q, k = _unit(q), _unit(k)  # (6)
    q, k = expand_heads(q, group), expand_heads(k, group)
    a, weight = _factors(t, o)  # (4)
    S, z = t.state.to(acc), None if t.z is None else t.z.to(acc)
    if weight is not None:
        k = weight[..., None] * k
    if a is not None:
        S, z = a[..., None, None] * S, None if z is None else a[..., None] * z
    S = S + k[..., None] * v[..., None, :]  # (1)
    y = o.scale * (q[..., None, :] @ S)[..., 0, :]  # (2)
    if o.normalize:
        z = z + k  # (3)
        y = y / (o.scale * (q * z).sum(-1, keepdim=True) + EPS)
    if t.D is not None:
        y = y + (t.D if t.D.dim() == 2 else t.D[:, None]).to(acc) * v  # (5)
    if t.gate is not None:
        y = y * F.silu(t.gate.to(acc))
    return y.to(t.v.dtype), S, z


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    if t.slots is None:
        y, S, z = _step(t, o)
        t.state.copy_(S)
        if o.normalize:
            t.z.copy_(z)
        return Outputs(y.contiguous())
    live = t.slots >= 0
    rows = t.slots[live].long()
    mine = {name: getattr(t, name)[live] for name in ("q", "k", "v", "g", "gate") if getattr(t, name) is not None}
    pools = {name: getattr(t, name)[rows] for name in ("state", "z") if getattr(t, name) is not None}
    y, S, z = _step(t._replace(**mine, **pools, slots=None), o)
    t.state[rows] = S.to(t.state.dtype)
    if o.normalize:
        t.z[rows] = z.to(t.z.dtype)
    out = torch.zeros_like(t.v, memory_format=torch.contiguous_format)
    out[live] = y
    return Outputs(out)
