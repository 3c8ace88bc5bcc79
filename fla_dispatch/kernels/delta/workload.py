"""Calls of the recurrence for tuner and proofs: inputs of a Key, the trials that prove a config, and the oracle that judges them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from ...problem import Problem
from ...registry import Trial, Workload
from ...sequences import SeqInfo
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


def proof_key(p: Problem) -> Problem:
    """Lengths, heads and counts are arguments of every kernel, and no constants of one."""
    return dataclasses.replace(
        p, T=256, mean_length=256, N=1, BH=p.group * 2, grad=False, capture=False, deterministic=False, interpret=False, forced=False
    )


#: Lengths around the edges of chunks, none and one token among them.
_PACK = (0, 1, 2, 63, 64, 65, 2)


def trials(p: Problem, config: Any) -> tuple[Trial, ...]:
    """One odd length over several chunks, one token, gates under stress, and more than one wave of blocks, which is repeated."""
    few, many = (1, 1) if p.BH // p.group == 1 else (3, 16)
    waves = 5 * p.device.units  # narrow blocks share a unit by up to eight, and have several tiles of V

    def trial(name: str, N: int, T: int, heads: int, regime: str = "mild", repeats: int = 1, pack: tuple[int, ...] = ()) -> Trial:
        if p.packed:
            N, T = len(pack), sum(pack)
        sizes = dataclasses.replace(p, N=N, BH=N * heads * p.group, T=T, mean_length=-(-T // N) if p.packed else T)
        return Trial(name, sizes, heads * p.group, pack if p.packed else None, regime, repeats)

    found = [trial("odd", 2, 197, few, pack=_PACK)]
    if not p.packed:
        found.append(trial("one", 3, 1, few))
    if p.flag("decay") != "none":
        found += [trial(regime, 6, 131, few, regime, pack=(5, 0, 126, 7, 131, 3)) for regime in ("strong", "reset")]
    N = max(2, -(-waves // (many * p.group)))
    found.append(trial("wave", N, 67, many, repeats=3, pack=((67, 1, 64, 70) * N)[: N + 1]))
    return tuple(found)


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
    make=make, proof_key=proof_key, trials=trials, make_trial=make_trial, layout=layout, oracle=oracle, tolerance=tolerance,
    scales=scales, compiler=f"{__package__.rpartition('.')[0]}._shared.precompile",
)  # fmt: skip
