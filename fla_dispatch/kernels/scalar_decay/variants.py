"""The table of scalar_decay: every variant with what it requires, the configs it may run and, in costs.py, what it costs."""

from __future__ import annotations

from typing import Any

from ...problem import Problem
from ...registry import Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package, Rule, SharedMemory
from . import recurrence
from .configs import GluonConfig, ParallelConfig, RecurrentConfig, SegmentConfig, StatesConfig, SweepConfig, TorchConfig
from .costs import (
    chunk_cost,
    gluon_cost,
    item_bytes,
    padded,
    parallel_cost,
    recurrent_cost,
    reference_cost,
    states_cost,
    sweep_cost,
    tokens,
    torch_cost,
)  # fmt: skip
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FLOAT = (*HALF, "float32")


# -- configs -----------------------------------------------------------------------------------------------------------------


def _shared_bytes(p: Problem, c: SweepConfig) -> int:
    """Shared memory of one sweep block: staged tiles of a, b, c, and the operand copies of the state and of a b^T.

    Descriptors also stage what is stored and what row sums are taken with.
    """
    size, wide = item_bytes(p), max(padded(p.K), padded(p.V))
    tile = c.BT * c.BE
    staged = c.BT * 2 * wide + tile + (tile if c.tma and p.grad and p.flag("decay") == "token" else 0)
    return size * (c.stages * staged + wide * c.BE + c.BT * c.BT + tile * (2 if c.tma else 1)) + 2048


def _descriptors(p: Problem) -> bool:
    """Whether tiles are read by tensor descriptors: rows of whole 16 bytes, on Hopper, where that was measured.

    Triton 3.7 does not compile the pipelined loop with descriptors for sm100.
    """
    whole = all(d * item_bytes(p) % 16 == 0 for d in (p.K, p.V))
    return whole and (p.interpret or p.device.arch_number == 90)


def _sweep_configs(p: Problem) -> tuple[SweepConfig, ...]:
    """Configs that fit the device's shared memory, those with tensor descriptors first (docs/measured.md has the timings).

    Half precision: 64-token chunks and output tiles of 64 columns on 4 warps hold the state of D = 128 in registers; three
    or four stages hide the latency of memory, two do not. Gates in backward carry two terms per operand, which leaves registers
    for two stages. At D = 256 the state alone fills the registers of 4 warps, so 8, and 32-token chunks leave room for three
    stages. Tiles narrower than 64 columns never run on 4 warps: decision 0003. 128-token chunks and tiles of 128 columns were
    slower everywhere. float32 has no matrix unit at full precision: small tiles.
    """
    wide = max(padded(p.K), padded(p.V))
    tma: tuple[tuple[Any, ...], ...] = ()
    if p.dtype("qkv") == "float32":
        plain: tuple[tuple[Any, ...], ...] = ((32, 32, 4, 1, True), (16, 32, 4, 1, True), (16, 16, 4, 1, True))
    elif min(padded(p.K), padded(p.V)) < 64:
        plain = ((64, 32, 2, 2, True), (32, 32, 2, 1, True), (32, 16, 2, 1, True), (16, 16, 2, 1, True))
    elif wide <= 64:
        tma = ((64, 64, 4, 3, True, True), (64, 64, 4, 3, False, True), (64, 64, 4, 2, False, True))
        plain = ((64, 64, 4, 3, True), (64, 64, 4, 2, True), (64, 64, 4, 1, True), (32, 64, 4, 1, True), (32, 32, 2, 1, True))
    elif wide <= 128:
        tma = ((64, 64, 4, 4, True, True), (64, 64, 4, 3, True, True), (64, 64, 4, 2, False, True))
        plain = ((64, 64, 4, 3, False), (64, 64, 4, 2, True), (64, 64, 4, 1, True), (32, 64, 4, 1, True), (32, 32, 2, 1, True))
    else:
        tma = ((32, 64, 8, 3, True, True), (64, 64, 8, 2, True, True), (64, 64, 8, 1, False, True))
        plain = ((64, 64, 8, 1, False), (32, 64, 8, 2, True), (32, 64, 8, 1, True), (32, 32, 2, 1, True), (16, 16, 2, 1, True))
    found = tuple(SweepConfig(*c) for c in ((*tma, *plain) if _descriptors(p) else plain))
    room = p.device.shared_bytes if p.device.is_gpu else 1 << 30
    return tuple(c for c in found if _shared_bytes(p, c) <= room) or found[-1:]


def _least_shared(p: Problem) -> int:
    """Shared memory of the smallest sweep config."""
    return _shared_bytes(p, SweepConfig(16, 16, 2, 1))


def _states_bytes(p: Problem, BT: int, stages: int) -> int:
    """Shared memory of one block of a chunk: v, do and a state in stages, q and k."""
    K, V = padded(p.K), padded(p.V)
    return item_bytes(p) * (stages * (2 * BT * V + K * V) + 2 * BT * K)


def _states_shared(p: Problem) -> int:
    """Shared memory of the smallest config."""
    return _states_bytes(p, 64, 1)


def _segment(p: Problem) -> int:
    """Tokens per segment: as long as leaves a block for every unit, between 256 and 2048; states cost less the longer."""
    columns = -(-p.V // 64)
    wanted = p.device.units
    segment = 2048
    while segment > 256 and tokens(p) / segment * columns < wanted:
        segment //= 2
    return segment


def _chunk_configs(p: Problem) -> tuple[SegmentConfig, ...]:
    """The sweep's, with backward as three launches: one with three slices needs the shared memory of all. Two stages leave room."""
    room = max(padded(p.K), padded(p.V)) <= 128
    found = (SegmentConfig(_segment(p), *c._replace(split=not (c.tma and c.stages == 2 and room))) for c in _sweep_configs(p))
    return tuple(dict.fromkeys(found))


def _states_configs(p: Problem) -> tuple[StatesConfig, ...]:
    """Segments as for `chunk_triton`; few heads per program where chunks alone do not fill the device, else the more the fewer sums.

    Chunks of 128 tokens have half the states, but their kernels fit the registers in half precision up to V = 64 alone.
    """
    segment, group = min(_segment(p), 512 if p.packed else 2048), p.group
    if not p.packed and segment >= p.T:
        segment = 0
    chunks = tokens(p) / max(1, group) / 64
    most = 1
    while most < min(group, 32) and chunks * -(-group // (2 * most)) >= 4 * p.device.units:
        most *= 2
    heads = dict.fromkeys((most, max(1, most // 4), min(group, 4 * most)))
    tma = _descriptors(p) and padded(p.K) == p.K and padded(p.V) == p.V
    ways = ((64, 2), (64, 1)) if padded(p.V) > 64 or p.dtype("qkv") == "float32" else ((64, 2), (128, 2), (64, 1))
    found = dict.fromkeys(StatesConfig(segment, BT, h, stages if h > 1 else 1, tma) for BT, stages in ways for h in heads)
    room = p.device.shared_bytes if p.device.is_gpu else 1 << 30
    return tuple(c for c in found if _states_bytes(p, c.BT, c.stages) <= room)


def _gluon_configs(p: Problem) -> tuple[GluonConfig, ...]:
    """Configs that fit the device's shared memory. Stages hide the latency of memory; a second buffer lets the state run ahead."""
    wide, tile = max(64, padded(p.K), padded(p.V)), 64 * 64
    terms = 2 if p.grad and p.flag("decay") == "token" else 1
    sums = p.grad and (p.flag("decay") == "token" or "beta" in dict(p.dtypes))
    partial = 4 if p.group > 1 and p.grad else 2
    normaliser = 2 * (2 * 8 * wide + 8 * 64) + 4 * 2 * 64 if p.flag("normalize") == "true" else 0

    def fits(c: GluonConfig) -> bool:
        staged = 2 * 64 * wide + tile * (2 if sums else 1)
        fixed = partial * tile + normaliser + 1024
        return 2 * (c.stages * staged + terms * (4 * tile + c.states * wide * 64)) + fixed <= p.device.shared_bytes

    found = tuple(GluonConfig(*c) for c in ((3, 2), (4, 1), (4, 2), (3, 1), (2, 2), (2, 1), (1, 1)))
    return tuple(c for c in found if fits(c))[:4] or found[-1:]


def _parallel_configs(p: Problem) -> tuple[ParallelConfig, ...]:
    """The shortest block that holds a sequence; several heads of a group in one program where programs are many without."""
    heads = max(1, min(p.group, p.BH // (2 * p.device.units)))
    return tuple(dict.fromkeys(ParallelConfig(64 if p.T <= 64 else 128, h, 1) for h in (heads, 1)))


def _parallel_shared(p: Problem) -> int:
    """Shared memory of one block of dk and dv: three tiles of 128 tokens at a time, and a state."""
    return item_bytes(p) * (128 * (padded(p.K) + 2 * padded(p.V)) + padded(p.K) * padded(p.V))


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
    DTypes("skip", FLOAT),
    Dim("K", 1, 256),
    Dim("V", 1, 256),
    Flag("decay", ("none", "head", "token")),
)


def _interpretable(p: Problem) -> tuple[str, str, str] | None:
    """Triton's interpreter holds bfloat16 as integers and multiplies their bit patterns in a matrix product."""
    if p.interpret and not p.device.is_gpu and dict(p.dtypes)["qkv"] == "bfloat16":
        return "bfloat16 under the interpreter", "float16 or float32", "cast q, k and v, or use recurrent_triton"
    return None


def _hopper(p: Problem) -> tuple[str, str, str] | None:
    """The kernel speaks to the matrix units of sm90 and its tensor descriptors, and has no interpreter."""
    if p.device.arch_number != 90:
        return p.device.arch, "sm90", "use sweep_triton"
    if p.interpret:
        return "the interpreter", "a GPU", "use sweep_triton"
    if any(d * 2 % 16 for d in (p.K, p.V)):
        return f"head dims {p.K} and {p.V}", "multiples of 8", "pad q, k and v, or use sweep_triton"
    return None


def _no_decay(p: Problem) -> tuple[str, str, str] | None:
    """The kernel's normaliser does not decay; no op asks for one that does."""
    if p.flag("normalize") == "true" and p.flag("decay") != "none":
        return f"asked for with decay={p.flag('decay')}", "decay=none", "use sweep_triton"
    return None


def _sums(p: Problem) -> tuple[str, str, str] | None:
    """Triton 3.7 does not compile sums over both axes of a product for the memory of sm100's matrix units."""
    if 100 <= p.device.arch_number < 120 and p.grad and p.flag("decay") == "token":
        return f"gradients of gates on {p.device.arch}", "another device, or no gradients", "use sweep_triton"
    return None


def _whole_tiles(p: Problem) -> tuple[str, str, str] | None:
    """Narrower operands on these kernels' four warps gave wrong outputs on an H200 (decision 0003); in float32 they do not fit."""
    if p.device.is_gpu and (min(p.K, p.V) <= 32 or p.dtype("qkv") == "float32"):
        return f"head dims {p.K} and {p.V} of {p.dtype('qkv')}", "above 32, in half precision", "use sweep_triton"
    return None


_CHUNKS = (
    Flag("normalize", ("false",)),
    Rule("whole tiles", ("device", "dtypes", "K", "V"), _whole_tiles),
    Rule("matrix products", ("interpret", "device", "dtypes"), _interpretable),
    Rule("gate gradients", ("device", "grad", "flags"), _sums),
)
_PRODUCTS = (*_TRITON, SharedMemory(_least_shared), Rule("matrix products", ("interpret", "device", "dtypes"), _interpretable))

VARIANTS = (
    Variant(
        "sweep_triton", f"{__package__}.sweep_triton", _PRODUCTS, sweep_cost, _sweep_configs,
        "one launch forward, one backward; the state of a sequence stays in registers",
    ),
    Variant(
        "sweep_gluon", f"{__package__}.sweep_gluon",
        (
            Gpu(nvidia_min=90), Package("triton", (3, 6)), DTypes("qkv", HALF), DTypes("g", FLOAT), DTypes("beta", FLOAT), Dim("K", 1, 256),
            Dim("V", 1, 256), Flag("decay", ("none", "head", "token")), Rule("Hopper", ("interpret", "device", "K", "V"), _hopper),
            Rule("normalize", ("flags",), _no_decay),
        ),
        gluon_cost, _gluon_configs, "the sweep for Hopper: scores, state and output of a chunk in warps of their own",
    ),
    Variant(
        "chunk_triton", f"{__package__}.chunk_triton", _PRODUCTS, chunk_cost, _chunk_configs,
        "sequences in parallel segments with their own states: few heads, long sequences",
    ),
    Variant(
        "states_triton", f"{__package__}.states_triton",
        (
            *_TRITON[:6], Dim("K", 1, 128), Dim("V", 1, 128), _TRITON[-1], SharedMemory(_states_shared), *_CHUNKS,
        ),
        states_cost, _states_configs,
        "states of all chunks in memory, then all chunks in parallel: heads that share q and k; training with gates",
    ),
    Variant(
        "parallel_triton", f"{__package__}.parallel_triton",
        (
            *_TRITON[:6], Dim("T", 1, 128), Dim("K", 1, 128), Dim("V", 1, 128), _TRITON[-1],
            Lacks(("packed",)), SharedMemory(_parallel_shared), *_CHUNKS,
        ),
        parallel_cost, _parallel_configs, "a whole short sequence as one chunk: the fewest launches",
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
    valued=("cu",),
)
