"""What the generated matrix needs to know of a room whose recurrence has gradients: its cases, oracle and tolerances."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fla_dispatch import registry

Tensors = dict[str, torch.Tensor]


class Room(NamedTuple):
    """Modules of a room."""

    name: str
    cases: Any
    reference: ModuleType
    chunk_torch: ModuleType
    configs: Any

    @property
    def recurrence(self) -> registry.Recurrence:
        return registry.get_recurrence(self.name)

    def variants(self, language: str | None = None) -> list[str]:
        """Variants of the recurrence, all or those of one language (`triton`, `torch`)."""
        return [v.name for v in self.recurrence.variants if language in (None, v.language)]


def _room(name: str) -> Room:
    parts = (importlib.import_module(f"fla_dispatch.kernels.{name}.{part}") for part in ("cases", "reference", "chunk_torch", "configs"))
    return Room(name, *parts)


SCALAR_DECAY = _room("scalar_decay")
DELTA = _room("delta")
ROOMS = {room.name: room for room in (SCALAR_DECAY, DELTA)}


def room_of(op: str) -> Room:
    return ROOMS[registry.get_op(op).recurrence]


def per_token(inputs: Any, T: int) -> dict[str, int]:
    """The leaves that have entries for each of T tokens, and how many."""
    if hasattr(inputs, "per_token"):
        return dict(inputs.per_token(T))
    return {name: 1 for name, x in inputs.leaves().items() if x.dim() >= 3 and x.shape[1] == T and not name.startswith("initial_state")}


def main(op: str) -> tuple[str, ...]:
    """The arguments that autocast casts."""
    return ("x", "B", "C") if op == "mamba2" else ("q", "k", "v", "p")
