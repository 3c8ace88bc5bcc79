"""Calls whose memory is judged, for the CPU's test of the bound and the GPU's measurement."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.common import cases_of
from fla_dispatch.kernels._shared.token_cases import Sizes
from fla_dispatch.kernels.delta.cases import OP_NAMES as DELTA
from fla_dispatch.kernels.scalar_decay.cases import OP_NAMES as SCALAR_DECAY

#: Ops with the options that change what is kept, and value heads of a query head.
WAYS: tuple[tuple[str, tuple[tuple[str, Any], ...], int], ...] = (
    *((op, (), 1) for op in (*SCALAR_DECAY, *DELTA)),
    ("linear_attn", (("normalize", True),), 1),
    ("gated_delta", (), 2),
    ("comba", (), 2),
    *((op, (("raw", True),), 1) for op in ("gated_delta", "kda", "comba")),
)


class Layout(NamedTuple):
    """B rows of T tokens, or a pack of these lengths, of H value heads; mamba2's have one group and a state size of 128."""

    B: int
    T: int
    H: int
    lengths: tuple[int, ...] | None = None

    def make(self, op: str, D: int, device: str, *, options: tuple[tuple[str, Any], ...] = (), group: int = 1) -> Any:
        """bfloat16 inputs without states, wanting gradients."""
        ssd = op == "mamba2"
        sizes = Sizes(self.B, self.T, 1 if ssd else self.H // group, self.H, 128 if ssd else D, D)
        made = cases_of(op).make_inputs(op, sizes, torch.bfloat16, device, options=options, lengths=self.lengths)
        return made.replaced({name: x.detach().requires_grad_() for name, x in made.leaves().items()})


def packed(lengths: tuple[int, ...], H: int) -> Layout:
    return Layout(1, sum(lengths), H, lengths)
