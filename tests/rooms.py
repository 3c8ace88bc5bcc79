"""What the generated matrix needs to know of a room whose recurrence has gradients: its cases, oracle and tolerances."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fla_dispatch import registry

Tensors = dict[str, torch.Tensor]


class Room(NamedTuple):
    """Modules of a room; scales(op, inputs, gradients): what errors of gradients are relative to, where not their own norm."""

    name: str
    cases: Any
    reference: ModuleType
    chunk_torch: ModuleType
    configs: Any
    scales: Callable[[str, Any, Tensors], dict[str, float]]

    @property
    def recurrence(self) -> registry.Recurrence:
        return registry.get_recurrence(self.name)

    def variants(self, language: str | None = None) -> list[str]:
        """Variants of the recurrence, all or those of one language (`triton`, `torch`)."""
        return [v.name for v in self.recurrence.variants if language in (None, v.language)]


def _scalar_decay_scales(op: str, inputs: Any, grads: Tensors) -> dict[str, float]:
    """Gate gradients of scalar_decay. See cases.gate_gradient_scale.

    In mamba2 the gate is d_t A: its scale reaches dt times |A|; dt_bias and A are sums over tokens of such terms.
    """
    scale = SCALAR_DECAY.cases.gate_gradient_scale
    if op == "simple_gla":
        return {"g": scale(grads["g"], inputs.leaves()["q"], grads["q"])}
    if op != "mamba2":
        return {}
    leaves = inputs.leaves()
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    steps = low.prepare(low.tensors).beta.double()
    terms = scale(grads["C"][..., :0], leaves["C"], grads["C"])
    rate = leaves["A"].double().abs().amax().item()
    many = steps.numel() ** 0.5  # sums over tokens: |sum_t x_t e_t| <= |x| |e|, and the gates' errors are correlated
    floor = {"dt": rate * terms, "dt_bias": rate * many * terms, "A": steps.norm().item() * terms}
    return {name: max(x, grads[name].double().norm().item()) for name, x in floor.items() if name in grads}


def _room(name: str, scales: Callable[[str, Any, Tensors], dict[str, float]] | None = None) -> Room:
    parts = (importlib.import_module(f"fla_dispatch.kernels.{name}.{part}") for part in ("cases", "reference", "chunk_torch", "configs"))
    cases, reference, chunk_torch, configs = parts
    return Room(name, cases, reference, chunk_torch, configs, scales or cases.gradient_scales)


SCALAR_DECAY = _room("scalar_decay", _scalar_decay_scales)
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
