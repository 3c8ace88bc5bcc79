"""What the launchers share: token strides, gates and weights in the layout of the kernels, and the constants of a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..._shared.launch import tile, token_rows
from .. import EPS, MIN_LOG_DECAY
from ..recurrence import Options, Tensors, log_decay, sequences
from .gates import run_gates

DECAYS = {"none": 0, "token": 2}


class Call(NamedTuple):
    """The tensors of a call in kernel layout. Token strides s_*; g as the sweep bodies take it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None
    skip: torch.Tensor | None
    h0: torch.Tensor | None
    z0: torch.Tensor | None
    cu: torch.Tensor | None
    s_q: int
    s_k: int
    s_v: int
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int


def prepare(t: Tensors, o: Options, BT: int, tma: bool = False) -> Call:
    """Kernel layout of a call with chunks of BT tokens (0: token by token); copies only what is not laid out in token rows.

    tma: also what does not begin at multiples of 16 bytes, as tensor descriptors want.
    """
    assert t.skip is None or (t.beta is not None and not o.normalize), "skip comes with beta, whose row sums its gradient shares"
    q, s_q = token_rows(t.q, tma)
    k, s_k = token_rows(t.k, tma)
    v, s_v = token_rows(t.v, tma)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if t.g is not None:
        g = t.g.contiguous()
        g = run_gates(g, t.cu, sequences(t), BT) if BT else g
    else:
        g = None if o.decay == "none" else log_decay(o.decay, o.rate, HV, q.device)
    h0, z0, beta, skip = (None if x is None else x.contiguous() for x in (t.h0, t.z0, t.beta, t.skip))
    return Call(q, k, v, g, beta, skip, h0, z0, t.cu, s_q, s_k, s_v, B, T, H, HV, K, V, sequences(t))


def constants(c: Call, o: Options) -> dict[str, Any]:
    """Compile-time constants that every kernel of the sweep takes."""
    return {
        "K": c.K,
        "V": c.V,
        "DECAY": DECAYS.get(o.decay, 1),
        "NORMALIZE": o.normalize,
        "PACKED": c.cu is not None,
        "PRECISION": "ieee",  # of float32 products; half-precision ones have no choice, and gfx950 refuses the name tf32
        "EPS": EPS,
        "FLOOR": MIN_LOG_DECAY,
    }


def exact(c: Call, o: Options) -> bool:
    """Whether backward must keep row sums exact: gates per token, half-precision operands."""
    return o.decay == "token" and c.q.dtype != torch.float32


def tiles(width: int, BE: int) -> int:
    """Number of tiles of a head dim."""
    return -(-width // BE)


def padded(c: Call) -> tuple[int, int]:
    """K and V padded to tile widths."""
    return tile(c.K), tile(c.V)
