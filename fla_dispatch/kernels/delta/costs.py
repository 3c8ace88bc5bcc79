"""Estimated seconds of each variant, planned by formula: no variant of this room has been timed on a GPU yet."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Direction
from .._shared.cost import torch_seconds

#: Seconds of a launch with its share of the host, and of a token's step of a block that has its unit to itself: a load, two sums over K
#: that wait for each other, a store. (The sum, load and store of scalar_decay's token body take 1.4e-6 on an H200.)
LAUNCH, STEP = 2e-5, 2e-6

#: Instructions for each number of the state in a step, and their rate on one unit, per second.
INSTRUCTIONS, RATE = 6, 128 * 1.7e9


def item_bytes(p: Problem) -> int:
    """Bytes of one element of q, k and v."""
    return {"float64": 8, "float32": 4}.get(p.dtype("qkv") or "", 2)


def tokens(p: Problem) -> float:
    """Tokens times value heads: T counts one row of a dense batch, the whole of a pack."""
    return min(p.T, p.N * p.mean_length) * (p.BH / max(1, p.N)) if p.packed else float(p.T * p.BH)


def _gate_bytes(p: Problem) -> float:
    return 0.0 if p.flag("decay") == "none" else 4.0 * (p.K if p.flag("decay") == "channel" else 1)


def recurrent_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Steps in a row, each as long as its latency or as all blocks of a unit need for it. Backward is three such passes, and partial
    sums of dq, dk and dp in float32 for each tile of V."""
    columns, mean = -(-p.V // config.BV), tokens(p) / max(1, p.BH)
    longest = min(2 * mean, p.T) if p.packed and p.N > 1 else mean
    passes = 3 if direction.backward else 1
    blocks = -(-p.BH * columns // p.device.units)
    busy = blocks * p.K * config.BV * INSTRUCTIONS / RATE
    moved = passes * tokens(p) * (item_bytes(p) * (2 * p.K / p.group + 2 * p.V) + _gate_bytes(p))
    moved += direction.backward * tokens(p) * 4 * (8 * p.V + 6 * columns * p.K)
    moved += 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    return passes * (LAUNCH + longest * max(STEP, busy)) + moved / p.device.bandwidth


#: Untimed as well: seconds of a chunk of 64 tokens of a block that has its unit to itself (three products that wait for each other, with
#: rounding and a barrier before each), and the share of the matrix rate that products of 64 rows reach.
CHUNK, SHARE = 2e-6, 0.3

#: Untimed: float32 operations for each channel of a token that has its own gate, forward and further ones backward (160 and 300
#: instructions as compiled for sm90, at half of their rate).
CHANNEL, CHANNEL_BACK = 640, 1200


def chunk_cost(p: Problem, config: Any, direction: Direction) -> float:
    """Inverses of all chunks, a pass over time (backward: two), and, backward, the gradients of all chunks."""
    columns, every = -(-p.V // config.BV), tokens(p)
    mean = every / max(1, p.BH)
    longest = min(2 * mean, p.T) if p.packed and p.N > 1 else mean
    rate = SHARE * (p.device.vector_rate if p.dtype("qkv") == "float32" else p.device.matrix_rate)
    passes = 2 if direction.backward else 1
    rows, composed = float(p.BH), 0.0
    if config.SEG:  # a pass for what each segment makes of zero, another, as wide as K, of the identity; a step composes as long as a chunk
        segments = -(-longest // config.SEG)
        composed = (1 + direction.backward) * segments * CHUNK
        passes *= 2 + p.K / p.V
        rows, longest = rows * segments, min(longest, config.SEG)
    work = 2 * config.BT * config.BV * (3 * p.K + 2 * config.BT) * p.device.units / rate
    step = max(CHUNK * (0.5 + config.BT / 128), -(-rows * columns // p.device.units) * work)
    pairs = 2 * every * config.BT * (2 * p.K + 2 * config.BT) / rate
    local = 2 * every * (3 * p.K * p.V + 4 * config.BT * (p.K + p.V)) / rate if direction.backward else 0.0
    size, matrices = item_bytes(p), 4 * config.BT
    moved = every * size * ((2 + columns) * p.K / p.group + 2 * p.V + matrices)
    moved += direction.backward * every * size * (8 * p.K + 6 * p.V + 4 * p.K * p.V / config.BT + matrices)
    moved += 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))
    if p.flag("decay") == "channel":
        pairs += every * p.K * (CHANNEL + direction.backward * CHANNEL_BACK) / p.device.vector_rate
        moved += every * p.K * (7 * size + 4 + direction.backward * (14 * size + 8))
    launches = (4 if direction.backward else 2) + 3 * passes * (config.SEG > 0)
    return launches * LAUNCH + passes * -(-longest // config.BT) * step + composed + pairs + local + moved / p.device.bandwidth


def gluon_cost(p: Problem, config: Any, direction: Direction) -> float:
    """An H200 took 70 to 140 us less for the inverses of 262,144 tokens times heads."""
    return max(0.5 * chunk_cost(p, config, direction), chunk_cost(p, config, direction) - 3e-10 * tokens(p))


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
