"""Estimated seconds of torch code, rough on purpose: it runs where no kernel of ours does, or is slower by a factor."""

from __future__ import annotations

from ...device import DeviceProfile

#: Host time of one small torch operation on a GPU or a CPU, in seconds.
TORCH_GPU, TORCH_CPU = 8e-6, 1e-5


def torch_seconds(d: DeviceProfile, *, flops: float, bytes_moved: float, operations: float) -> float:
    """Torch code: float32 arithmetic, every intermediate in memory, one dispatch per operation."""
    rate, each = (d.vector_rate, TORCH_GPU) if d.is_gpu else (0.5 * d.matrix_rate, TORCH_CPU)
    return flops / rate + bytes_moved / d.bandwidth + operations * each
