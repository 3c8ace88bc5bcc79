"""The table of delta: every variant with what it requires, the configs it may run and, in costs.py, what it is estimated to cost."""

from __future__ import annotations

from ...problem import Problem
from ...registry import Recurrence, Variant
from ...requirements import Dim, DTypes, Flag, Gpu, Lacks, Package, Rule, SharedMemory
from .._shared.launch import tile
from . import recurrence
from .configs import ChunkConfig, RecurrentConfig, TorchConfig, gradient_columns
from .costs import chunk_cost, gluon_cost, item_bytes, recurrent_cost, reference_cost, tokens, torch_cost
from .workload import WORKLOAD

HALF = ("bfloat16", "float16")
FULL = 64  # tokens of a chunk that fills the rows of a matrix unit
FLOAT = (*HALF, "float32")


def _recurrent_configs(p: Problem) -> tuple[RecurrentConfig, ...]:
    """Tiles whose float32 state is at most 64 registers a thread, or 128 where it is 16 columns wide. One warp sums over K without a
    barrier; wide tiles write fewer shares of gradients. None has been timed."""
    K, V = tile(p.K), tile(p.V)
    tiles = ((16, 1), (16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8), (16, 4))
    most = {16: 128}  # registers a thread
    found = [RecurrentConfig(BV, warps) for BV, warps in tiles if BV <= V and K * BV // (32 * warps) <= most.get(BV, 64)]
    return tuple(found) or (RecurrentConfig(16, 4),)


def _shared_bytes(p: Problem, c: ChunkConfig) -> int:
    """Shared memory of the largest of a config's blocks: a sweep's staged tiles of q, k (p), v or do, A and X and its copies of the state
    and of y; or the tiles of a chunk's gradients."""
    size, BK, keys = item_bytes(p), tile(p.K), 3 if p.flag("removal") == "p" or p.flag("decay") == "channel" else 2
    BV = min(c.BV, tile(p.V))
    staged = c.BT * (keys * BK + BV) + 2 * c.BT * c.BT
    sweep = c.stages * staged + BK * BV + c.BT * BV
    rows, columns = gradient_columns(p.V, c.BT, BV, size), min(BK, c.BK)
    gradients = 3 * c.BT * rows + keys * c.BT * columns + 2 * columns * rows + (4 * c.BT * c.BT if c.parallel > 4 else 0) if p.grad else 0
    return size * max(sweep, gradients) + 2048


def _chunk_configs(p: Problem) -> tuple[ChunkConfig, ...]:
    """Configs that fit the device's shared memory, those with tensor descriptors first. Registers are those of the compiler for sm90
    (Triton 3.6).

    Half precision: 64-token chunks fill the matrix unit's 64 rows. 64 columns of the state on 4 warps take 217 to 255 registers and no
    stack at K = 128 with X by way of memory; X in the sweep takes 72 bytes of stack. On an H200 three stages beat two at K = 128 (119 us
    against 155 at (4, 4096, 16, 128)), not at 64, where X in the sweep pays (8 % of forward at (8, 2048, 32, 64)); 128 columns on 8
    warps take 350. K = 256 wants 8 warps. A chunk's gradients take 4 warps, with two blocks of a unit: 364 us there against 633 on 8
    (341 against 457 at K = 64), in spite of 88 bytes of stack. Tiles narrower than 64 columns never run on 4 warps: decision 0003.
    Shorter chunks are for devices with less shared memory, and for sm100, for which Triton 3.7 does not compile sums over accumulators
    of 64 rows that a loop adds to (gradients of gates). float32 has no matrix unit at full precision, and short chunks lose fewer
    digits: small tiles.

    Gates per channel: their scores and inverses take 4 warps, 255 registers and 352 bytes of stack (on 8, which run the inverse twice,
    1.5 to 1.7 times as long on an H200), their gradients 176 bytes, at most two blocks of a unit.

    Segments in parallel where whole sequences leave half of the device idle and are long enough to be cut, as the default where they
    leave most of it idle (their passes are three times as much work). Transitions are composed in float32 registers, K <= 128.
    """
    K, V = tile(p.K), tile(p.V)
    tf32 = p.device.vendor == "nvidia" and p.dtype("qkv") != "float32"
    tma: tuple[tuple[int, int, int, int, bool, int], ...] = ()  # BT, BV, warps, stages, scores, parallel
    if p.dtype("qkv") == "float32":
        plain: tuple[tuple[int, int, int, int, bool, int], ...] = (
            (32, 32, 4, 1, True, 4),
            (16, 32, 4, 1, True, 4),
            (16, 16, 4, 1, True, 4),
        )
    elif min(K, V) < 64:
        plain = ((64, 32, 2, 2, True, 2), (64, 32, 2, 1, True, 2), (32, 32, 2, 1, True, 2), (16, 16, 2, 1, True, 2))
    elif K <= 128:
        tma = ((64, 64, 4, 3, True, 4), (64, 64, 4, 2, True, 4), (64, 64, 4, 2, False, 4))
        plain = ((64, 64, 4, 2, True, 4), (64, 64, 4, 1, True, 4), (32, 64, 4, 1, True, 4), (32, 32, 2, 1, True, 2))
        plain += ((16, 32, 2, 1, True, 2), (16, 16, 2, 1, True, 2))
    else:
        tma = ((64, 64, 8, 2, True, 8), (64, 64, 8, 1, True, 8))
        plain = ((64, 64, 8, 1, True, 8), (32, 32, 2, 1, True, 2), (16, 32, 2, 1, True, 2), (16, 16, 2, 1, True, 2))
    rows = all(d * item_bytes(p) % 16 == 0 for d in (p.K, p.V)) and (p.interpret or p.device.arch_number == 90)
    found = [
        ChunkConfig(*x[:4], bool(i), *x[4:], tf32, BK=min(64, x[1])) for i, group in ((1, tma), (0, plain)) for x in group if rows or not i
    ]
    channels = p.flag("decay") == "channel"
    if channels:  # scores by way of memory; `parallel` is of their kernel
        found = list(dict.fromkeys(c._replace(scores=True, parallel=min(4, c.parallel)) for c in found))
    room = p.device.shared_bytes if p.device.is_gpu else 1 << 30
    fitting = [c for c in found if _shared_bytes(p, c) <= room] or found[-1:]
    if 100 <= p.device.arch_number < 120 and p.grad and p.flag("decay") == "token":
        fitting = [c for c in fitting if c.BT < 64 or c.parallel < 4] or fitting
    full = [c for c in fitting if c.BT == FULL]
    whole = tuple(full if len(full) > 1 else fitting)
    blocks, length = p.BH * -(-p.V // whole[0].BV), tokens(p) / max(1, p.BH)
    if p.device.units < 2 * blocks or length < 1024 or K > 128 or room < 4 * (K * K + 2 * K * 16):  # of the composition
        return whole
    cut = tuple(whole[0]._replace(SEG=SEG) for SEG in (2048, 1024, 512) if length >= 2 * SEG)
    return (*cut, *whole) if p.device.units >= 8 * blocks and length >= 8192 else (*whole, *cut)


def _gluon_configs(p: Problem) -> tuple[ChunkConfig, ...]:
    return tuple(c for c in _chunk_configs(p) if c.BT == FULL)


def _hopper(p: Problem) -> tuple[str, str, str] | None:
    """The inverse speaks to the matrix units of sm90, and has no interpreter."""
    if p.device.arch_number != 90:
        return p.device.arch, "sm90", "use chunk_triton"
    if p.interpret:
        return "the interpreter", "a GPU", "use chunk_triton"
    return None


def _least_shared(p: Problem) -> int:
    """Shared memory of the smallest config, backward included."""
    BK = tile(p.K)
    return item_bytes(p) * (16 * (3 * BK + 16) + 3 * BK * 16 + 2 * 16 * 16) + 2048


def _interpretable(p: Problem) -> tuple[str, str, str] | None:
    """Triton's interpreter holds bfloat16 as integers and multiplies their bit patterns in a matrix product."""
    if p.interpret and not p.device.is_gpu and dict(p.dtypes)["qkv"] == "bfloat16":
        return "bfloat16 under the interpreter", "float16 or float32", "cast q, k and v, or use recurrent_triton"
    return None


def _channels_of_keys(p: Problem) -> tuple[str, str, str] | None:
    """No op has gates per channel and a removal key of its own, or one that is read early; the chunks' kernels for them know none."""
    if p.flag("decay") == "channel" and (p.flag("early") == "true" or p.flag("removal") == "p"):
        return "gates per channel and a removal key of its own", "gates per head, or keys that remove", "use recurrent_triton"
    return None


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
_CHUNK = (
    *_TRITON, Rule("gates per channel", ("flags",), _channels_of_keys), SharedMemory(_least_shared),
    Rule("matrix products", ("interpret", "device", "dtypes"), _interpretable),
)  # fmt: skip

VARIANTS = (
    Variant(
        "chunk_gluon", f"{__package__}.chunk_gluon",
        (
            Gpu(nvidia_min=90), Package("triton", (3, 6)), DTypes("qkv", HALF), *_CHUNK[3:],
            Flag("decay", ("none", "token")), Rule("Hopper", ("interpret", "device"), _hopper),
        ),
        gluon_cost, _gluon_configs, "chunk_triton with inverses by a kernel for Hopper",
    ),
    Variant(
        "chunk_triton", f"{__package__}.chunk_triton", _CHUNK, chunk_cost, _chunk_configs,
        "inverses of all chunks at once, then one pass over time with the state in registers",
    ),
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
    valued=("cu",),
)
