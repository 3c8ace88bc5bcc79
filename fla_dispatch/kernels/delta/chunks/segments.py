"""States and gradients of states at the ends of segments that run in parallel, exact: for few heads and long sequences."""

from __future__ import annotations

import torch

from .compose import run_compose
from .forward import run_forward
from .host import Call
from .reverse import run_reverse


def transitions_of(c: Call, inverse: torch.Tensor, gates: torch.Tensor | None, warps: int) -> torch.Tensor:
    """What each segment makes of the identity, [units, HV, K, K] float32."""
    found = c.q.new_empty((c.units, c.HV, c.K, c.K), dtype=torch.float32)
    run_forward(c, inverse, None, gates, warps, None, state=found, transition=True)
    return found


def states_before(
    c: Call, inverse: torch.Tensor, gates: torch.Tensor | None, transitions: torch.Tensor, warps: int, final: torch.Tensor | None
) -> torch.Tensor:
    """The state before each segment, [units, HV, K, V] float32; final is filled where given."""
    local = c.q.new_empty((c.units, c.HV, c.K, c.V), dtype=torch.float32)
    run_forward(c, inverse, None, gates, warps, None, state=local)
    return run_compose(c, transitions, local, c.h0, final, reverse=False)


def gradients_after(
    c: Call,
    do: torch.Tensor,
    s_do: int,
    inverse: torch.Tensor,
    scores: torch.Tensor,
    gates: torch.Tensor | None,
    dS: torch.Tensor | None,
    transitions: torch.Tensor,
    dh0: torch.Tensor | None,
    warps: int,
) -> torch.Tensor:
    """The gradient of the state after each segment, [units, HV, K, V] float32; dh0 is filled where given."""
    local = c.q.new_empty((c.units, c.HV, c.K, c.V), dtype=torch.float32)
    run_reverse(c, do, s_do, inverse, scores, gates, None, local, None, None, warps)
    return run_compose(c, transitions, local, dS, dh0, reverse=True)
