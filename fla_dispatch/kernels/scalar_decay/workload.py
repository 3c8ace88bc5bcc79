"""Calls of the recurrence for tuner and proofs: inputs of a Key, the trials that prove a config, and the oracle that judges them."""

from __future__ import annotations

import math
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


def _gates(draw: Draw, p: Problem, regime: str, *shape: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """g and beta, [B, T, HV]. With beta the distribution of Mamba-2's layer: d_t in (0.001, 0.1), g = -d_t A, A in (1, 16)."""
    g_dtype, beta_dtype = p.dtype("g"), p.dtype("beta")
    beta = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), *shape)) if beta_dtype else None
    g = None
    if g_dtype:
        g = -beta * draw.uniform(1.0, 16.0, *shape[2:]) if beta is not None and regime == "mild" else make_gates(draw, regime, *shape)
        g = g.to(getattr(torch, g_dtype))
    return g, None if beta is None else beta.to(getattr(torch, str(beta_dtype)))


def _make(
    p: Problem, B: int, T: int, N: int, H: int, device: torch.device, seed: int, regime: str, lengths: tuple[int, ...] | None
) -> tuple[Tensors, Options]:
    draw, dtype = Draw(device, seed), getattr(torch, str(p.dtype("qkv")))
    HV, normalize, decay = H * p.group, p.flag("normalize") == "true", str(p.flag("decay"))
    q, k = draw.normal(B, T, H, p.K), draw.normal(B, T, H, p.K)
    if normalize:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    k = F.normalize(k, dim=-1).to(dtype)
    q, v = q.to(dtype), draw.normal(B, T, HV, p.V).to(dtype)
    g, beta = _gates(draw, p, regime, B, T, HV)
    skip_dtype = p.dtype("skip")
    skip = (1 + 0.1 * draw.normal(HV)).to(getattr(torch, skip_dtype)) if skip_dtype else None
    state = torch.float64 if dtype == torch.float64 else torch.float32
    h0 = (0.5 * draw.normal(N, HV, p.K, p.V)).to(state) if p.initial_state else None
    z0 = (0.5 + draw.uniform(0, 1, N, HV, p.K)).to(state) if p.initial_state and normalize else None
    pack = None if lengths is None else SeqInfo.from_lengths(list(lengths), device)
    packing = (None, None, None) if pack is None else (pack.cu_seqlens, pack.host, pack.segments)
    options = Options(p.K**-0.5, "retention" if decay == "head" else decay, 0.0, normalize, p.final_state)
    return Tensors(q, k, v, g, beta, skip, h0, z0, *packing), options


def make(p: Problem, device: torch.device, seed: int = 0) -> tuple[Tensors, Options]:
    """A realistic call whose Problem has this Key."""
    N, H, _ = layout(p)
    if not p.packed:
        return _make(p, N, p.T, N, H, device, seed, "mild", None)
    return _make(p, 1, pack_tokens(p, N), N, H, device, seed, "mild", pack_lengths(pack_tokens(p, N), N))


def trials(p: Problem, config: Any) -> tuple[Trial, ...]:
    """The shared ones; normalised without a state one token gives o = v, and the gradients of q and k are rounding alone."""
    alone = p.initial_state or p.flag("normalize") != "true"
    return shared.trials(p, config, gated=p.flag("decay") == "token", alone=alone)


def make_trial(trial: Trial, device: torch.device, seed: int = 1) -> tuple[Tensors, Options]:
    p = trial.problem
    B = 1 if p.packed else p.N
    return _make(p, B, p.T, p.N, trial.heads // p.group, device, seed, trial.regime, trial.lengths)


def oracle(trial: Trial) -> tuple[str, Any]:
    if trial.problem.T <= LOOP_UP_TO and trial.problem.BH <= 64:
        return "reference", None
    return "chunk_torch", TorchConfig(64)


def scales(t: Tensors, gradients: Gradients) -> dict[str, float]:
    """dg sums terms q . dq that may cancel; its error is relative to them (see `gate_gradient_scale`)."""
    if gradients.g is None or gradients.q is None:
        return {}
    return {"g": max(gradients.g.norm().item(), gate_gradient_scale(gradients.g[:, :0], t.q, gradients.q))}


WORKLOAD = Workload(
    make=make, proof_key=shared.proof_key, trials=trials, make_trial=make_trial, layout=layout, oracle=oracle, tolerance=tolerance,
    scales=scales, compiler=f"{__package__.rpartition('.')[0]}._shared.precompile",
)  # fmt: skip
