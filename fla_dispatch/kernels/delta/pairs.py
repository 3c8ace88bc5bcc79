"""Products of pairs of tokens with their decay, equation (5), and the two products that their gradients need.

    pairs(a, b)_ts = sum_c a_tc b_sc L_tsc,     rows(X, b)_t = sum_s X_ts b_s L_ts,     columns(X, a)_s = sum_t X_ts a_t L_ts

with the decay L_ts = exp(g_s+1 + ... + g_t) for s <= t (strict: s < t; early: the sum ends before t), else 0. With one gate for all
channels, [..., C, 1], L is a factor of the pair. With one for each, it is part of the product: rows of a sub-chunk of SUB tokens take
its beginning as their anchor, and columns before it enter as (a exp(sum from the anchor)) (b exp(sum to the anchor))^T; pairs inside a
sub-chunk are summed one by one. Sums of gates are formed between the tokens that they are for, never as a difference of two sums from
further back, so a strong gate costs no digits of those after it; and none is positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

#: Tokens of a sub-chunk.
SUB = 8


class Gates(NamedTuple):
    """Log decays of chunks, which pairs they are for, and, with one gate for all channels, L."""

    g: torch.Tensor  # [..., C, K or 1]
    strict: bool
    early: bool
    whole: torch.Tensor | None  # [..., C, C]


def gates(g: torch.Tensor, *, strict: bool = False, early: bool = False) -> Gates:
    return Gates(g, strict, early, _between(g, strict, early)[..., 0] if g.shape[-1] == 1 else None)


def from_start(g: torch.Tensor, early: bool = False) -> torch.Tensor:
    """g_1 + ... + g_t for each t (early: without g_t), along the second last dimension."""
    sums = g.cumsum(-2)
    return F.pad(sums[..., :-1, :], (0, 0, 1, 0)) if early else sums


def to_end(g: torch.Tensor) -> torch.Tensor:
    """g_t+1 + ... + g_C for each t."""
    return F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1)) if g.shape[-2] else g


def _between(g: torch.Tensor, strict: bool, early: bool) -> torch.Tensor:
    """L: [..., C, C, gates]."""
    C = g.shape[-2]
    ones = torch.ones(C, C, dtype=torch.bool, device=g.device)
    sums = (g[..., :, None, :] * ones.tril(-1)[..., None]).cumsum(-3)
    if early:
        sums = F.pad(sums[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    return sums.masked_fill(~ones.tril(-1 if strict else 0)[..., None], -torch.inf).exp()


class _Block(NamedTuple):
    """A sub-chunk: its rows, those before it, L inside, and decays from its beginning to its rows and from those before to it."""

    own: slice
    before: slice
    inside: torch.Tensor
    after: torch.Tensor
    until: torch.Tensor


def _blocks(x: Gates) -> Iterator[_Block]:
    for begin in range(0, x.g.shape[-2], SUB):
        own, before = slice(begin, begin + SUB), slice(0, begin)
        g = x.g[..., own, :]
        until = to_end(x.g[..., before, :]).exp()
        yield _Block(own, before, _between(g, x.strict, x.early), from_start(g, x.early).exp(), until)


def pairs(a: torch.Tensor, b: torch.Tensor, x: Gates) -> torch.Tensor:
    """[..., C, C] from a, b [..., C, K]."""
    if x.whole is not None:
        return (a @ b.mT) * x.whole
    found = []
    for y in _blocks(x):
        inside = (a[..., y.own, None, :] * b[..., None, y.own, :] * y.inside).sum(-1)
        outside = (a[..., y.own, :] * y.after) @ (b[..., y.before, :] * y.until).mT
        rest = inside.new_zeros((*inside.shape[:-1], a.shape[-2] - y.before.stop - inside.shape[-1]))
        found.append(torch.cat([outside, inside, rest], -1))
    return torch.cat(found, -2)


def rows(X: torch.Tensor, b: torch.Tensor, x: Gates) -> torch.Tensor:
    """[..., C, K]; what X holds outside of the pairs has no part in it."""
    if x.whole is not None:
        return (X * x.whole) @ b
    found = []
    for y in _blocks(x):
        inside = (X[..., y.own, y.own, None] * b[..., None, y.own, :] * y.inside).sum(-2)
        found.append(inside + y.after * (X[..., y.own, y.before] @ (b[..., y.before, :] * y.until)))
    return torch.cat(found, -2)


def columns(X: torch.Tensor, a: torch.Tensor, x: Gates) -> torch.Tensor:
    """[..., C, K]; what X holds outside of the pairs has no part in it."""
    if x.whole is not None:
        return (X * x.whole).mT @ a
    found = torch.zeros_like(a)
    for y in _blocks(x):
        found[..., y.own, :] += (X[..., y.own, y.own, None] * a[..., y.own, None, :] * y.inside).sum(-3)
        found[..., y.before, :] += y.until * (X[..., y.own, y.before].mT @ (a[..., y.own, :] * y.after))
    return found
