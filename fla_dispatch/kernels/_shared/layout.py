"""What a Key leaves open, chosen: how many sequences and heads a call with it has, and the lengths of its pack."""

from __future__ import annotations

import torch

from ...problem import Problem, count_bucket, length_bucket


def layout(p: Problem) -> tuple[int, int, int]:
    """(N, H, HV) of a call with this Key: a power of two of query heads where the Key leaves the choice.

    N falls below the Key's where no number of heads, or no mean length, fits it (each is rounded up for itself).
    """
    units = p.device.units
    for N in range(p.N, p.N // 2, -1):
        if count_bucket(N, units) != p.N or (p.packed and length_bucket(-(-pack_tokens(p, N) // N)) != p.mean_length):
            continue
        most = p.BH // N // p.group
        heads = [1 << i for i in reversed(range(most.bit_length()))]
        for H in (*heads, most):
            if H and count_bucket(N * H * p.group, units) == p.BH:
                return N, H, H * p.group
    return max(1, p.N), 1, p.group


def pack_tokens(p: Problem, N: int) -> int:
    """Tokens of a pack of N: the Key's T, or as many as leave the mean length in its bucket."""
    return min(p.T, N * p.mean_length)


def pack_lengths(total: int, N: int) -> tuple[int, ...]:
    """Lengths of a pack: between a tenth and 1.9 of their mean, the same for one (total, N)."""
    share = 0.1 + 1.8 * torch.rand(N, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    ends = [round(x) for x in (share.cumsum(0) / share.sum() * total).tolist()]
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
