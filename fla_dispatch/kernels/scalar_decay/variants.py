"""The table of scalar_decay: every variant with what it requires, the configs it may run and what it is estimated to cost."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Direction, Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package, Rule, SharedMemory
from .._shared.cost import LAUNCH, kernel_seconds, torch_seconds
from . import recurrence
from .configs import RecurrentConfig, SegmentConfig, SweepConfig, TorchConfig
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FLOAT = (*HALF, "float32")


def _bytes(p: Problem) -> int:
    return {"float64": 8, "float32": 4}.get(p.dtype("qkv") or "", 2)


def _tile(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _tokens(p: Problem) -> float:
    """Tokens times value heads: T counts one row of a dense batch, the whole of a pack."""
    return p.T * (p.BH / max(1, p.N) if p.packed else p.BH)


def _state_bytes(p: Problem) -> float:
    """Bytes of the initial and the final state."""
    return 4.0 * p.BH * p.K * p.V * (int(p.initial_state) + int(p.final_state))


def _longest(p: Problem) -> float:
    """Tokens of the longest sequence, as far as a Key knows: the mean of a pack."""
    return p.mean_length if p.packed else p.T


# -- configs -----------------------------------------------------------------------------------------------------------------


def _shared_bytes(p: Problem, BT: int, BE: int, stages: int) -> int:
    """Shared memory of one sweep block: staged tiles of a, b, c, and the operand copies of the state and of a b^T."""
    size, wide = _bytes(p), max(_tile(p.K), _tile(p.V))
    return size * (stages * BT * (2 * wide + BE) + wide * BE + BT * BT + BT * BE) + 2048


def _sweep_tiles(p: Problem) -> tuple[tuple[int, int, int, int, bool], ...]:
    """(BT, BE, warps, stages, split), best first, that fit the device's shared memory.

    Half precision: 64-token chunks and output tiles of 64 columns on 4 warps hold the state of D = 128 in registers; three
    stages hide the latency of memory, two do not (docs/measured.md). At D = 256 the state alone fills the registers of 4
    warps, so 8. Tiles narrower than 64 columns never run on 4 warps: decision 0003. Where three blocks fit one unit
    (D <= 64), three launches beat one launch with three slices, which holds the shared memory of all three. float32 has no
    matrix unit at full precision: small tiles. Backward with gates runs best at two stages, or 32-token chunks at D = 256.
    """
    wide = max(_tile(p.K), _tile(p.V))
    gated = p.grad and p.flag("decay") == "token"  # two terms per operand in backward: registers for fewer stages
    found: tuple[tuple[int, int, int, int, bool], ...]
    if p.dtype("qkv") == "float32":
        found = ((32, 32, 4, 1, True), (16, 32, 4, 1, True), (16, 16, 4, 1, True))
    elif min(_tile(p.K), _tile(p.V)) < 64:
        found = ((64, 32, 2, 2, True), (32, 32, 2, 1, True), (32, 16, 2, 1, True), (16, 16, 2, 1, True))
    elif wide <= 128:
        split = wide <= 64
        found = ((64, 64, 4, 3, split), (64, 64, 4, 2, True), (64, 64, 4, 1, True), (32, 64, 4, 1, True), (32, 32, 2, 1, True))
        if gated and not split:
            found = ((64, 64, 4, 2, False), *found)
    else:
        found = ((64, 64, 8, 1, False), (64, 64, 8, 1, True), (32, 64, 8, 1, True), (32, 32, 2, 1, True), (16, 16, 2, 1, True))
        if gated:
            found = ((32, 64, 8, 2, False), *found)
    room = p.device.shared_bytes if p.device.is_gpu else 1 << 30
    return tuple(t for t in found if _shared_bytes(p, t[0], t[1], t[3]) <= room) or found[-1:]


def _least_shared(p: Problem) -> int:
    """Shared memory of the smallest sweep config."""
    return _shared_bytes(p, 16, 16, 1)


def _sweep_configs(p: Problem) -> tuple[SweepConfig, ...]:
    return tuple(SweepConfig(*tiles) for tiles in _sweep_tiles(p))


def _segment(p: Problem) -> int:
    """Tokens per segment: as long as leaves a block for every unit, between 256 and 2048; states cost less the longer."""
    columns = -(-p.V // 64)
    wanted = p.device.units
    segment = 2048
    while segment > 256 and _tokens(p) / segment * columns < wanted:
        segment //= 2
    return segment


def _chunk_configs(p: Problem) -> tuple[SegmentConfig, ...]:
    return tuple(SegmentConfig(_segment(p), *tiles[:4], split=True) for tiles in _sweep_tiles(p))


def _recurrent_configs(p: Problem) -> tuple[RecurrentConfig, ...]:
    """A block holds 64 columns of the state, 64 float32 registers a thread at D = 128: rows of 256 bytes reach 4 TB/s in decode."""
    wide = max(_tile(p.K), _tile(p.V))
    return (RecurrentConfig(64, 4) if wide <= 128 else RecurrentConfig(32, 4),)


# -- costs -------------------------------------------------------------------------------------------------------------------


def _step(p: Problem, BT: int, direction: Direction) -> float:
    """Seconds of one chunk of a sweep in one block, fitted to the shipped records of the H200 (docs/measured.md)."""
    gated = p.flag("decay") == "token"
    slower = (2.6 if direction.backward else 1.8) if gated else 1.0
    slower *= 2.4 if p.flag("normalize") == "true" else 1.0
    wide = max(_tile(p.K), _tile(p.V))
    base = {64: 1.05e-6, 128: 1.45e-6, 256: 4.6e-6}.get(wide, 1.05e-6)
    return base * slower * (BT / 64) ** 0.5 * (16 if _bytes(p) == 4 else 1)


def _resident(p: Problem) -> int:
    """Sweep blocks that share one unit."""
    return 1 if max(_tile(p.K), _tile(p.V)) >= 128 else 3


def _sweep_cost(p: Problem, config: Any, direction: Direction) -> float:
    wide, size, tokens = max(_tile(p.K), _tile(p.V)), _bytes(p), _tokens(p)
    sweeps = 3 if direction.backward else 1
    launches = (sweeps if config.split else 1) + (p.flag("decay") == "token") * (2 if direction.backward else 1)
    return LAUNCH * launches + kernel_seconds(
        p.device,
        bytes_moved=sweeps * tokens * size * 2 * (p.K + p.V) + _state_bytes(p),
        matrix_flops=0.0 if size == 4 else sweeps * tokens * 4 * wide * (wide + config.BT),
        vector_flops=sweeps * tokens * 4 * wide * (wide + config.BT) if size == 4 else 0.0,
        blocks=(1 if config.split else sweeps) * p.BH * -(-p.V // config.BE),
        steps=(sweeps if config.split else 1) * -(-_longest(p) // config.BT),
        step_seconds=_step(p, config.BT, direction),
        blocks_per_unit=_resident(p),
    )


def _chunk_cost(p: Problem, config: Any, direction: Direction) -> float:
    tokens, size = _tokens(p), _bytes(p)
    wide = max(_tile(p.K), _tile(p.V))
    units = max(1.0, tokens / config.SEG)
    columns = -(-p.V // config.BE)
    sweeps, passes = (3, 2) if direction.backward else (1, 1)
    sweep = kernel_seconds(
        p.device,
        bytes_moved=tokens * size * (2 * sweeps + 1 * passes) * (p.K + p.V) + 12 * passes * units * p.K * p.V,
        matrix_flops=0.0 if size == 4 else tokens * (4 * sweeps + 2 * passes) * wide * (wide + config.BT),
        vector_flops=tokens * (4 * sweeps + 2 * passes) * wide * (wide + config.BT) if size == 4 else 0.0,
        blocks=(1 if config.split else sweeps) * units * columns,
        steps=((sweeps if config.split else 1) + 0.5 * passes) * -(-min(_longest(p), config.SEG) // config.BT),
        step_seconds=_step(p, config.BT, direction),
        blocks_per_unit=_resident(p),
    )
    scan = passes * (_longest(p) / config.SEG) * 1e-6
    launches = (sweeps if config.split else 1) + 2 * passes + (p.flag("decay") == "token")
    return LAUNCH * launches + sweep + scan


def _recurrent_cost(p: Problem, config: Any, direction: Direction) -> float:
    tokens, size = _tokens(p), _bytes(p)
    sweeps = 3 if direction.backward else 1
    return LAUNCH * sweeps ** (0.5 if direction.backward else 1) + kernel_seconds(
        p.device,
        bytes_moved=sweeps * tokens * size * 2 * (p.K + p.V) + _state_bytes(p),
        vector_flops=sweeps * tokens * 6 * p.K * p.V,
        blocks=sweeps * p.BH * -(-p.V // config.BE),
        steps=_longest(p),
        step_seconds=0.7e-6,
        blocks_per_unit=8,
    )


def _torch_cost(p: Problem, config: Any, direction: Direction) -> float:
    tokens, sweeps = _tokens(p), 3 if direction.backward else 1
    steps = p.T / config.C + (p.N if p.packed else 0)
    return torch_seconds(
        p.device,
        flops=sweeps * tokens * 4 * (p.K * p.V + config.C * (p.K + p.V) / 2),
        bytes_moved=sweeps * tokens * 4 * (6 * (p.K + p.V) + 6 * config.C),
        operations=30 * sweeps + 8 * sweeps * steps,
    )


def _reference_cost(p: Problem, config: Any, direction: Direction) -> float:
    steps = p.T * (4 if direction.backward else 1)
    return torch_seconds(p.device, flops=steps * p.BH * 6 * p.K * p.V, bytes_moved=steps * p.BH * 24 * p.K * p.V, operations=12 * steps)


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
        "sweep_triton", f"{__package__}.sweep_triton", _PRODUCTS, _sweep_cost, _sweep_configs,
        "one launch forward, one backward; the state of a sequence stays in registers",
    ),
    Variant(
        "chunk_triton", f"{__package__}.chunk_triton", _PRODUCTS, _chunk_cost, _chunk_configs,
        "sequences in parallel segments with their own states: few heads, long sequences",
    ),
    Variant(
        "recurrent_triton", f"{__package__}.recurrent_triton", _TRITON, _recurrent_cost, _recurrent_configs,
        "token by token in float32: decode and short lengths",
    ),
    Variant(
        "chunk_torch", f"{__package__}.chunk_torch", (DTypes("qkv", (*FLOAT, "float64")),), _torch_cost,
        lambda p: (TorchConfig(64 if p.device.is_gpu or p.T > 32 else 32),), "vectorised torch in float32: CPUs and unknown devices",
    ),
    Variant(
        "reference", f"{__package__}.reference", (Lacks(("capture",)),), _reference_cost,
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
