"""500 lengths and 500 packings of one op, and one call of each bucket that they fall into, for the tests that count what is kept."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch

import fla_dispatch as fd

LONGEST, MOST_SEQUENCES, COUNT = 512, 24, 500
TOPS = (0, 1, 16, 32, 64, 128, 256, 512)
HEADS = 2


def bucket(n: int) -> int:
    """Top of the bucket of a length, from the list that README and docs promise."""
    return min(top for top in TOPS if top >= n)


class Shape(NamedTuple):
    """A dense batch of `rows` times T tokens, or (rows 0) a pack of these lengths; bare: given as a tensor, not as a SeqInfo."""

    T: int
    rows: int = 1
    lengths: tuple[int, ...] = ()
    bare: bool = False

    def call(self, D: int, dtype: torch.dtype, device: str, *, grad: bool) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Arguments of simple_gla."""
        sizes = max(self.rows, 1), self.T, HEADS
        q, k, v = (torch.randn(*sizes, D, dtype=dtype, device=device).requires_grad_(grad) for _ in range(3))
        g = torch.full(sizes, -0.1, device=device).requires_grad_(grad)
        if self.rows:
            return (q, k, v, g), {}
        info = fd.SeqInfo.from_lengths(list(self.lengths), device)
        return (q, k, v, g), {"cu_seqlens": info.cu_seqlens if self.bare else info}


def dense() -> list[Shape]:
    """COUNT different lengths, in any order, of one to three rows."""
    return [Shape(T, 1 + i % 3) for i, T in enumerate(random.Random(0).sample(range(1, LONGEST + 1), COUNT))]


def packed() -> list[Shape]:
    """COUNT different packings of one to MOST_SEQUENCES sequences, some of them empty; every other one a bare tensor."""
    draw, found = random.Random(1), dict[tuple[int, ...], None]()
    while len(found) < COUNT:
        total, N = draw.randint(1, LONGEST), draw.randint(1, MOST_SEQUENCES)
        ends = sorted(draw.randint(0, total) for _ in range(N - 1))
        found[tuple(end - begin for begin, end in zip([0, *ends], [*ends, total], strict=True))] = None
    return [Shape(sum(lengths), 0, lengths, bare=i % 2 == 1) for i, lengths in enumerate(found)]


def firsts() -> list[Shape]:
    """One dense call and, of either kind, one packed call of each bucket of T: neither its longest nor a shape of the above."""
    found = []
    for low, top in itertools.pairwise(TOPS):
        T = max(low + 1, top - 1)
        found += [Shape(T, 4), *(Shape(T, 0, (T - T // 2, 0, T // 2), bare) for bare in (False, True))]
    return found
