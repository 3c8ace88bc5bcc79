"""Equations (21) to (24) as maps with a gradient."""

from __future__ import annotations

import functools

import torch

from ..._shared.pair import Pair, Tensors
from .rows import run_rows
from .rows_backward import run_rows_backward
from .vectors import GATES, run_vectors
from .vectors_backward import run_vectors_backward


@functools.cache
def rows(removal: bool) -> Pair:
    """(q, k, p) -> the same with rows of unit length; removal: there is a p, else it is None and not returned."""

    def backward(tensors: Tensors, grads: Tensors, wanted: tuple[bool, ...]) -> Tensors:
        q, k, p = tensors
        assert q is not None and k is not None
        arriving = [x if want else None for x, want in zip((*grads, None)[:3], wanted, strict=True)]
        return run_rows_backward(q, k, p, tuple(arriving))

    return Pair("delta", run_rows, backward, ((0,), (1,), (2,))[: 2 + removal])


@functools.lru_cache(maxsize=64)
def vectors(logits: bool, gate: str, doubled: bool, low: float) -> Pair:
    """(logits, raw gate, A_log, dt_bias) -> (beta, g) of those asked for; what is absent is None. gate: of GATES."""
    weight, code = (0 if not logits else 2 if doubled else 1), GATES[gate]
    made = tuple(i for i, there in enumerate((logits, code > 0)) if there)

    def forward(
        b: torch.Tensor | None, raw: torch.Tensor | None, A_log: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        return tuple(x for x in run_vectors(b, raw, A_log, bias, weight, code, low) if x is not None)

    def backward(tensors: Tensors, grads: Tensors, wanted: tuple[bool, ...]) -> Tensors:
        arriving: list[torch.Tensor | None] = [None, None]
        for i, x in zip(made, grads, strict=True):
            arriving[i] = x
        dbeta, dg = arriving[0] if wanted[0] else None, arriving[1] if any(wanted[1:]) else None
        found = run_vectors_backward(*tensors, dbeta, dg, weight, code, low, wanted[2] or wanted[3])
        pairs = zip(found, tensors, wanted, strict=True)
        return tuple(None if y is None or x is None or not want else y.to(x.dtype) for y, x, want in pairs)

    sources = ((0,), (1, 2, 3))
    return Pair("delta", forward, backward, tuple(sources[i] for i in made))
