"""What layers do to their projections before the recurrence, as differentiable torch: `Lowering.prepare` of every op of the room.

    q, k, p <- x rsqrt(sum x^2 + 1e-6)                                                   (rounded to the inputs' dtype)
    beta <- sigmoid(beta), doubled for negative eigenvalues of the transition
    g <- -exp(A_log) softplus(g + dt_bias), or with a lower bound: lower_bound sigmoid(exp(A_log) (g + dt_bias))
    n updates per token: q and the output at the last of n, the gate at the first

Computed in float32 (float64 for float64 inputs). On a GPU that Triton compiles for, all but the last line runs in the kernels of `raw/`
(decision 0012), which are tested against this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .._shared.delta_contract import Gate
from .._shared.pair import apply, fusable
from . import NORM_EPS
from .recurrence import Tensors


def normalized(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Rows of unit length (short ones are shorter), in x's dtype."""
    w = x.to(wide)
    return (w * torch.rsqrt((w * w).sum(-1, keepdim=True) + NORM_EPS)).to(x.dtype)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The logistic function, with a gradient that keeps its digits where it saturates: sigmoid(-x), not 1 - sigmoid(x)."""
    return F.logsigmoid(x).exp()


def weight(beta: torch.Tensor, doubled: bool, wide: torch.dtype) -> torch.Tensor:
    """The weight of an update from its logit: in (0, 1), or in (0, 2)."""
    x = sigmoid(beta.to(wide))
    return 2 * x if doubled else x


def log_decay(g: torch.Tensor, gate: Gate, wide: torch.dtype) -> torch.Tensor:
    """The log decay from raw input g [B, T, HV] or [B, T, HV, K]."""
    x = g.to(wide)
    if gate.dt_bias is not None:
        x = x + gate.dt_bias.to(wide)
    rate = None if gate.A_log is None else gate.A_log.to(wide).exp()
    if rate is not None and g.dim() == 4:
        rate = rate[:, None]
    if gate.lower_bound is not None:
        return gate.lower_bound * sigmoid(x if rate is None else rate * x)
    assert rate is not None, "the contract asks for A_log or lower_bound"
    return -rate * F.softplus(x)


def last_of(x: torch.Tensor, n: int) -> torch.Tensor:
    """[B, T, ...] at the last of n updates of each token, zeros at the others: [B, T * n, ...]."""
    return F.pad(x.unsqueeze(2), (0, 0) * (x.dim() - 2) + (n - 1, 0)).flatten(1, 2)


def first_of(x: torch.Tensor, n: int) -> torch.Tensor:
    """The same at the first."""
    return F.pad(x.unsqueeze(2), (0, 0) * (x.dim() - 2) + (0, n - 1)).flatten(1, 2)


#: Rows and tokens are counted in 32 bits by the kernels, which hold whole rows of at most so many entries.
_MOST_ROWS, _WIDEST = 2**31 - 2**16, 1024


def unit_rows(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor | None, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and p (None where absent) normalised."""
    B, T, H, K = k.shape
    if wide is torch.float32 and fusable(q, k, p) and K <= _WIDEST and B * T * H < _MOST_ROWS:
        from .raw import pairs

        found = apply(pairs.rows(p is not None), q, k, p)
        return found if p is not None else (*found, None)
    return normalized(q, wide), normalized(k, wide), None if p is None else normalized(p, wide)


def vectors(
    logits: torch.Tensor | None, doubled: bool, raw: torch.Tensor | None, gate: Gate | None, wide: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(beta, g): the weights of logits and the log decays of a raw gate; None where these are absent (raw: as gate is)."""
    some = raw if logits is None else logits
    assert some is not None
    A_log, dt_bias, bound = (None, None, None) if gate is None else gate
    if wide is torch.float32 and fusable(some, raw, A_log, dt_bias) and some.shape[0] * some.shape[1] < _MOST_ROWS:
        from .raw import pairs

        kind = "given" if gate is None else "softplus" if bound is None else "bounded"
        found = iter(apply(pairs.vectors(logits is not None, kind, doubled, bound or 0.0), logits, raw, A_log, dt_bias))
        return None if logits is None else next(found), None if gate is None else next(found)
    beta = None if logits is None else weight(logits, doubled, wide)
    return beta, None if raw is None or gate is None else log_decay(raw, gate, wide)


def preparation(
    *, norm: bool, logits: bool, doubled: bool, gate: Gate | None, updates: int, wide: torch.dtype
) -> Callable[[Tensors], Tensors] | None:
    """The prepare of a Lowering, or None where there is nothing to do; updates: per token, in k, v and beta."""
    if not (norm or logits or gate is not None or updates > 1):
        return None

    def prepare(t: Tensors) -> Tensors:
        q, k, v, p, g, beta, h0, cu, host, segments = t
        if norm:
            q, k, p = unit_rows(q, k, p, wide)
        if logits or gate is not None:
            made = vectors(beta if logits else None, doubled, None if gate is None else g, gate, wide)
            beta, g = beta if made[0] is None else made[0], g if made[1] is None else made[1]
        if updates > 1:
            q, g = last_of(q, updates), None if g is None else first_of(g, updates)
            if cu is not None:
                cu, host, segments = cu * updates, None if host is None else host * updates, None
        return Tensors(q, k, v, p, g, beta, h0, cu, host, segments)

    return prepare
