"""Estimated seconds of each variant and config, from fitted times of one step of a block (costs.json, `python -m benchmarks.fit`): what
the model of `_shared/fitted.py` needs to know of this room, and formulas for what is not fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...problem import Problem
from ...registry import Direction
from .._shared.cost import torch_seconds
from .._shared.fitted import Model, Shape, Step, Work, item_bytes, rows_of, tokens
from .._shared.launch import tile
from .configs import GluonConfig, ParallelConfig, RecurrentConfig, SegmentConfig, StatesConfig, SweepConfig

#: A head dim as the kernels pad it.
padded = tile


def kind_of(p: Problem) -> str:
    """plain | gated | normalized, or weighted: gates with beta or grouped value heads (mamba2)."""
    if p.flag("normalize") == "true":
        return "normalized"
    if p.flag("decay") != "token":
        return "plain"
    return "weighted" if p.dtype("beta") else "gated"


class Form(NamedTuple):
    """What the kernels of a config have in common with a sweep: tokens of a chunk (0: token by token) and of a segment (0: whole
    sequences), columns and warps of a block, stages; split: backward in three launches; flags: what else tells its steps from a sweep's."""

    BT: int
    SEG: int
    BE: int
    warps: int
    stages: int
    split: bool
    flags: tuple[str, ...] = ()


def form(config: Any) -> Form:
    if isinstance(config, GluonConfig):
        return Form(64, 0, 64, 16, config.stages, True, ("gluon", f"states={config.states}"))
    if isinstance(config, StatesConfig):
        return Form(config.BT, config.SEG, 64, config.BT // 16, config.stages, False, (f"heads={config.HEADS}", "states"))
    if isinstance(config, ParallelConfig):
        return Form(config.tokens, 0, 64, config.tokens // 16, config.stages, True, (f"heads={config.HEADS}", "parallel"))
    BT, SEG, stages, split = (getattr(config, name, 0) for name in ("BT", "SEG", "stages", "split"))
    return Form(BT, SEG, config.BE, config.warps, stages, bool(split))


def shape(variant: str, p: Problem, config: Any, backward: bool) -> Shape:
    """The same for variants that share kernels. Forward is one launch, whatever `split` says; a config without BT goes token by token."""
    f, wide = form(config), max(padded(p.K), padded(p.V))
    flags = f.flags + ("split",) * (f.split and backward) + ("tma",) * bool(getattr(config, "tma", False))
    return Shape(wide, kind_of(p), backward, item_bytes(p) >= 4, f.BT, f.BE, f.warps, f.stages, tuple(sorted(flags)))


def rough(s: Shape) -> Step:
    """A step by formula."""
    slower = {"plain": 1.0, "normalized": 2.4}.get(s.kind, 2.6 if s.backward else 1.8)
    slower *= (1.5, 1.5, 1.15)[s.stages] if s.stages < 3 else 1.0
    local = 0.0
    if "states" in s.flags or "parallel" in s.flags:  # chunks in any order
        local = (8.0 if s.backward else 2.0) * s.wide / 128 * s.BT / 64
    if s.BT:
        wide = {128: 1.45, 256: 4.6}.get(s.wide, 1.05 * (min(s.wide, 64) / 64) ** 0.5)
        alone = wide * slower * (s.BT * s.BE / 4096) ** 0.5 * (16 if s.full else 1)
    else:
        alone = 0.35 * slower * (s.wide / 64) ** 0.5
    return Step(alone, 0.5 * alone, 2, local)


def terms(variant: str, p: Problem, config: Any, backward: bool) -> tuple[str, ...]:
    """Names of the host's constants."""
    direction, s = "backward" if backward else "forward", shape(variant, p, config, backward)
    found = [f"{variant} {s.kind} {direction}"]
    found += [f"split {direction}"] * ("split" in s.flags) + [f"tma {variant} {direction}"] * ("tma" in s.flags)
    return (*found, *[f"packed {variant}"] * p.packed, *[f"state {direction}"] * (p.initial_state or p.final_state))


def work(p: Problem, config: Any, backward: bool) -> Work:
    """The work of a fitted variant under a config: with segments in parallel or of whole sequences; states_triton stores the states of all
    chunks on its way and then takes chunks in any order, parallel_triton takes sequences of one chunk."""
    f = form(config)
    BT, SEG, every, rows = max(1, f.BT), f.SEG, tokens(p), rows_of(p, f.SEG)
    stored, parallel = "states" in f.flags, "parallel" in f.flags
    columns = 1 if parallel else max(-(-p.K // f.BE) if backward else 1, -(-p.V // f.BE))
    launches, slices = (1, 1) if not backward else (2, 1) if stored else (3, 1) if f.split else (1, 3)
    size = item_bytes(p)
    moved = every * size * ((4 * p.K + 3 * p.V) if backward else 2 * (p.K / p.group + p.V))
    moved += every * size * stored * (5 if backward else 2) * p.K * p.V / BT
    moved += 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    passes = (2.0 if backward else 1.0) if SEG else 0.0
    states = passes * 16.0 * rows.count * p.K * p.V
    steps, second = -(-rows.mean // BT), p.device.bandwidth * 1e-6
    chunks = max(1.0, every / BT / p.device.units) if stored else max(1.0, p.BH / p.device.units) if parallel else 0.0
    return Work(
        p.device.units, rows.count * columns * slices, launches * steps, launches, launches * -(-rows.longest // BT) * rows.uneven,
        chunks, rows.count * columns * bool(passes), passes * steps, passes * rows.segments, moved / second, states / second,
    )  # fmt: skip


MODEL = Model(
    "scalar_decay", Path(__file__).with_name("costs.json"),
    {
        "sweep_triton": SweepConfig, "chunk_triton": SegmentConfig, "recurrent_triton": RecurrentConfig, "states_triton": StatesConfig,
        "parallel_triton": ParallelConfig, "sweep_gluon": GluonConfig,
    },
    shape, work, terms, rough,
)  # fmt: skip

sweep_cost, chunk_cost, recurrent_cost = (MODEL.cost(f"{name}_triton") for name in ("sweep", "chunk", "recurrent"))
states_cost, parallel_cost, gluon_cost = (MODEL.cost(name) for name in ("states_triton", "parallel_triton", "sweep_gluon"))


def torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    every, sweeps = tokens(p), 3 if direction.backward else 1
    steps = p.T / config.C + (p.N if p.packed else 0)
    states = every / config.C + p.BH
    return torch_seconds(
        p.device,
        flops=sweeps * every * 4 * (p.K * p.V + config.C * (p.K + p.V) / 2),
        bytes_moved=sweeps * 4 * 6 * (every * (p.K + p.V + config.C) + states * p.K * p.V),
        operations=30 * sweeps + 8 * sweeps * steps,
    )


def reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    steps = max(1, p.T) * (4 if direction.backward else 1)
    return torch_seconds(p.device, flops=steps * p.BH * 6 * p.K * p.V, bytes_moved=steps * p.BH * 24 * p.K * p.V, operations=12 * steps)
