"""`step_torch`: equations (1) to (7) for all rows at once, in float32: CPUs and unknown devices.

The slots that are no padding are found on the host, so a GPU is waited for when there are slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._shared.torch_math import expand_heads, outside_autocast
from . import EPS_NORM
from .recurrence import Options, Outputs, Tensors, wide


def _decay(t: Tensors, o: Options) -> torch.Tensor | None:
    """a of equation (7), [B, HV, K or 1, 1]; None for one."""
    if t.g is None:
        return None
    acc, channel = wide(t), o.decay == "channel"
    x = t.g.to(acc)
    if o.gate != "given":
        x = x if t.dt_bias is None else x + t.dt_bias.to(acc)
        rate = x.new_ones(()) if t.A_log is None else t.A_log.to(acc).exp()
        rate = rate[:, None] if channel and rate.dim() else rate
        x = -rate * F.softplus(x) if o.gate == "softplus" else o.lower_bound * torch.sigmoid(rate * x)
    return x.exp()[..., None] if channel else x.exp()[..., None, None]


def _weight(beta: torch.Tensor, o: Options) -> torch.Tensor:
    """b of equation (6)."""
    if o.weight == "given":
        return beta
    return torch.sigmoid(beta) * (2 if o.weight == "doubled" else 1)


def _read(x: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """x S: [B, HV, K] times [B, HV, K, V]."""
    return (x[..., None, :] @ S)[..., 0, :]


def _step(t: Tensors, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and state after the step, of rows that all have a slot of their own: state holds those alone."""
    group, acc = t.v.shape[-2] // t.q.shape[1], wide(t)

    def row(x: torch.Tensor) -> torch.Tensor:
        x = x.to(acc)
        return expand_heads(x * (x.square().sum(-1, keepdim=True) + EPS_NORM).rsqrt() if o.l2norm else x, group)  # (5)

    k, v, beta = ((x if o.updates > 1 else x.unsqueeze(1)).unbind(1) for x in (t.k, t.v, t.beta))
    before, a = t.state.to(acc), _decay(t, o)
    S = before if a is None else a * before  # (1)
    for k_i, v_i, beta_i in zip(k, v, beta, strict=True):
        key = row(k_i)
        removed = _read(key if t.p is None else row(t.p), before if o.early else S)
        w = _weight(beta_i.to(acc), o)[..., None] * (v_i.to(acc) - removed)  # (2)
        S = S + key[..., None] * w[..., None, :]  # (3)
    return (o.scale * _read(row(t.q), S)).to(t.v.dtype), S  # (4)


@outside_autocast
def forward(config: None, t: Tensors, o: Options) -> Outputs:
    if t.slots is None:
        y, S = _step(t, o)
        t.state.copy_(S)
        return Outputs(y.contiguous())
    live = t.slots >= 0
    rows = t.slots[live].long()
    mine = {name: x[live] for name in ("q", "k", "v", "p", "g", "beta") if (x := getattr(t, name)) is not None}
    y, S = _step(t._replace(**mine, state=t.state[rows], slots=None), o)
    t.state[rows] = S.to(t.state.dtype)
    out = t.v.new_zeros((t.q.shape[0], *t.v.shape[-2:]))
    out[live] = y
    return Outputs(out)
