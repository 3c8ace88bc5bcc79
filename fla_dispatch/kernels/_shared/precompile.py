"""Compiling without launching: recorded launches go into Triton's disk cache, in processes that need no GPU.

A launch with meta tensors goes through Triton's own launch path, with a driver that knows the target alone, so that the key
of the cache is the one that a real launch will look for.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import driver

from .ahead import launch_key, target
from .launch import Launch, record, settle

__all__ = ["compile_for", "compile_launch", "launch_key", "record"]


class _Target:
    """A driver of a device that need not be here: enough for compiling, none of launching."""

    def __init__(self, arch: str) -> None:
        self._target = target(arch)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_for(arch: str) -> None:
    """Make this process compile for an architecture, and launch never again."""
    driver.set_active(_Target(arch))


def compile_launch(launch: Launch) -> int:
    """Compile one recorded launch with the options of `launch.launch`; returns its bytes of shared memory."""
    settle(launch.kernel)
    made = launch.kernel.warmup(
        *launch.args, grid=launch.grid, **launch.constants, num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True
    )
    return int(made.metadata.shared)
