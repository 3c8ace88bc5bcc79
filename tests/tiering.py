"""A store in a temporary directory with a site and shipped data, and records to put into it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fla_dispatch import registry, settings, tuning
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.problem import Problem
from fla_dispatch.registry import Recurrence, Variant
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.choice import make_record
from fla_dispatch.tuning.environment import Environment, current
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.records import Outcome, Record, Timing, config_dict, record_key

CPU = torch.device("cpu")
SHIFTS = {
    "one_torch": 3.0,
    "two_torch": 2.0,
    "three_torch": 1.0,
    "four_torch": 4.0,
}  # estimated seconds: three_torch is the estimate's choice


def table(order: tuple[str, ...] = tuple(SHIFTS)) -> Recurrence:
    """scalar_decay with four variants that run chunk_torch's code, in a given order, and the reference."""
    base = registry.get_recurrence("scalar_decay")
    module = base.variant("chunk_torch").module
    variants = [
        Variant(name, module, (), lambda p, c, d, s=SHIFTS[name]: s, lambda p: (TorchConfig(64), TorchConfig(32), TorchConfig(16)))
        for name in order
    ]
    return dataclasses.replace(base, variants=(*variants, base.variant("reference")))


def problem(T: int = 256, *, grad: bool = False, B: int = 2) -> Problem:
    base = registry.get_recurrence("scalar_decay")
    x = torch.empty(B, T, 2, 16)
    tensors = base.tensors(x, x, x, *[None] * 8)
    return base.problem(tensors, base.options(1.0, "none", 0.0, False, False), grad)


def outcome(variant: str, config: Any = None, us: float = 10.0, *, status: str = "ok", code: str | None = None) -> Outcome:
    base = registry.get_recurrence("scalar_decay")
    timing = Timing(median_us=us, min_us=us, mad_us=0.0, rounds=5) if status == "ok" else None
    code = kernel_hash(base.variant("chunk_torch")) if code is None else code
    return Outcome(
        variant=variant, config=config_dict(TorchConfig(64) if config is None else config), kernel_hash=code, status=status, timing=timing
    )  # fmt: skip


def record(p: Problem, *outcomes: Outcome, direction: str = "forward") -> Record:
    order = [o.fingerprint for o in outcomes]
    return make_record(p.recurrence, record_key(p), direction, outcomes, default=order[0], order=order)  # type: ignore[arg-type]


class Shelves:
    """The three tiers of a temporary store; `put` writes a record where it is wanted."""

    def __init__(self, root: Path) -> None:
        self.roots = {"user": root / "cache" / "v1", "site": root / "site", "shipped": root / "shipped"}
        self.environment = current(CPU)
        self.elsewhere = Environment(self.environment.slug.replace("-cpu-", "-cpu-9"), "none", "none")
        self.make()

    def make(self) -> None:
        at = settings.current.cache_dir, settings.current.cache_path
        stores._stores[at] = stores.Store(self.roots["user"], (self.roots["site"],), self.roots["shipped"])
        tuning.epoch += 1

    def put(self, tier: str, found: Record, env: Environment | None = None) -> None:
        assert stores.Store(self.roots[tier]).put(env or self.environment, found)
        self.make()


@contextlib.contextmanager
def shelves(root: Path) -> Iterator[Shelves]:
    """A store of its own for a block."""
    with settings.override(cache_dir=str(root / "cache"), cache_path=(str(root / "site"),)):
        try:
            yield Shelves(root)
        finally:
            stores._stores.pop((settings.current.cache_dir, settings.current.cache_path), None)
            tuning.epoch += 1
