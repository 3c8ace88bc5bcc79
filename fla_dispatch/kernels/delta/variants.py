"""The table of delta: every variant with what it requires, the configs it may run and, in costs.py, what it is estimated to cost."""

from __future__ import annotations

from ...registry import Recurrence, Variant
from ...requirements import DTypes, Lacks
from . import recurrence
from .configs import TorchConfig
from .costs import reference_cost, torch_cost
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FLOAT = (*HALF, "float32")

VARIANTS = (
    Variant(
        "chunk_torch", f"{__package__}.chunk_torch", (DTypes("qkv", (*FLOAT, "float64")),), torch_cost,
        lambda p: (TorchConfig(64 if p.device.is_gpu or p.T > 32 else 32),), "vectorised torch in float32: CPUs and unknown devices",
    ),
    Variant(
        "reference", f"{__package__}.reference", (Lacks(("capture",)),), reference_cost,
        summary="the equations as a loop over tokens, up to float64: meaning and oracle",
    ),
)  # fmt: skip

RECURRENCE = Recurrence(
    name="delta",
    tensors=recurrence.Tensors,
    options=recurrence.Options,
    outputs=recurrence.Outputs,
    saved=recurrence.Residuals,
    gradients=recurrence.Gradients,
    output_grads=recurrence.OutputGrads,
    differentiable=recurrence.Gradients._fields,
    empty_outputs=recurrence.empty_outputs,
    residuals=recurrence.residuals,
    check=recurrence.check,
    facts=recurrence.facts,
    problem=recurrence.problem,
    flops=recurrence.flops,
    variants=VARIANTS,
    workload=WORKLOAD,
)
