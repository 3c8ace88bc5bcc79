"""Calls whose memory is judged, for the CPU's test of the bound and the GPU's measurement."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fla_dispatch.kernels.scalar_decay.cases import OP_NAMES, Inputs, Sizes, make_inputs

#: Ops with the options that change what is kept.
WAYS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (*((op, ()) for op in OP_NAMES), ("linear_attn", (("normalize", True),)))


class Layout(NamedTuple):
    """B rows of T tokens, or a pack of these lengths, of H value heads; mamba2's have one group and a state size of 128."""

    B: int
    T: int
    H: int
    lengths: tuple[int, ...] | None = None

    def make(self, op: str, D: int, device: str, *, options: tuple[tuple[str, Any], ...] = ()) -> Inputs:
        """bfloat16 inputs without states, wanting gradients."""
        ssd = op == "mamba2"
        sizes = Sizes(self.B, self.T, 1 if ssd else self.H, self.H, 128 if ssd else D, D)
        made = make_inputs(op, sizes, torch.bfloat16, device, options=options, lengths=self.lengths)
        return made.replaced({name: x.detach().requires_grad_() for name, x in made.leaves().items()})


def packed(lengths: tuple[int, ...], H: int) -> Layout:
    return Layout(1, sum(lengths), H, lengths)
