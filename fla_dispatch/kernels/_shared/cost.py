"""Estimated seconds of a launch plan, from bytes, matrix and vector operations, launches, blocks and the serial chain.

An estimate ranks variants until measured records exist. Its constants are rough on purpose: ranking needs the factor of ten
between a serial and a parallel plan, not the last tenth.
"""

from __future__ import annotations

from ...device import DeviceProfile

#: Host time of one Triton launch, and of one small torch operation on a GPU or a CPU, in seconds.
LAUNCH, TORCH_GPU, TORCH_CPU = 2.8e-5, 8e-6, 1e-5


def kernel_seconds(
    d: DeviceProfile,
    *,
    bytes_moved: float,
    matrix_flops: float = 0.0,
    vector_flops: float = 0.0,
    blocks: float,
    steps: float,
    step_seconds: float,
    blocks_per_unit: int = 2,
) -> float:
    """One kernel: the largest of memory, arithmetic and the serial chain of its slowest block.

    steps: serial steps of one block, step_seconds each, in as many waves as the blocks need. Arithmetic and memory reach
    their ceilings only with a block on every unit.
    """
    waves = max(1.0, -(-blocks // (d.units * blocks_per_unit)))
    busy = min(1.0, blocks / d.units)
    memory = bytes_moved / (d.bandwidth * max(busy, 1e-3))
    arithmetic = (matrix_flops / (0.6 * d.matrix_rate) + vector_flops / (0.5 * d.vector_rate)) / max(busy, 1e-3)
    return max(memory, arithmetic, waves * steps * step_seconds)


def torch_seconds(d: DeviceProfile, *, flops: float, bytes_moved: float, operations: float) -> float:
    """Torch code: float32 arithmetic, every intermediate in memory, one dispatch per operation."""
    rate, each = (d.vector_rate, TORCH_GPU) if d.is_gpu else (0.5 * d.matrix_rate, TORCH_CPU)
    return flops / rate + bytes_moved / d.bandwidth + operations * each
