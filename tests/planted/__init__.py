"""A variant that misbehaves on purpose, one way per config: what the tuner must survive. Imported by workers as a plug-in.

`KINDS` are the configs it offers, in order; a test replaces them. The variant is registered on import and wants float32 and the
flag normalize=false, so that other tests never meet it; `withdraw` takes it out again.
"""

from __future__ import annotations

from typing import NamedTuple

from fla_dispatch import registry
from fla_dispatch.problem import Problem
from fla_dispatch.registry import Direction, Variant
from fla_dispatch.requirements import Dim

NAME = "misbehaving_torch"

#: K of the keys that the planted variant runs: no other test has it.
K = 24

KINDS: list[str] = ["good"]


class Planted(NamedTuple):
    """How to misbehave."""

    kind: str


def _cost(problem: Problem, config: Planted, direction: Direction) -> float:
    return 1e-3


VARIANT = Variant(
    NAME, "planted.behaviour", (Dim("K", K, K),), _cost, lambda problem: tuple(Planted(kind) for kind in KINDS), "misbehaves on purpose"
)


def plant() -> None:
    """Register the variant unless it is registered."""
    table = registry.get_recurrence("scalar_decay").variants
    if all(v.name != NAME for v in table):
        registry.register_variant("scalar_decay", VARIANT)


def withdraw() -> None:
    """Take it out unless it is out; test modules do so after importing this one, and plant it for their own tests."""
    if any(v.name == NAME for v in registry.get_recurrence("scalar_decay").variants):
        registry.unregister_variant("scalar_decay", NAME)


plant()
