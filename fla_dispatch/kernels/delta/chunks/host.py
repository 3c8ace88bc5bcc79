"""What the launchers of the kernels over chunks share: the call in kernel layout, its chunks and its compile-time constants."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ....sequences import SEGMENTS, segment_offsets
from ..._shared.launch import tile, token_rows
from .. import MIN_LOG_DECAY
from ..configs import ChunkConfig
from ..recurrence import Options, Tensors, sequences

#: Tokens of the segments that chunks are counted in where sequences are not cut; every BT divides it.
SEG = 64


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as the kernels take it: token rows with their strides, all else contiguous; chunks: their number, a bound for a pack."""

    q: torch.Tensor
    k: torch.Tensor
    p: torch.Tensor | None
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor
    decays: torch.Tensor | None  # [chunks, HV, K] of states over each chunk, where each channel has its own gate
    h0: torch.Tensor | None
    cu: torch.Tensor | None
    offsets: torch.Tensor | None  # [N + 1] cumulative counts of segments of a pack
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
    BT: int
    chunks: int
    SEG: int  # tokens of the segments that chunks are counted in
    units: int  # of the passes over time: sequences, or where they are cut segments (a bound for a pack)
    scale: float
    same: dict[str, Any]  # compile-time constants by name

    def constants(self, *names: str) -> dict[str, Any]:
        """Those that every kernel takes, and some more."""
        return {name: self.same[name] for name in ("K", "BK", "PACKED", "PRECISION", *names)}


def prepare(t: Tensors, o: Options, config: ChunkConfig) -> Call:
    """Kernel layout of a call; copies only what is not laid out in token rows (with descriptors: rows of whole 16 bytes)."""
    (q, s_q), (k, s_k), (v, s_v) = (token_rows(x, config.tma) for x in (t.q, t.k, t.v))
    p, s_p = (None, 0) if t.p is None else token_rows(t.p, config.tma)
    g, beta, h0 = (None if x is None else x.contiguous() for x in (t.g, t.beta, t.h0))
    assert beta is not None, "beta is no optional tensor"
    N, (B, T, H, K), (HV, V) = sequences(t), q.shape, v.shape[2:]
    length = config.SEG or SEG
    if t.cu is None:
        offsets, segments = None, B * -(-T // length)
    else:
        offsets = segment_offsets(t.cu, length) if t.segments is None else t.segments[SEGMENTS.index(length)]
        segments = T // length + N if T else 0
    same = {
        "K": K, "V": V, "BK": tile(K), "BV": min(config.BV, tile(V)), "BT": config.BT, "EARLY": o.early, "PACKED": t.cu is not None,
        "PRECISION": "ieee",  # of float32 products; half-precision ones have no choice
        "MERGE": "tf32x3" if config.tf32 else "ieee",
        "FLOOR": MIN_LOG_DECAY, "TMA": config.tma, "STAGES": config.stages, "SEGMENTED": config.SEG > 0,
    }  # fmt: skip
    return Call(
        q, k, p, v, g, beta, None, h0, t.cu, offsets, s_q, s_k, s_p, s_v, B, T, H, HV, K, V, N, config.BT, segments * (length // config.BT),
        length, segments if config.SEG else N, o.scale,
        same,
    )  # fmt: skip


def tiles(c: Call) -> int:
    """Tiles of V."""
    return -(-c.V // int(c.same["BV"]))
