"""What the cases of recurrences over tokens share: their sizes, what a case says of a call, and how cases are written and found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch


class Sizes(NamedTuple):
    """B rows, T tokens, H query heads, HV value heads, K and V head dims; T counts the whole pack when there are lengths."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int


@dataclasses.dataclass(frozen=True)
class TokenCase:
    """One call of one op; a room's own class sets `generate`, its make_inputs.

    regime: gates are mild (near logsigmoid), strong (down to -20), none (zero) or reset (mild with some -inf); lengths: of
    a pack; fused: q, k, v are slices of one projection; options: further keyword arguments, of the op or of the generator; tags: small
    (any CPU), interpreter (smaller still), gpu, bench, wide (V above 256, which variants may refuse); halves, causal, repeat, partial,
    stress: which checks take it; source: the model whose sizes these are.
    """

    generate: ClassVar[Callable[..., Any]]

    name: str
    op: str
    sizes: Sizes
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    regime: str = "mild"
    initial_state: bool = False
    final_state: bool = False
    fused: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    tags: frozenset[str] = frozenset()
    source: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, device: torch.device | str = "cpu", *, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
        """This case's inputs."""
        return type(self).generate(
            self.op, self.sizes, dtype or self.dtype, device, seed=seed, lengths=self.lengths, regime=self.regime,
            initial_state=self.initial_state, final_state=self.final_state, fused=self.fused, options=self.options,
        )  # fmt: skip


Row = tuple[str, Sizes, frozenset[str], dict[str, Any]]
AnyCase = TypeVar("AnyCase", bound=TokenCase)


def row(name: str, *sizes: int, tags: str = "small", **fields: Any) -> Row:
    """A row that several ops get: its name, B, T, H, HV, K, V, tags in one string, and further fields."""
    return name, Sizes(*sizes), frozenset(tags.split()), fields


def selected(cases: Iterable[AnyCase], tag: str, op: str | None) -> tuple[AnyCase, ...]:
    """The cases with a tag, of one op or all."""
    return tuple(c for c in cases if tag in c.tags and op in (None, c.op))
