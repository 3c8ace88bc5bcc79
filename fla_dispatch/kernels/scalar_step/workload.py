"""Steps for tuner and proofs: inputs of a Key, the trials that prove a config, and the oracle that judges them."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...problem import Problem
from ...registry import Trial, Workload
from .._shared import step_workload
from .._shared.inputs import Draw, make_gates
from .._shared.step_cases import Sizes, make_pool, make_slots, tolerance
from .._shared.step_workload import layout, oracle, proof_key, scales
from .cases import make_qkv, make_ssd
from .recurrence import Options, Tensors


def _make(p: Problem, B: int, H: int, device: torch.device, seed: int, regime: str, padded: bool) -> tuple[Tensors, Options]:
    def as_role(role: str, x: torch.Tensor) -> torch.Tensor | None:
        name = p.dtype(role)
        return None if name is None else x.to(getattr(torch, name))

    draw, dtype = Draw(device, seed), getattr(torch, str(p.dtype("qkv")))
    decay, normalize, HV = str(p.flag("decay")), p.flag("normalize") == "true", H * p.group
    s = Sizes(B, H, HV, p.K, p.V)
    q, k, v = make_qkv(draw, s, dtype, False, normalize)
    slots, S = make_slots(B, padded, device) if p.dtype("slots") else (None, B)
    if slots is not None:
        slots = slots.to(getattr(torch, str(p.dtype("slots"))))
    dt, A, bias = make_ssd(draw, s, dtype, regime)
    D = 1 + 0.1 * (draw.normal(HV, p.V) if p.flag("skip") == "channel" else draw.normal(HV))
    softplus, limit = p.flag("softplus") == "true", p.flag("limit") == "true"
    if decay == "ssd" and not (softplus and p.dtype("bias")):
        dt = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), B, HV))  # a step size as it is, not what a softplus makes one of
    g = as_role("g", dt if decay == "ssd" else make_gates(draw, regime, B, HV))
    state = make_pool(0.5 * draw.normal(S, HV, p.K, p.V), getattr(torch, str(p.dtype("state"))), False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = (0.5 + draw.uniform(0, 1, S, HV, p.K)).to(wide) if normalize else None
    scale = 1.0 if decay == "ssd" else p.K**-0.5
    options = Options(
        scale, "retention" if decay == "head" else decay, 0.0, normalize, p.flag("l2norm") == "true", softplus,
        2e-3 if limit else 0.0, 0.5 if limit else math.inf,
    )  # fmt: skip
    parts = (as_role("A", A), as_role("bias", bias), as_role("D", D), as_role("gate", draw.normal(B, HV, p.V)))
    return Tensors(q, k, v, state, z, slots, g, *parts), options


def make(p: Problem, device: torch.device, seed: int = 0) -> tuple[Tensors, Options]:
    """A realistic call whose Problem has this Key: no padding. Timed again and again its state grows by one update each time."""
    B, H, _ = layout(p)
    return _make(p, B, H, device, seed, "mild", False)


def trials(p: Problem, config: Any) -> tuple[Trial, ...]:
    return step_workload.trials(p, p.flag("decay") in ("token", "ssd"))


def make_trial(trial: Trial, device: torch.device, seed: int = 1) -> tuple[Tensors, Options]:
    p = trial.problem
    return _make(p, p.N, trial.heads // p.group, device, seed, trial.regime, True)


WORKLOAD = Workload(
    make=make, proof_key=proof_key, trials=trials, make_trial=make_trial, layout=layout, oracle=oracle, tolerance=tolerance,
    scales=scales, compiler=f"{__package__.rpartition('.')[0]}._shared.precompile",
)  # fmt: skip
