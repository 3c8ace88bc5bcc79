"""The table of delta_step: every variant with what it requires, the configs it may run, and what it is estimated to cost."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Direction, Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package
from .._shared.cost import TORCH_CPU, TORCH_GPU, torch_seconds
from .._shared.step_plan import FLOAT, POOL, state_bytes, step_configs, step_cost
from . import recurrence
from .workload import WORKLOAD


def torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    return torch_seconds(p.device, flops=8 * p.BH * p.K * p.V, bytes_moved=6 * state_bytes(p), operations=25)


def reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    return p.BH * 20 * (TORCH_GPU if p.device.is_gpu else TORCH_CPU)


_TRITON = (
    Gpu(nvidia_min=80),
    Package("triton", (3, 5)),
    *(DTypes(role, FLOAT) for role in ("qkv", "g", "beta", "A_log", "dt_bias")),
    DTypes("state", POOL),
    Dim("K", 1, 256),
    Dim("V", 1, 256),
    Flag("decay", ("none", "token", "channel")),
    Lacks(("grad",)),
)

VARIANTS = (
    Variant(
        "step_triton", f"{__package__}.step_triton", _TRITON, step_cost, step_configs,
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
    name="delta_step",
    tensors=recurrence.Tensors,
    options=recurrence.Options,
    outputs=recurrence.Outputs,
    saved=recurrence.Saved,
    gradients=recurrence.Nothing,
    output_grads=recurrence.Nothing,
    differentiable=(),
    mutates=("state",),
    empty_outputs=recurrence.empty_outputs,
    residuals=recurrence.residuals,
    check=recurrence.check,
    facts=recurrence.facts,
    problem=recurrence.problem,
    flops=recurrence.flops,
    variants=VARIANTS,
    workload=WORKLOAD,
)
