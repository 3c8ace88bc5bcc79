"""Estimated seconds of each variant and config, from fitted times of one step of a block (costs.json, `python -m benchmarks.fit`): what
the model of `_shared/fitted.py` needs to know of this room, and formulas for what is not fitted.

costs.json is a guess until this room has records: no step is in it, so that `rough` says them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...problem import Problem
from ...registry import Direction
from .._shared.cost import torch_seconds
from .._shared.fitted import Model, Shape, Step, Work, item_bytes, rows_of, tokens
from .._shared.launch import tile
from .configs import ChunkConfig, RecurrentConfig

#: Fields of configs that a Shape has of its own, or that say nothing of a step's time (tf32: every candidate of a Key has the same); and
#: those that one direction alone reads.
KNOWN = ("BT", "BV", "warps", "stages", "SEG", "tf32")
ALONE = {"scores": False, "parallel": True, "BK": True}

#: Instructions for each number of the state in a token's step, and their rate on one unit, per microsecond.
INSTRUCTIONS, RATE = 6, 128 * 1.7e3


def kind_of(p: Problem) -> str:
    """plain | gated | channel | removal: with a removal key of its own."""
    if p.flag("removal") == "p":
        return "removal"
    return {"token": "gated", "channel": "channel"}.get(p.flag("decay") or "", "plain")


def shape(variant: str, p: Problem, config: Any, backward: bool) -> Shape:
    """A config without BT goes token by token; a flag names the inverses of `chunk_gluon`."""
    rest = {n: x for n, x in config._asdict().items() if n not in KNOWN and ALONE.get(n, backward) == backward and x is not False}
    flags = tuple(sorted([*["gluon"] * (variant == "chunk_gluon"), *(n if x is True else f"{n}={x}" for n, x in rest.items())]))
    BT, stages = (getattr(config, n, 0) for n in ("BT", "stages"))
    return Shape(max(tile(p.K), tile(p.V)), kind_of(p), backward, item_bytes(p) >= 4, BT, config.BV, config.warps, stages, flags)


def rough(s: Shape) -> Step:
    """A step by formula: a chunk's products wait for each other, with rounding and a barrier before each; a token's step is a load, two
    sums over K that wait for each other, and a store. Both of the size that one H200 showed for gated_delta at D = 128."""
    slower = {"plain": 0.9, "gated": 1.0, "removal": 1.1}.get(s.kind, 1.3)
    if not s.BT:
        return Step(2.0 * slower, s.wide * s.BE * INSTRUCTIONS / RATE, 8)
    slower *= {128: 1.0, 256: 3.0}.get(s.wide, 0.7 * (min(s.wide, 64) / 64) ** 0.5) * (8 if s.full else 1)
    alone = (2.2 if s.backward else 1.9) * slower * (s.BT * s.BE / 4096) ** 0.5
    inverse, gradients = 3.0 if "gluon" in s.flags else 6.0, 10.0
    if s.kind == "channel":  # as compiled for sm90, at half the rate of instructions
        inverse, gradients = 7.5, 18.0
    return Step(alone, 0.7 * alone, 2, (inverse + (gradients if s.backward else 0.0)) * slower * s.BT / 64)


def terms(variant: str, p: Problem, config: Any, backward: bool) -> tuple[str, ...]:
    """Names of the host's constants."""
    direction = "backward" if backward else "forward"
    found = [f"{variant} {kind_of(p)} {direction}"]
    found += [f"segments {variant} {direction}"] * bool(getattr(config, "SEG", 0))
    found += [f"tma {variant} {direction}"] * bool(getattr(config, "tma", False))
    return (*found, *[f"packed {variant}"] * p.packed, *[f"state {direction}"] * (p.initial_state or p.final_state))


def work(p: Problem, config: Any, backward: bool) -> Work:
    """Chunks: what takes them in any order (forward: their inverses; backward: gradients too), and one pass over time (backward: two);
    with segments, a pass before for what each makes of zero (backward: both ways), another for its transition.
    Tokens: one pass (backward: three, and shares of dq, dk and dp in float32 for each tile of V)."""
    BT, SEG = getattr(config, "BT", 0), getattr(config, "SEG", 0)
    every, rows, columns, size = tokens(p), rows_of(p, SEG), -(-p.V // config.BV), item_bytes(p)
    gates = 0.0 if p.flag("decay") == "none" else 4.0 * (p.K if p.flag("decay") == "channel" else 1)
    keys = p.K / p.group * columns
    if BT:
        launches, chunks = 1 + backward, max(1.0, every / BT / p.device.units)
        moved = size * ((4 * keys + 5 * p.V + 3 * BT + 2 * p.K * p.V / BT) if backward else (2 * keys + 2 * p.V + 2 * BT))
    else:
        launches, chunks = 1 + 2 * backward, 0.0
        moved = launches * (size * (2 * p.K / p.group + 2 * p.V) + gates) + backward * 4 * (8 * p.V + 6 * columns * p.K)
    moved = every * moved + 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    passes = (2.0 + backward) if SEG else 0.0
    states = passes * 8.0 * rows.count * p.K * max(p.K, p.V)
    steps, second = -(-rows.mean // max(1, BT)), p.device.bandwidth * 1e-6
    return Work(
        p.device.units, rows.count * columns, launches * steps, launches, launches * -(-rows.longest // max(1, BT)) * rows.uneven,
        chunks, rows.count * columns * bool(passes), passes * steps, (1 + backward) * rows.segments, moved / second, states / second,
    )  # fmt: skip


MODEL = Model(
    "delta", Path(__file__).with_name("costs.json"),
    {"chunk_triton": ChunkConfig, "chunk_gluon": ChunkConfig, "recurrent_triton": RecurrentConfig}, shape, work, terms, rough,
)  # fmt: skip

recurrent_cost, chunk_cost, gluon_cost = map(MODEL.cost, ("recurrent_triton", "chunk_triton", "chunk_gluon"))


def torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    every, times = tokens(p), 3 if direction.backward else 1
    channels = p.K if p.flag("decay") == "channel" else 1
    steps = p.T / config.C + (p.N if p.packed else 0)
    return torch_seconds(
        p.device,
        flops=times * every * (6 * p.K * p.V + 4 * config.C * (p.K + p.V) + 48 * channels),
        bytes_moved=times * every * 4 * (10 * (p.K + p.V) + 6 * config.C + 64 * channels),
        operations=50 * times + 8 * times * steps,
    )


def reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    steps = max(1, p.T) * (4 if direction.backward else 1)
    return torch_seconds(p.device, flops=steps * p.BH * 10 * p.K * p.V, bytes_moved=steps * p.BH * 40 * p.K * p.V, operations=16 * steps)
