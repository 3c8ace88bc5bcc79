"""The table of delta: every variant with what it requires, the configs it may run and, in costs.py, what it is estimated to cost."""

from __future__ import annotations

from ...problem import Problem
from ...registry import Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package
from .._shared.launch import tile
from . import recurrence
from .configs import RecurrentConfig, TorchConfig
from .costs import recurrent_cost, reference_cost, torch_cost
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FLOAT = (*HALF, "float32")


def _recurrent_configs(p: Problem) -> tuple[RecurrentConfig, ...]:
    """Tiles whose float32 state is at most 64 registers a thread, or 128 where it is 16 columns wide. One warp sums over K without a
    barrier; wide tiles write fewer shares of gradients. None has been timed."""
    K, V = tile(p.K), tile(p.V)
    tiles = ((16, 1), (16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8), (16, 4))
    most = {16: 128}  # registers a thread
    found = [RecurrentConfig(BV, warps) for BV, warps in tiles if BV <= V and K * BV // (32 * warps) <= most.get(BV, 64)]
    return tuple(found) or (RecurrentConfig(16, 4),)


_TRITON = (
    Gpu(nvidia_min=80),
    Package("triton", (3, 5)),
    DTypes("qkv", FLOAT),
    DTypes("g", FLOAT),
    DTypes("beta", FLOAT),
    Dim("K", 1, 256),
    Dim("V", 1, 256),
    Flag("decay", ("none", "token", "channel")),
)

VARIANTS = (
    Variant(
        "recurrent_triton", f"{__package__}.recurrent_triton", _TRITON, recurrent_cost, _recurrent_configs,
        "token by token in float32, forward and backward: decode and short lengths",
    ),
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
