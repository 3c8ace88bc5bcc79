"""The table of scalar_step: every variant with what it requires, the configs it may run, and what it is estimated to cost."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Direction, Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package
from .._shared.cost import TORCH_CPU, TORCH_GPU, torch_seconds
from .._shared.launch import tile
from . import recurrence
from .configs import StepConfig
from .workload import WORKLOAD

FLOAT = ("bfloat16", "float16", "float32")
POOL = ("float32", "bfloat16")

#: Seconds of a launch, and of one trip to memory and back.
LAUNCH, TRIP = 4e-6, 2e-6

#: Bytes in flight that keep the memory of one unit busy.
IN_FLIGHT = 32_768


def _state_bytes(p: Problem) -> int:
    """Bytes of the states of all rows, read and written."""
    return 2 * p.BH * p.K * p.V * (2 if p.dtype("state") == "bfloat16" else 4)


def _configs(p: Problem) -> tuple[StepConfig, ...]:
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
    return LAUNCH + trips + _state_bytes(p) / (p.device.bandwidth * max(busy, 1e-3) * rows)


def torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    return torch_seconds(p.device, flops=6 * p.BH * p.K * p.V, bytes_moved=4 * _state_bytes(p), operations=20)


def reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    return p.BH * 15 * (TORCH_GPU if p.device.is_gpu else TORCH_CPU)


_TRITON = (
    Gpu(nvidia_min=80),
    Package("triton", (3, 5)),
    *(DTypes(role, FLOAT) for role in ("qkv", "g", "A", "bias", "D", "gate")),
    DTypes("state", POOL),
    Dim("K", 1, 256),
    Dim("V", 1, 256),
    Flag("decay", ("none", "head", "token", "ssd")),
    Lacks(("grad",)),
)

VARIANTS = (
    Variant(
        "step_triton", f"{__package__}.step_triton", _TRITON, step_cost, _configs,
        "one launch; the state is read once and written once, where it is",
    ),
    Variant(
        "step_torch", f"{__package__}.step_torch", (DTypes("qkv", (*FLOAT, "float64")), Lacks(("grad", "capture"))), torch_cost,
        summary="vectorised torch in float32: CPUs and unknown devices",
    ),
    Variant(
        "reference", f"{__package__}.reference", (Lacks(("grad", "capture")),), reference_cost,
        summary="the equations as loops over rows and heads, up to float64: meaning and oracle",
    ),
)  # fmt: skip

RECURRENCE = Recurrence(
    name="scalar_step",
    tensors=recurrence.Tensors,
    options=recurrence.Options,
    outputs=recurrence.Outputs,
    saved=recurrence.Saved,
    gradients=recurrence.Nothing,
    output_grads=recurrence.Nothing,
    differentiable=(),
    mutates=("state", "z"),
    empty_outputs=recurrence.empty_outputs,
    residuals=recurrence.residuals,
    check=recurrence.check,
    facts=recurrence.facts,
    problem=recurrence.problem,
    flops=recurrence.flops,
    variants=VARIANTS,
    workload=WORKLOAD,
)
