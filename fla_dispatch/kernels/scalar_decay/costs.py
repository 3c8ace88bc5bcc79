"""Estimated seconds of each variant and config, from fitted times of one step of a block (costs.json, `python -m benchmarks.fit`): what
the model of `_shared/fitted.py` needs to know of this room, and formulas for what is not fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...problem import Problem
from ...registry import Direction
from .._shared.cost import torch_seconds
from .._shared.fitted import UNTRIED, Model, Shape, Step, Work, item_bytes, rows_of, tokens
from .._shared.launch import tile
from .configs import RecurrentConfig, SegmentConfig, SweepConfig

#: A head dim as the kernels pad it.
padded = tile


def kind_of(p: Problem) -> str:
    """plain | gated | normalized, or weighted: gates with beta or grouped value heads (mamba2)."""
    if p.flag("normalize") == "true":
        return "normalized"
    if p.flag("decay") != "token":
        return "plain"
    return "weighted" if p.dtype("beta") else "gated"


def shape(variant: str, p: Problem, config: Any, backward: bool) -> Shape:
    """The same for every variant. Forward is one launch, whatever `split` says; a config without BT goes token by token."""
    BT, stages, split, tma = (getattr(config, name, 0) for name in ("BT", "stages", "split", "tma"))
    wide = max(padded(p.K), padded(p.V))
    flags = ("split",) * bool(split and backward) + ("tma",) * bool(tma)
    return Shape(wide, kind_of(p), backward, item_bytes(p) >= 4, BT, config.BE, config.warps, stages, flags)


def rough(s: Shape) -> Step:
    """A step by formula."""
    slower = {"plain": 1.0, "normalized": 2.4}.get(s.kind, 2.6 if s.backward else 1.8)
    slower *= (1.5, 1.5, 1.15)[s.stages] if s.stages < 3 else 1.0
    if s.BT:
        wide = {128: 1.45, 256: 4.6}.get(s.wide, 1.05 * (min(s.wide, 64) / 64) ** 0.5)
        alone = wide * slower * (s.BT * s.BE / 4096) ** 0.5 * (16 if s.full else 1)
    else:
        alone = 0.35 * slower * (s.wide / 64) ** 0.5
    return Step(alone, 0.5 * alone, 2)


def terms(variant: str, p: Problem, config: Any, backward: bool) -> tuple[str, ...]:
    """Names of the host's constants."""
    direction, s = "backward" if backward else "forward", shape(variant, p, config, backward)
    found = [f"{variant} {s.kind} {direction}"]
    found += [f"split {direction}"] * ("split" in s.flags) + [f"tma {variant} {direction}"] * ("tma" in s.flags)
    return (*found, *[f"packed {variant}"] * p.packed, *[f"state {direction}"] * (p.initial_state or p.final_state))


def work(p: Problem, config: Any, backward: bool) -> Work:
    """The work of a Triton variant under a config: of a SegmentConfig with segments in parallel, else of whole sequences."""
    BT, SEG = getattr(config, "BT", 1), getattr(config, "SEG", 0)
    every, rows = tokens(p), rows_of(p, SEG)
    columns = max(-(-p.K // config.BE) if backward else 1, -(-p.V // config.BE))
    launches, slices = (1, 1) if not backward else (3, 1) if getattr(config, "split", False) else (1, 3)
    size = item_bytes(p)
    moved = every * size * ((4 * p.K + 3 * p.V) if backward else 2 * (p.K / p.group + p.V))
    moved += 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    passes = (2.0 if backward else 1.0) if SEG else 0.0
    states = passes * 16.0 * rows.count * p.K * p.V
    steps, second = -(-rows.mean // max(1, BT)), p.device.bandwidth * 1e-6
    return Work(
        p.device.units, rows.count * columns * slices, launches * steps, launches, launches * -(-rows.longest // max(1, BT)) * rows.uneven,
        0.0, rows.count * columns * bool(passes), passes * steps, passes * rows.segments, moved / second, states / second,
    )  # fmt: skip


MODEL = Model(
    "scalar_decay", Path(__file__).with_name("costs.json"),
    {"sweep_triton": SweepConfig, "chunk_triton": SegmentConfig, "recurrent_triton": RecurrentConfig}, shape, work, terms, rough,
)  # fmt: skip

sweep_cost, chunk_cost, recurrent_cost = (MODEL.cost(f"{name}_triton") for name in ("sweep", "chunk", "recurrent"))


def states_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Bytes at half the bandwidth until it is fitted: states are written and read once, tensors read again for them."""
    passes, states = (10, 5) if direction.backward else (4, 2)
    wide = passes * p.V + (2 if direction.backward else 1) * 2 * p.K / p.group
    moved = item_bytes(p) * tokens(p) * (wide + states * p.K * p.V / config.BT)
    waves = max(1.0, tokens(p) / config.BT / config.HEADS / (2 * p.device.units))
    return UNTRIED * (moved / (0.5 * p.device.bandwidth) * -(-waves // 1) / waves + (10 if direction.backward else 5) * 1e-5)


def parallel_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Launches, and waves of blocks that each wait for memory a few times; untimed so far."""
    launches = 3 if direction.backward else 1
    waves = -(-p.BH // config.HEADS // p.device.units)
    return UNTRIED * launches * (2.5e-5 + waves * (config.tokens / 64) * (8e-6 + 2e-6 * config.HEADS))


def gluon_cost(p: Problem, config: Any, direction: Direction) -> float:
    """As the sweep in Triton with descriptors, and a little more until it is fitted: it is tried, and not taken unmeasured."""
    return 1.1 * sweep_cost(p, SweepConfig(64, 64, 4, config.stages, split=True, tma=True), direction)


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
