"""Random inputs that rooms share: one generator per device and seed, and log decays by regime."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


class Draw:
    """Random tensors of one device and seed; on the meta device only shapes."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)


def make_gates(draw: Draw, regime: str, *shape: int) -> torch.Tensor:
    """Log decays [B, T, HV], float32."""
    if regime == "none":
        return draw.normal(*shape) * 0
    if regime == "strong":
        return draw.uniform(-20.0, 0.0, *shape)
    g = F.logsigmoid(draw.normal(*shape) + 2)
    if regime == "reset":
        return torch.where(draw.uniform(0, 1, *shape) < 1 / 16, -math.inf, g)
    if regime != "mild":
        raise AssertionError(f"no regime named {regime}")
    return g


def make_raw_gate(draw: Draw, wide: torch.dtype, HV: int, channels: int) -> dict[str, Any]:
    """Parameters of a gate from raw input as the published layers set them: A in (1, 16), a bias near softplus^-1(0.001 ... 0.1).

    channels: K where each has its own gate, else 0.
    """
    shape = (HV, channels) if channels else (HV,)
    step = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), *shape))
    bias = step + torch.log(-torch.expm1(-step))  # softplus(bias) = step
    return {"use_gate": True, "A_log": draw.uniform(1.0, 16.0, HV).log().to(wide), "dt_bias": bias.to(wide)}
