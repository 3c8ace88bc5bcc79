"""Configs of the variants: self-describing records without any kernel code, so that planning imports no compiler."""

from __future__ import annotations

from typing import NamedTuple


class RecurrentConfig(NamedTuple):
    """BV: columns of the state that a block holds; warps of a block."""

    BV: int
    warps: int


class TorchConfig(NamedTuple):
    """C: tokens per chunk."""

    C: int = 64
