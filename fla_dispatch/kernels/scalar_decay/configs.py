"""Configs of the variants: self-describing records without any kernel code, so that planning imports no compiler."""

from __future__ import annotations

from typing import NamedTuple


class SweepConfig(NamedTuple):
    """BT: tokens per chunk (0: token by token); BE: width of an output tile; warps and pipeline stages of a block;
    split: backward as three launches instead of one with three slices; tma: tiles by tensor descriptors."""

    BT: int
    BE: int
    warps: int
    stages: int
    split: bool = False
    tma: bool = False


class SegmentConfig(NamedTuple):
    """SEG: tokens per segment, one of `sequences.SEGMENTS`; the rest as for SweepConfig."""

    SEG: int
    BT: int
    BE: int
    warps: int
    stages: int
    split: bool = False
    tma: bool = False


class StatesConfig(NamedTuple):
    """SEG: tokens per segment of the walk that stores states, one of `sequences.SEGMENTS`, or 0 for whole sequences of one length;
    BT: tokens per chunk, 64 on four warps or 128 on eight; HEADS: value heads of a query head that one program takes; pipeline stages;
    tma: tiles by tensor descriptors."""

    SEG: int
    BT: int
    HEADS: int
    stages: int
    tma: bool = False


class ParallelConfig(NamedTuple):
    """tokens: of a block, which holds a whole sequence, 64 on four warps or 128 on eight; HEADS: value heads of a query head that one
    program takes; pipeline stages of a block."""

    tokens: int
    HEADS: int
    stages: int


class GluonConfig(NamedTuple):
    """Stages of the copies; buffers of the rounded state. Chunks have 64 tokens, output tiles 64 columns."""

    stages: int
    states: int


class RecurrentConfig(NamedTuple):
    """BE: width of an output tile; warps of a block."""

    BE: int
    warps: int


class TorchConfig(NamedTuple):
    """C: tokens per chunk."""

    C: int = 64
