"""The config of the step's kernel, without any kernel code, so that planning imports no compiler."""

from __future__ import annotations

from typing import NamedTuple


class StepConfig(NamedTuple):
    """BV: columns of the state that a block holds; warps of a block."""

    BV: int
    warps: int
