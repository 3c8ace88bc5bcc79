"""How tokens map to chunks that never cross the end of a sequence: what torch variants of the chunk form share.

The table is built from tensors, so nothing synchronises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Chunks(NamedTuple):
    """How tokens map to chunks. Dense: [B, T] padded to [B, NT * C]. Packed: rows gathered by `index`."""

    C: int
    NT: int
    total: int
    index: torch.Tensor | None  # packed: [NT * C] token of each slot
    slot: torch.Tensor | None  # packed: [T] slot of each token
    valid: torch.Tensor  # [1, NT, 1, C] whether a slot holds a token
    sequence: torch.Tensor | None  # packed: [NT] sequence of each chunk, N where unused
    first: torch.Tensor | None  # packed: [NT] whether the chunk is its sequence's first
    last: torch.Tensor | None  # packed: [NT] whether it is the last

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, HV, ...] -> [B, NT, HV, C, ...], zeros in unused slots."""
        if self.index is None:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.NT * self.C - self.total))
        else:
            x = x[:, self.index] * self.valid.reshape(1, -1, *(1,) * (x.dim() - 2))
        return x.unflatten(1, (self.NT, self.C)).transpose(2, 3)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[B, NT, HV, C, ...] -> [B, T, HV, ...]."""
        x = x.transpose(2, 3).flatten(1, 2)
        return x[:, : self.total] if self.slot is None else x[:, self.slot]


def chunks_of(cu: torch.Tensor | None, T: int, device: torch.device, C: int) -> Chunks:
    """The chunks of T tokens, of a dense batch or of the pack whose cumulative lengths are cu [N + 1]."""
    if cu is None:
        NT = -(-T // C)
        valid = (torch.arange(NT * C, device=device) < T).view(1, NT, 1, C)
        return Chunks(C, NT, T, None, None, valid, None, None, None)
    cu = cu.long()
    N = cu.shape[0] - 1
    NT = T // C + N if T else 0  # a bound: sum over n of ceil(T_n / C)
    offsets = F.pad(((cu.diff() + C - 1) // C).cumsum(0), (1, 0))
    chunk = torch.arange(NT, device=device)
    n = torch.searchsorted(offsets, chunk, right=True) - 1  # N for chunks past the last
    inside = n.clamp(max=max(N - 1, 0))
    begin = cu[inside] + (chunk - offsets[inside]) * C
    token = begin[:, None] + torch.arange(C, device=device)
    valid = (token < cu[inside + 1][:, None]) & (n < N)[:, None]
    position = torch.arange(T, device=device)
    owner = torch.searchsorted(cu, position, right=True) - 1
    slot = offsets[owner] * C + position - cu[owner]
    first = (chunk == offsets[inside]) & (n < N)
    last = (chunk + 1 == offsets[inside + 1]) & (n < N)
    index = token.clamp(0, max(T - 1, 0)).flatten()
    return Chunks(C, NT, T, index, slot, valid.view(1, NT, 1, C), n, first, last)
