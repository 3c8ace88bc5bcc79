"""What kernels of steps, and of what layers do around a recurrence, compute alike."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|, by log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3: right to float32 for small e
    too, where log(1 + e) loses what e holds beyond 1."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    u = s * s
    series = 1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u * (1.0 / 9 + u * (1.0 / 11 + u * (1.0 / 13 + u / 15))))))
    return tl.where(x > 0.0, x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with no exponential of a positive number."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
