"""How steps are planned, without any kernel code: the config of a kernel, the configs of a Key, and what a step is estimated to take."""

from __future__ import annotations

from typing import NamedTuple

from ...problem import Problem
from ...registry import Direction
from .launch import tile

FLOAT = ("bfloat16", "float16", "float32")
POOL = ("float32", "bfloat16")

#: Seconds of a launch, and of one trip to memory and back.
LAUNCH, TRIP = 4e-6, 2e-6

#: Bytes in flight that keep the memory of one unit busy.
IN_FLIGHT = 32_768


class StepConfig(NamedTuple):
    """BV: columns of the state that a block holds; warps of a block."""

    BV: int
    warps: int


def state_bytes(p: Problem) -> int:
    """Bytes of the states of all rows, read and written."""
    return 2 * p.BH * p.K * p.V * (2 if p.dtype("state") == "bfloat16" else 4)


def step_configs(p: Problem) -> tuple[StepConfig, ...]:
    """Tiles whose float32 state is at most 64 registers a thread, or 128 where it is 16 columns wide; widest first: rows of 256 bytes
    reached 4 TB/s in `recurrent_triton`'s decode at D = 128, narrow tiles make blocks where rows are few; not measured for steps yet."""
    K, V = tile(p.K), tile(p.V)
    tiles = ((64, 4), (64, 8), (128, 8), (32, 4), (32, 2), (16, 2), (16, 4), (16, 1))
    most = {16: 128}  # registers a thread
    found = [StepConfig(BV, warps) for BV, warps in tiles if BV <= V and K * BV // (32 * warps) <= most.get(BV, 64)]
    return tuple(found) or (StepConfig(16, 4),)


def step_cost(p: Problem, config: StepConfig, direction: Direction) -> float:
    """Bytes at the rate that the blocks draw, by what they have in flight and by how many units they reach, where one unit draws up to
    twice its share; rows of a tile shorter than 256 bytes waste some."""
    tiles = -(-p.V // config.BV)
    blocks = p.BH * (1 if p.flag("normalize") == "true" else tiles)
    size = 2 if p.dtype("state") == "bfloat16" else 4
    share = max(1, blocks) / p.device.units
    busy = min(1.0, share * tile(p.K) * config.BV * size / IN_FLIGHT, 2 * share)
    rows = min(1.0, (config.BV * size / 256) ** 0.15)
    trips = TRIP * (tiles if p.flag("normalize") == "true" else 1)
    return LAUNCH + trips + state_bytes(p) / (p.device.bandwidth * max(busy, 1e-3) * rows)
