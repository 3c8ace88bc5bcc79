"""Steps for tuner and proofs: inputs of a Key, and the trials that prove a config."""

from __future__ import annotations

from typing import Any

import torch

from ...problem import Problem
from ...registry import Trial, Workload
from .._shared import step_workload
from .._shared.inputs import Draw, make_gates, make_raw_gate
from .._shared.step_cases import Sizes, make_pool, make_slots, tolerance
from .._shared.step_workload import layout, oracle, proof_key, scales
from .cases import make_qkv
from .recurrence import Options, Tensors


def _make(p: Problem, B: int, H: int, device: torch.device, seed: int, regime: str, padded: bool) -> tuple[Tensors, Options]:
    def as_role(role: str, x: torch.Tensor | None) -> torch.Tensor | None:
        name = p.dtype(role)
        return None if name is None or x is None else x.to(getattr(torch, name))

    draw, dtype, HV = Draw(device, seed), getattr(torch, str(p.dtype("qkv"))), H * p.group
    decay, weight, gate, l2norm = str(p.flag("decay")), str(p.flag("weight")), str(p.flag("gate")), p.flag("l2norm") == "true"
    n = int(p.flag("updates") or 1)
    updates = (n,) if n > 1 else ()
    q, k, v = make_qkv(draw, Sizes(B, H, HV, p.K, p.V), dtype, False, l2norm, updates)
    own = (k.to(torch.float32) * draw.uniform(0.5, 1.0, H, 1)).to(dtype) if p.flag("removal") == "p" else None
    logits = draw.normal(B, *updates, HV)
    beta = as_role("beta", torch.sigmoid(logits) if weight == "given" else logits)
    assert beta is not None, "beta is no optional tensor"
    shape = (B, HV, p.K) if decay == "channel" else (B, HV)
    g = as_role("g", make_gates(draw, regime, *shape) if gate == "given" else draw.normal(*shape))
    found = make_raw_gate(draw, torch.float32, HV, p.K if decay == "channel" else 0)
    if gate == "softplus" and regime == "strong":
        found["dt_bias"] = found["dt_bias"] * 0 + 1.2
    if gate == "softplus" and regime == "reset":  # one head forgets everything: its log decays are far below the clamp of the kernels
        found["A_log"] = torch.cat([found["A_log"][:1] * 0 + 14, found["A_log"][1:]])
    slots, S = make_slots(B, padded, device) if p.dtype("slots") else (None, B)
    if slots is not None:
        slots = slots.to(getattr(torch, str(p.dtype("slots"))))
    state = make_pool(0.5 * draw.normal(S, HV, p.K, p.V), getattr(torch, str(p.dtype("state"))), False)
    bound = -5.0 if gate == "bounded" else 0.0
    options = Options(p.K**-0.5, decay, p.flag("early") == "true", l2norm, weight, gate, bound, n)
    return Tensors(q, k, v, own, state, slots, g, beta, as_role("A_log", found["A_log"]), as_role("dt_bias", found["dt_bias"])), options


def make(p: Problem, device: torch.device, seed: int = 0) -> tuple[Tensors, Options]:
    """A realistic call whose Problem has this Key: no padding. Keys of unit length keep a state bounded that is updated again and again."""
    B, H, _ = layout(p)
    return _make(p, B, H, device, seed, "mild", False)


def trials(p: Problem, config: Any) -> tuple[Trial, ...]:
    return step_workload.trials(p, p.flag("decay") != "none")


def make_trial(trial: Trial, device: torch.device, seed: int = 1) -> tuple[Tensors, Options]:
    p = trial.problem
    return _make(p, p.N, trial.heads // p.group, device, seed, trial.regime, True)


WORKLOAD = Workload(
    make=make, proof_key=proof_key, trials=trials, make_trial=make_trial, layout=layout, oracle=oracle, tolerance=tolerance,
    scales=scales, compiler=f"{__package__.rpartition('.')[0]}._shared.precompile",
)  # fmt: skip
