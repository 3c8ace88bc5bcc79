"""The table of scalar_decay: every variant with what it requires, the configs it may run and, in costs.py, what it costs."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package, Rule, SharedMemory
from . import recurrence
from .configs import RecurrentConfig, SegmentConfig, SweepConfig, TorchConfig
from .costs import chunk_cost, item_bytes, padded, recurrent_cost, reference_cost, sweep_cost, tokens, torch_cost
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FLOAT = (*HALF, "float32")


# -- configs -----------------------------------------------------------------------------------------------------------------


def _shared_bytes(p: Problem, c: SweepConfig) -> int:
    """Shared memory of one sweep block: staged tiles of a, b, c, and the operand copies of the state and of a b^T."""
    size, wide = item_bytes(p), max(padded(p.K), padded(p.V))
    return size * (c.stages * c.BT * (2 * wide + c.BE) + wide * c.BE + c.BT * c.BT + c.BT * c.BE) + 2048


def _sweep_configs(p: Problem) -> tuple[SweepConfig, ...]:
    """Configs that fit the device's shared memory (docs/measured.md has the timings).

    Half precision: 64-token chunks and output tiles of 64 columns on 4 warps hold the state of D = 128 in registers; three
    stages hide the latency of memory, two do not. At D = 256 the state alone fills the registers of 4 warps, so 8. Tiles
    narrower than 64 columns never run on 4 warps: decision 0003. Where three blocks fit one unit (D <= 64), three launches beat one
    launch with three slices, which holds the shared memory of all three. float32 has no matrix unit at full precision: small
    tiles. Backward with gates runs best at two stages, or 32-token chunks at D = 256.
    """
    wide = max(padded(p.K), padded(p.V))
    gated = p.grad and p.flag("decay") == "token"  # two terms per operand in backward: registers for fewer stages
    first: tuple[tuple[Any, ...], ...] = ()
    if p.dtype("qkv") == "float32":
        rest: tuple[tuple[Any, ...], ...] = ((32, 32, 4, 1, True), (16, 32, 4, 1, True), (16, 16, 4, 1, True))
    elif min(padded(p.K), padded(p.V)) < 64:
        rest = ((64, 32, 2, 2, True), (32, 32, 2, 1, True), (32, 16, 2, 1, True), (16, 16, 2, 1, True))
    elif wide <= 128:
        first = ((64, 64, 4, 2, False),) if gated and wide > 64 else ()
        rest = ((64, 64, 4, 3, wide <= 64), (64, 64, 4, 2, True), (64, 64, 4, 1, True), (32, 64, 4, 1, True), (32, 32, 2, 1, True))
    else:
        first = ((32, 64, 8, 2, False),) if gated else ()
        rest = ((64, 64, 8, 1, False), (64, 64, 8, 1, True), (32, 64, 8, 1, True), (32, 32, 2, 1, True), (16, 16, 2, 1, True))
    found = tuple(SweepConfig(*c) for c in (*first, *rest))
    room = p.device.shared_bytes if p.device.is_gpu else 1 << 30
    return tuple(c for c in found if _shared_bytes(p, c) <= room) or found[-1:]


def _least_shared(p: Problem) -> int:
    """Shared memory of the smallest sweep config."""
    return _shared_bytes(p, SweepConfig(16, 16, 2, 1))


def _segment(p: Problem) -> int:
    """Tokens per segment: as long as leaves a block for every unit, between 256 and 2048; states cost less the longer."""
    columns = -(-p.V // 64)
    wanted = p.device.units
    segment = 2048
    while segment > 256 and tokens(p) / segment * columns < wanted:
        segment //= 2
    return segment


def _chunk_configs(p: Problem) -> tuple[SegmentConfig, ...]:
    return tuple(dict.fromkeys(SegmentConfig(_segment(p), *c._replace(split=True)) for c in _sweep_configs(p)))


def _recurrent_configs(p: Problem) -> tuple[RecurrentConfig, ...]:
    """A block holds 64 columns of the state, 64 float32 registers a thread at D = 128: rows of 256 bytes reach 4 TB/s in decode."""
    wide = max(padded(p.K), padded(p.V))
    return (RecurrentConfig(64, 4) if wide <= 128 else RecurrentConfig(32, 4),)


# -- the table ---------------------------------------------------------------------------------------------------------------

_TRITON = (
    Gpu(nvidia_min=80),
    Package("triton", (3, 5)),
    DTypes("qkv", FLOAT),
    DTypes("g", FLOAT),
    DTypes("beta", FLOAT),
    Dim("K", 1, 256),
    Dim("V", 1, 256),
    Flag("decay", ("none", "head", "token")),
)


def _interpretable(p: Problem) -> tuple[str, str, str] | None:
    """Triton's interpreter holds bfloat16 as integers and multiplies their bit patterns in a matrix product."""
    if p.interpret and not p.device.is_gpu and dict(p.dtypes)["qkv"] == "bfloat16":
        return "bfloat16 under the interpreter", "float16 or float32", "cast q, k and v, or use recurrent_triton"
    return None


_PRODUCTS = (*_TRITON, SharedMemory(_least_shared), Rule("matrix products", ("interpret", "device", "dtypes"), _interpretable))

VARIANTS = (
    Variant(
        "sweep_triton", f"{__package__}.sweep_triton", _PRODUCTS, sweep_cost, _sweep_configs,
        "one launch forward, one backward; the state of a sequence stays in registers",
    ),
    Variant(
        "chunk_triton", f"{__package__}.chunk_triton", _PRODUCTS, chunk_cost, _chunk_configs,
        "sequences in parallel segments with their own states: few heads, long sequences",
    ),
    Variant(
        "recurrent_triton", f"{__package__}.recurrent_triton", _TRITON, recurrent_cost, _recurrent_configs,
        "token by token in float32: decode and short lengths",
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
    name="scalar_decay",
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
