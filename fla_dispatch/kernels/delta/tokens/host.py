"""What the launchers of the token kernels share: strides, sizes and compile-time constants of a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..._shared.launch import tile, token_rows
from .. import MIN_LOG_DECAY
from ..recurrence import Options, Tensors, sequences

DECAYS = {"none": 0, "token": 1, "channel": 2}


class Call(NamedTuple):
    """A call as the kernels take it: token rows with their strides, all else contiguous."""

    q: torch.Tensor
    k: torch.Tensor
    p: torch.Tensor | None
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor
    h0: torch.Tensor | None
    cu: torch.Tensor | None
    s_q: int
    s_k: int
    s_p: int
    s_v: int
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int


def prepare(t: Tensors) -> Call:
    """Kernel layout of a call; copies only what is not laid out in token rows."""
    q, s_q = token_rows(t.q)
    k, s_k = token_rows(t.k)
    p, s_p = (None, 0) if t.p is None else token_rows(t.p)
    v, s_v = token_rows(t.v)
    g, beta, h0 = (None if x is None else x.contiguous() for x in (t.g, t.beta, t.h0))
    assert beta is not None, "beta is no optional tensor"
    return Call(q, k, p, v, g, beta, h0, t.cu, s_q, s_k, s_p, s_v, *q.shape[:3], v.shape[2], q.shape[3], v.shape[3], sequences(t))


def tiles(c: Call, BV: int) -> int:
    """Tiles of V."""
    return -(-c.V // BV)


def grid(c: Call, BV: int) -> tuple[int]:
    """A block for each sequence, value head and tile of V."""
    return (c.N * c.HV * tiles(c, BV),)


def constants(c: Call, o: Options, BV: int) -> dict[str, Any]:
    """Compile-time constants that every kernel over tiles of V takes."""
    return {
        "K": c.K,
        "V": c.V,
        "BK": tile(c.K),
        "BV": BV,
        "DECAY": DECAYS[o.decay],
        "EARLY": o.early,
        "PACKED": c.cu is not None,
        "FLOOR": MIN_LOG_DECAY,
    }
