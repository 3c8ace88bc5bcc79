"""sweep_gluon as Python on the CPU, with its Triton companions interpreted: values and gradients against float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_simulator import Schedule, simulated

from fla_dispatch import registry
from fla_dispatch.kernels.scalar_decay import reference, sweep_gluon
from fla_dispatch.kernels.scalar_decay.cases import Sizes, gate_gradient_scale, make_inputs, tolerance
from fla_dispatch.kernels.scalar_decay.configs import GluonConfig
from fla_dispatch.kernels.scalar_decay.sweep import gluon_parts, gluon_sweep

ROOM = registry.get_recurrence("scalar_decay")
STATES: dict[str, Any] = {"initial_state": True, "final_state": True}
NORMALIZED: dict[str, Any] = {"options": (("normalize", True),)}
CASES: dict[str, tuple[str, Sizes, dict[str, Any]]] = {
    "none": ("linear_attn", Sizes(1, 130, 2, 2, 64, 64), {}),
    "constant": ("retention", Sizes(2, 130, 2, 2, 32, 72), STATES),
    "one_token": ("retention", Sizes(2, 1, 1, 1, 16, 16), STATES),
    "token": ("simple_gla", Sizes(1, 330, 1, 2, 64, 128), STATES),
    "strong": ("simple_gla", Sizes(1, 131, 1, 1, 64, 64), {"regime": "strong"}),
    "reset": ("simple_gla", Sizes(1, 131, 1, 1, 64, 64), {"regime": "reset"}),
    "pack": ("simple_gla", Sizes(1, 393, 2, 2, 64, 64), {"lengths": [0, 1, 63, 64, 65, 0, 200], **STATES}),
    "weights": ("mamba2", Sizes(1, 197, 1, 2, 64, 64), STATES),
    "wide": ("retention", Sizes(1, 130, 1, 1, 256, 64), STATES),
    "normalized": ("linear_attn", Sizes(1, 131, 1, 1, 64, 72), NORMALIZED),
    "normalized_group": ("linear_attn", Sizes(2, 130, 1, 2, 128, 96), {**NORMALIZED, **STATES}),
    "normalized_pack": ("linear_attn", Sizes(1, 393, 2, 2, 16, 32), {"lengths": [0, 1, 63, 64, 65, 0, 200], **NORMALIZED, **STATES}),
    "normalized_wide": ("linear_attn", Sizes(1, 130, 1, 1, 256, 64), {**NORMALIZED, **STATES}),
    "normalized_long": ("linear_attn", Sizes(1, 4100, 1, 1, 64, 64), NORMALIZED),
}

#: Each partition as far ahead of the others as it gets, and by lot; copies and products early, or late.
PARTITIONS = ("load", "score", "state", "output")
SCHEDULES = [
    *[Schedule(late, (*PARTITIONS[i:], *PARTITIONS[:i])) for i in range(4) for late in (False, True)],
    *[Schedule(late, seed=seed) for seed in range(2) for late in (False, True)],
]
CONFIGS = [GluonConfig(3, 2), GluonConfig(2, 1), GluonConfig(1, 1)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, config: GluonConfig) -> None:
    """Every case in every config, each under one of the schedules."""
    places = [*CASES].index(name) * len(CONFIGS) + CONFIGS.index(config)
    check(name, torch.bfloat16 if places % 2 else torch.float16, config, SCHEDULES[places % len(SCHEDULES)])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules(schedule: Schedule) -> None:
    """Who goes first changes nothing: four chunks, more than there are buffers."""
    check("pack", torch.bfloat16, GluonConfig(2, 2), schedule)


#: What synchronises the partitions.
FORGOTTEN = ("mbarrier.wait(", "mbarrier.arrive(", "barrier()", "fence_async_shared()", "tma.store_wait(0)")


def mutants() -> list[tuple[int, str]]:
    """The partitions' source with one line of synchronisation forgotten, by line; and with one parity wrong."""
    lines = Path(gluon_parts.__file__).read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        code, space = line.strip(), line[: len(line) - len(line.lstrip())]
        if code.startswith(FORGOTTEN):
            found.append((i + 1, "\n".join([*lines[:i], space + "pass", *lines[i + 1 :]])))
        if code.startswith("mbarrier.wait(") and ") ^ 1)" in code:
            found.append((i + 1, "\n".join([*lines[:i], line.replace(") ^ 1)", "))"), *lines[i + 1 :]])))
    return found


@pytest.mark.parametrize("line, source", mutants(), ids=[str(line) for line, _ in mutants()])
def test_every_synchronisation_is_needed(line: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partitions with one line less fail under some schedule: so the simulator sees what it is meant to see."""
    path = tmp_path / "gluon_mutant.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{gluon_parts.__package__}.gluon_mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for name in ("load", "score", "state", "output"):
        monkeypatch.setattr(gluon_sweep, name, getattr(mutant, name))
    with pytest.raises(AssertionError):
        for name in ("token", "none", "normalized"):
            for config in (GluonConfig(4, 1), GluonConfig(1, 1)):
                for schedule in SCHEDULES:
                    check(name, torch.bfloat16, config, schedule)


def check(name: str, dtype: torch.dtype, config: GluonConfig, schedule: Schedule) -> None:
    """Values and gradients of a case against the reference in float64."""
    op, sizes, kwargs = CASES[name]
    inputs = make_inputs(op, sizes, dtype, **kwargs)
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    wide = type(tensors)(*[x.double() if x is not None and x.is_floating_point() else x for x in tensors])
    want = ROOM.outputs(*reference.forward(None, wide, low.options))
    states = [torch.randn_like(x).float() if x.numel() else None for x in (want.state, want.z)]
    grads = ROOM.output_grads(torch.randn_like(want.o).to(dtype), *states)
    wanted = tuple(getattr(tensors, field) is not None for field in ROOM.differentiable)
    exact = ROOM.output_grads(*[None if x is None else x.double() for x in grads])
    truth = reference.backward(None, ROOM.residuals(wide, want, low.options), exact, low.options, wanted)
    with simulated(schedule) as seen, torch.no_grad():
        found = ROOM.outputs(*sweep_gluon.forward(config, tensors, low.options))
        gradients = sweep_gluon.backward(config, ROOM.residuals(tensors, found, low.options), grads, low.options, wanted)
    assert seen == ["gluon_sweep"] * 4
    close(found.o, want.o, tolerance(dtype))
    for field, kind in (("state", dtype), ("z", torch.float32), ("weight", torch.float32)):  # z and r: two terms per operand
        if getattr(want, field).numel():
            close(getattr(found, field), getattr(want, field), tolerance(kind))
    for field, x, y in zip(ROOM.differentiable, gradients, truth, strict=True):
        if y is not None:
            scale = gate_gradient_scale(y, wide.q, truth[0]) if field == "g" else None
            close(x, y, tolerance(dtype, f"d{field}"), scale)


def close(x: torch.Tensor | None, y: torch.Tensor, bound: float, scale: float | None = None) -> None:
    assert x is not None and x.shape == y.shape
    error = float((x.double() - y).norm() / max(float(y.norm()) if scale is None else scale, 1e-30))
    assert error <= bound, f"error {error:.1e}, allowed {bound:.1e}"
