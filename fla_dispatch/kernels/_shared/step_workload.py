"""What the workloads of steps share: the layout of a Key, the Key of a proof, its trials and their oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...problem import Problem, count_bucket
from ...registry import Trial


def layout(p: Problem) -> tuple[int, int, int]:
    """(B, H, HV) of a call with this Key: up to 32 query heads, as many rows as it takes."""
    most = p.BH // p.group
    for H in (32, 16, 8, 4, 2, 1):
        if most >= H and count_bucket(most // H * H * p.group, p.device.units) == p.BH:
            return most // H, H, H * p.group
    return most, 1, p.group


def proof_key(p: Problem) -> Problem:
    """Rows and heads are arguments of the kernel, and no constants of it."""
    return dataclasses.replace(p, N=1, BH=p.group * 2, grad=False, capture=False, deterministic=False, interpret=False, forced=False)


def trials(p: Problem, gated: bool) -> tuple[Trial, ...]:
    """A few rows, padding among them where there are slots; gates under stress; and more than one wave of blocks, repeated."""
    few, many = (1, 1) if p.BH // p.group == 1 else (3, 16)

    def trial(name: str, B: int, heads: int, regime: str = "mild", repeats: int = 1) -> Trial:
        return Trial(name, dataclasses.replace(p, N=B, BH=B * heads * p.group), heads * p.group, None, regime, repeats)

    found = [trial("few", 7, few)]
    if gated:
        found += [trial(regime, 5, few, regime) for regime in ("strong", "reset")]
    waves = 5 * p.device.units
    found.append(trial("wave", max(2, -(-waves // (many * p.group))), many, repeats=3))
    return tuple(found)


def oracle(trial: Trial) -> tuple[str, Any]:
    return ("reference", None) if trial.problem.BH <= 64 else ("step_torch", None)


def scales(t: Any, gradients: Any) -> dict[str, float]:
    return {}
