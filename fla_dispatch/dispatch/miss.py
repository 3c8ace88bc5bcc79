"""What happens to a call that nothing was measured for: it is remembered, and by the setting `miss` estimated, tuned or refused."""

from __future__ import annotations

import warnings

import torch

from .. import settings
from ..errors import MissError
from ..problem import Problem
from ..registry import Recurrence
from .tiers import Decision, decide

#: Keys remembered at most; a process of ever new shapes does not grow without end.
MOST = 4096

#: Keys that this process decided without a record, in order: what `distributed.prepare` and warmup may tune.
missed: dict[Problem, None] = {}

#: Seconds that one call may spend on tuning under miss=tune.
BUDGET = 60.0

_told = False


def remember(key: Problem) -> None:
    """Keep a Key that nothing was measured for."""
    if len(missed) < MOST:
        missed[key] = None


def _why_not_now(problem: Problem) -> str:
    """Why a call may not be tuned at this moment, or ''."""
    if problem.capture:
        return "a graph is being captured"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "ranks that tune for themselves would choose differently; call fla_dispatch.distributed.prepare"
    return ""


def resolve(recurrence: Recurrence, problem: Problem, decision: Decision, device: torch.device) -> Decision:
    """The decision under miss=tune or miss=error. Raises MissError under miss=error."""
    global _told
    if settings.current.miss == "error":
        raise MissError(
            f"{recurrence.name}: nothing was measured for {decision.key.text()} and the setting miss is error. To fix: run "
            "`fla-dispatch warmup` for this call, or set FLA_DISPATCH_MISS=estimate."
        )
    reason = _why_not_now(problem)
    if reason:
        if not _told:
            warnings.warn(f"{recurrence.name}: not tuned, since {reason}; the estimate stands", stacklevel=2)
        _told = True
        return decision
    from ..tuning.search import tune

    tune(recurrence, [decision.key], BUDGET, device)
    return decide(recurrence, problem, None)
