"""Configs of the variants: self-describing records without any kernel code, so that planning imports no compiler."""

from __future__ import annotations

from typing import NamedTuple


class RecurrentConfig(NamedTuple):
    """BV: columns of the state that a block holds; warps of a block."""

    BV: int
    warps: int


class ChunkConfig(NamedTuple):
    """BT: tokens per chunk, a divisor of 64; BV: columns of the state that a block of a sweep holds; warps and stages: of a sweep;
    tma: tiles of sweeps by tensor descriptors; scores: X by way of memory, else in the sweep (forward); parallel: warps of the
    gradients' chunks, and BK: columns of K that one of them takes at a time; tf32: merges of the inverse in three tf32 terms, else
    float32; SEG: tokens of segments that run in parallel, one of `sequences.SEGMENTS`, or 0."""

    BT: int
    BV: int
    warps: int
    stages: int
    tma: bool = False
    scores: bool = True
    parallel: int = 8
    tf32: bool = False
    SEG: int = 0
    BK: int = 64


def gradient_columns(V: int, BT: int, BV: int, item_bytes: int) -> int:
    """Columns of V of the tiles of a chunk's gradients, of a sweep of BV: all of them in large chunks, that their rows are read once."""
    return 1 << (V - 1).bit_length() if item_bytes == 2 and BT >= 64 and BV >= 64 and V <= 128 else min(64, BV)


class TorchConfig(NamedTuple):
    """C: tokens per chunk."""

    C: int = 64
