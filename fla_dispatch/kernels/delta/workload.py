"""Calls of the recurrence for tuner and proofs: inputs of a Key, the trials that prove a config, and the oracle that judges them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...problem import Problem
from ...registry import Trial, Workload
from ...sequences import SeqInfo
from .._shared import trials as shared
from .._shared.inputs import Draw, make_gates
from .._shared.layout import layout, pack_lengths, pack_tokens
from .cases import gate_gradient_scale, tolerance
from .configs import TorchConfig
from .recurrence import Gradients, Options, Tensors

#: The oracle is the loop over tokens up to this length, above it the chunked form in float64 (equal to rounding).
LOOP_UP_TO = 80


def _make(
    p: Problem, B: int, T: int, N: int, H: int, device: torch.device, seed: int, regime: str, lengths: tuple[int, ...] | None
) -> tuple[Tensors, Options]:
    """q of unit variance, k of unit length, beta in (0, 1), and with its own p, k times a number in (0.5, 1)."""
    draw, dtype, decay = Draw(device, seed), getattr(torch, str(p.dtype("qkv"))), str(p.flag("decay"))
    HV = H * p.group
    q, k = draw.normal(B, T, H, p.K), F.normalize(draw.normal(B, T, H, p.K), dim=-1)
    v = draw.normal(B, T, HV, p.V).to(dtype)
    own = (k * draw.uniform(0.5, 1.0, H, 1)).to(dtype) if p.flag("removal") == "p" else None
    beta = torch.sigmoid(draw.normal(B, T, HV)).to(getattr(torch, str(p.dtype("beta"))))
    g = None
    if decay != "none":
        shape = (B, T, HV, p.K) if decay == "channel" else (B, T, HV)
        g = make_gates(draw, regime, *shape).to(getattr(torch, str(p.dtype("g"))))
    state = torch.float64 if dtype == torch.float64 else torch.float32
    h0 = (0.5 * draw.normal(N, HV, p.K, p.V)).to(state) if p.initial_state else None
    pack = None if lengths is None else SeqInfo.from_lengths(list(lengths), device)
    packing = (None, None, None) if pack is None else (pack.cu_seqlens, pack.host, pack.segments)
    options = Options(p.K**-0.5, decay, p.flag("early") == "true", p.final_state)
    return Tensors(q.to(dtype), k.to(dtype), v, own, g, beta, h0, *packing), options


def make(p: Problem, device: torch.device, seed: int = 0) -> tuple[Tensors, Options]:
    """A realistic call whose Problem has this Key."""
    N, H, _ = layout(p)
    if not p.packed:
        return _make(p, N, p.T, N, H, device, seed, "mild", None)
    total = pack_tokens(p, N)
    return _make(p, 1, total, N, H, device, seed, "mild", pack_lengths(total, N))


def trials(p: Problem, config: Any) -> tuple[Trial, ...]:
    """The shared ones."""
    return shared.trials(p, config, gated=p.flag("decay") != "none", alone=True)


def make_trial(trial: Trial, device: torch.device, seed: int = 1) -> tuple[Tensors, Options]:
    p = trial.problem
    B = 1 if p.packed else p.N
    return _make(p, B, p.T, p.N, trial.heads // p.group, device, seed, trial.regime, trial.lengths)


def oracle(trial: Trial) -> tuple[str, Any]:
    if trial.problem.T <= LOOP_UP_TO and trial.problem.BH <= 64:
        return "reference", None
    return "chunk_torch", TorchConfig(64)


def scales(t: Tensors, gradients: Gradients) -> dict[str, float]:
    """dg sums terms that may cancel; its error is relative to them (see `gate_gradient_scale`)."""
    if gradients.g is None:
        return {}
    pairs = ((t.q, gradients.q), (t.k, gradients.k), (t.p, gradients.p))
    return {"g": gate_gradient_scale(gradients.g, *((x, dx) for x, dx in pairs if x is not None and dx is not None))}


WORKLOAD = Workload(
    make=make, proof_key=shared.proof_key, trials=trials, make_trial=make_trial, layout=layout, oracle=oracle, tolerance=tolerance,
    scales=scales, compiler=f"{__package__.rpartition('.')[0]}._shared.precompile",
)  # fmt: skip
