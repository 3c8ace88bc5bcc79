"""What the algorithms of the rooms over tokens promise of a call, in bytes: the fewest that move, and the most that training holds.

Shapes are read, no values: inputs on the meta device do. (B, T, H, HV, K, V) as in the recurrences; x: a room's Inputs.
"""

from __future__ import annotations

from typing import Any

from fla_dispatch import registry
from fla_dispatch.problem import length_bucket

SEGMENT = 256  # tokens: the shortest segments that chunk_triton and states_triton are offered; sweeps keep no states
TILE = 16  # columns: the narrowest tile, for no operand of a matrix unit is smaller
SEGMENT_STATES = 3  # of backward at its worst: before each segment, of each segment from zero in reverse, after each segment
CHUNK = 64  # tokens: of the chunks whose states states_triton keeps, S and R, in the inputs' dtype
DESCRIPTORS = 5 * 128  # bytes of the tensor descriptors that a block makes: a, b, c, o and the rows that o is multiplied with
FLOAT32 = 4
SUMS = 2 * 1024 * 512  # float32 numbers: two sums for each column of a tile and block of the kernel that takes gradients of gates
DELTA_CHUNK = 64  # tokens of the delta room's chunks
DELTA_SEGMENTS = (512, 1024, 2048)  # and of its segments, of which a sequence has two at least


def _call(op: str, x: Any) -> tuple[Any, Any]:
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    return low.tensors, low.options


def _size(x: Any) -> int:
    return int(x.numel() * x.element_size())


def floor_bytes(op: str, x: Any) -> tuple[int, int]:
    """Fewest bytes that forward, and forward + backward, move.

    Forward: every input read and the output written once. Backward: every input and the output's gradient read and the gradient of
    every input written once.
    """
    inputs, o = sum(map(_size, x.leaves().values())), _size(_call(op, x)[0].v)
    return inputs + o, (inputs + o) + (inputs + o + inputs)


def training_bytes(op: str, x: Any, variant: str = "chunk_triton") -> dict[str, int]:
    """Most bytes that forward + backward of a call without states holds at a time beyond its inputs and the output's gradient, by what
    they are for; variant: the backward's, which for delta matters."""
    room = registry.get_op(op).recurrence
    if room == "delta":
        return _delta_tokens(op, x) if variant == "recurrent_triton" else _delta_chunks(op, x)
    return _scalar_decay(op, x)


def _scalar_decay(op: str, x: Any) -> dict[str, int]:
    """Most bytes that forward + backward of a call without states holds at a time beyond its inputs and the output's gradient.

    gradients: of every input; outputs: o, and with normalize r [B, T, HV], which are kept for backward;
    states: SEGMENT_STATES float32 arrays [units, HV, K, V] (and [.., K] and a decay), and the descriptors of the three gradients' blocks;
    with them, where states_triton runs, two arrays [units * SEGMENT / CHUNK, HV, K, V] in the inputs' dtype;
    units are segments, of a pack as many as its tokens fill and one unfinished for each sequence;
    rows: float32 arrays [B, T, HV]. Gates: one cumulated, and a row sum for each tile of q . dq, of v . dv and, with a skip, of v . do.
    normalize: u = -(do . o). mamba2's step size where torch computes it: three kept for backward (softplus's input and output, g) and six
    in its backward (of g, of beta, the two shares and the sum of the step's gradient, the softplus's);
    groups: with HV > H, dq and dk for each value head, and one sum over groups, in float32.
    """
    t, o = _call(op, x)
    B, T, H, K = t.q.shape
    HV, V = t.v.shape[2:]
    per_row = B * T * HV * FLOAT32
    tiles_k, tiles_v = -(-K // TILE), -(-V // TILE)
    rows = 1 if o.normalize else 0
    if t.g is not None:
        rows += 1 + tiles_k + tiles_v + (0 if t.skip is None else tiles_v)
    rows += 9 if t.beta is not None else 0
    units = B * -(-T // SEGMENT) if t.cu is None else T // SEGMENT + t.cu.shape[0] - 1
    state = SEGMENT_STATES * (K * V + K + 1) * FLOAT32 + 3 * max(tiles_k, tiles_v) * DESCRIPTORS
    if not o.normalize and max(K, V) <= 128:  # one float32 array less while the second of them is written
        state += K * V * (2 * (SEGMENT // CHUNK) * t.v.element_size() - FLOAT32)
    return {
        "gradients": sum(map(_size, x.leaves().values())),
        "outputs": _size(t.v) + (per_row if o.normalize else 0),
        "states": units * HV * state,
        "rows": rows * per_row,
        "groups": 0 if HV == H else (2 * HV + H) * B * T * K * FLOAT32,
    }


def _prepared(op: str, x: Any) -> tuple[Any, int]:
    """The recurrence's tensors, and the bytes of those that are none of the call's, and of their gradients: delta_product's q and g for
    each update; rows of unit length, weights and gates from raw input where kernels make them, which keep that input alone."""
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    if low.prepare is None:
        return low.tensors, 0
    t = low.prepare(low.tensors)
    return t, 2 * sum(_size(y) for y, z in zip(t[:6], low.tensors[:6], strict=True) if y is not None and y is not z)


def _delta_chunks(op: str, x: Any) -> dict[str, int]:
    """chunk_triton of the delta room. gradients, outputs: as for scalar_decay; matrices: A and X of each chunk; errors: w and dy;

    states: before and after each chunk, in the inputs' dtype (of as many chunks as segments hold), and with segments the transitions,
    states and gradients between them, in float32;
    rows: cumulated gates, float32 [B, T, HV];
    channels: of gates per channel q, k and p as they are read, removed and written, a gradient of each, pairs and gradients of X and M of
    each chunk, and in float32 decays of each chunk and their gradients;
    groups: with HV > H, dq, dk and dp for each value head, and one sum over groups, in float32; prepared: what `_prepared` counts.
    """
    t, prepared = _prepared(op, x)
    B, T, H, K = t.k.shape
    HV, V = t.v.shape[2:]
    rows, size, keys = B * T * HV, t.v.element_size(), 2 if t.p is None else 3

    N = B if t.cu is None else t.cu.shape[0] - 1

    def units(segment: int) -> int:
        return B * -(-T // segment) if t.cu is None else T // segment + N

    def states(segment: int) -> int:
        between = 0 if segment == DELTA_CHUNK else (K * K + 2 * K * V) * FLOAT32
        return units(segment) * HV * (segment // DELTA_CHUNK * 2 * K * V * size + between)

    length = length_bucket(T) if t.cu is None else min(length_bucket(T) / N, length_bucket(-(-T // N)))  # as a Key has it
    segments = (DELTA_CHUNK, *(n for n in DELTA_SEGMENTS if length >= 2 * n))
    channels, decays = t.g is not None and t.g.dim() == 4, max(units(n) * (n // DELTA_CHUNK) for n in segments) * HV
    return {
        "gradients": sum(map(_size, x.leaves().values())),
        "outputs": _size(t.v),
        "matrices": 2 * rows * DELTA_CHUNK * size,
        "errors": 2 * _size(t.v),
        "states": max(map(states, segments)),
        "rows": 0 if t.g is None or channels else rows * FLOAT32,
        "channels": channels * (rows * (6 * K + 3 * DELTA_CHUNK) * size + decays * 2 * K * FLOAT32),
        "groups": 0 if HV == H else (keys * HV + H) * B * T * K * FLOAT32,
        "prepared": prepared,
    }


def _delta_tokens(op: str, x: Any) -> dict[str, int]:
    """recurrent_triton of the delta room, for short lengths: float32 errors and dv, shares of dq, dk, dp and dbeta for each tile of V."""
    t, prepared = _prepared(op, x)
    B, T, H, K = t.k.shape
    HV, V = t.v.shape[2:]
    rows, tiles, keys = B * T * HV, -(-V // TILE), 2 if t.p is None else 3
    return {
        "gradients": sum(map(_size, x.leaves().values())),
        "outputs": _size(t.v),
        "errors": 2 * rows * V * FLOAT32,
        "shares": tiles * rows * (3 * K + 1) * FLOAT32,
        "groups": 0 if HV == H else (keys * HV + H) * B * T * K * FLOAT32,
        "prepared": prepared,
    }


def transform_bytes(x: Any) -> dict[str, int]:
    """Most bytes that forward + backward of what delta rules do before their recurrence holds beyond inputs and gradients that arrive.

    outputs: unit rows of q, k and p in their dtype, weights and gates in float32; gradients: of every raw tensor; sums: of dt_bias and
    A_log by spans of tokens, and over them. What is kept for backward are the inputs.
    """
    leaves = x.leaves()
    rows, gates = [leaves[n] for n in ("q", "k", "p") if n in leaves], [leaves[n] for n in ("beta", "g") if n in leaves]
    parameters = [leaves[n] for n in ("A_log", "dt_bias") if n in leaves]
    terms = leaves["g"].numel() if parameters else 0
    return {
        "outputs": sum(map(_size, rows)) + sum(y.numel() for y in gates) * FLOAT32,
        "gradients": sum(map(_size, (*rows, *gates, *parameters))),
        "sums": (min(SUMS, 2 * terms) + 4 * sum(y.numel() for y in parameters)) * FLOAT32,
    }
