"""What the algorithms of scalar_decay, and the transforms before delta rules, promise of a call, in bytes: the fewest that move, and the
most that training holds.

Shapes are read, no values: inputs on the meta device do. (B, T, H, HV, K, V) as in the recurrence.
"""

from __future__ import annotations

from typing import Any

from fla_dispatch import registry
from fla_dispatch.kernels.delta.cases import Inputs as DeltaInputs
from fla_dispatch.kernels.scalar_decay.cases import Inputs

SEGMENT = 256  # tokens: the shortest segments that chunk_triton and states_triton are offered; sweeps keep no states
TILE = 16  # columns: the narrowest tile, for no operand of a matrix unit is smaller
SEGMENT_STATES = 3  # of backward at its worst: before each segment, of each segment from zero in reverse, after each segment
CHUNK = 64  # tokens: of the chunks whose states states_triton keeps, S and R, in the inputs' dtype
DESCRIPTORS = 5 * 128  # bytes of the tensor descriptors that a block makes: a, b, c, o and the rows that o is multiplied with
FLOAT32 = 4
SUMS = 2 * 1024 * 512  # float32 numbers: two sums for each column of a tile and block of the kernel that takes gradients of gates


def _call(op: str, x: Inputs) -> tuple[Any, Any]:
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    return low.tensors, low.options


def _size(x: Any) -> int:
    return int(x.numel() * x.element_size())


def floor_bytes(op: str, x: Inputs) -> tuple[int, int]:
    """Fewest bytes that forward, and forward + backward, move.

    Forward: every input read and the output written once. Backward: every input and the output's gradient read and the gradient of
    every input written once.
    """
    inputs, o = sum(map(_size, x.leaves().values())), _size(_call(op, x)[0].v)
    return inputs + o, (inputs + o) + (inputs + o + inputs)


def training_bytes(op: str, x: Inputs) -> dict[str, int]:
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


def transform_bytes(x: DeltaInputs) -> dict[str, int]:
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
