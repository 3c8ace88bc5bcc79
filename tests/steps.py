"""The generated matrix of steps, op x variant x case: its parameters and checks, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matrix
import pytest
import torch
from rooms import DELTA, SCALAR_DECAY, Room, per_token

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.kernels._shared.step_cases import Case, Inputs, Sizes, tolerance
from fla_dispatch.requirements import Refusal

__all__ = ["Case", "Inputs", "Sizes", "tolerance"]


class StepRoom(NamedTuple):
    """A room of steps: its cases, and the room whose ops they follow."""

    name: str
    cases: Any
    full: Room

    @property
    def recurrence(self) -> registry.Recurrence:
        return registry.get_recurrence(self.name)

    def variants(self, language: str) -> list[str]:
        return [v.name for v in self.recurrence.variants if v.language == language]


def _room(name: str, full: Room) -> StepRoom:
    return StepRoom(name, importlib.import_module(f"fla_dispatch.kernels.{name}.cases"), full)


SCALAR_STEP = _room("scalar_step", SCALAR_DECAY)
DELTA_STEP = _room("delta_step", DELTA)
ROOMS = (SCALAR_STEP, DELTA_STEP)
OP_NAMES: tuple[str, ...] = tuple(op for room in ROOMS for op in room.cases.OP_NAMES)
GATED: tuple[str, ...] = tuple(op for room in ROOMS for op in room.cases.GATED)
CASES: tuple[Case, ...] = tuple(case for room in ROOMS for case in room.cases.CASES)

#: Every room of steps names its variants alike.
(TRITON,) = {tuple(room.variants("triton")) for room in ROOMS}


def room_of(op: str) -> StepRoom:
    (found,) = (room for room in ROOMS if op in room.cases.OP_NAMES)
    return found


def recurrence_of(op: str) -> registry.Recurrence:
    return room_of(op).recurrence


def make_inputs(op: str, sizes: Sizes, *given: Any, **chosen: Any) -> Inputs:
    """Inputs of any step."""
    made: Inputs = room_of(op).cases.make_inputs(op, sizes, *given, **chosen)
    return made


def select(tag: str) -> tuple[Case, ...]:
    """The cases of all rooms with a tag."""
    return tuple(case for room in ROOMS for case in room.cases.select(tag))


def pairs(tag: str, chosen: Sequence[str], only: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """pytest parameters (variant, case) for a tag."""
    return [pytest.param(v, c, id=f"{v}-{c.id}") for c in select(tag) if only(c) for v in chosen]


def refusals(variant: str, op: str, inputs: Inputs) -> tuple[Refusal, ...]:
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    recurrence = recurrence_of(op)
    problem = dataclasses.replace(recurrence.problem(low.tensors, low.options, False), forced=True)
    return recurrence.variant(variant).static_refusals(problem)


def run(op: str, variant: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The output, and the pools after the step: those of the inputs."""
    with torch.no_grad():
        o = fd.op(op, mode=variant)(*inputs.args, **inputs.kwargs)
    return {"o": o, **inputs.states()}


def judge(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == want.keys()
    for name, x in found.items():
        assert x.shape == want[name].shape
        error, bound = matrix.distance(x, want[name]), tolerance(dtype if name == "o" else x.dtype, name)
        assert error <= bound, f"{name}: error {error:.2e} > {bound:.2e}"


def tokens(inputs: Inputs) -> list[torch.Tensor]:
    """The positional arguments of a call but its state."""
    return [x for x in inputs.args[:-1] if x is not None]


def check_values(variant: str, case: Case, device: str, seed: int = 0) -> None:
    """Output and pools against the reference in float64; other slots and padding keep their bits; inputs are not touched."""
    inputs = case.make(device, seed=seed)
    if variant != "auto" and (against := refusals(variant, case.op, inputs)):
        pytest.skip("; ".join(r.text() for r in against))
    want = run(case.op, "reference", inputs.wide())
    mine = inputs.fresh()
    given = [x.clone() for x in tokens(inputs)]
    with matrix.poisoned():
        found = run(case.op, variant, mine)
    judge(found, want, case.dtype)
    assert found["o"].dtype == case.dtype and found["o"].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(given, tokens(inputs), strict=True))
    slots = inputs.kwargs.get("slots")
    if slots is None:
        return
    rows = slots[slots >= 0].tolist()
    others = [s for s in range(inputs.states()["state"].shape[0]) if s not in rows]
    assert others and not found["o"][slots < 0].any()
    for name, before in inputs.states().items():
        assert torch.equal(found[name][others], before[others]), f"{name}: slots of no row were changed"
        assert not torch.equal(found[name][rows], before[rows]) or not rows


def check_repeat(variant: str, case: Case, device: str, runs: int = 3) -> None:
    """The same step on copies of the same pools gives the same bits."""
    inputs = case.make(device)
    if refusals(variant, case.op, inputs):
        pytest.skip("refused")
    first = run(case.op, variant, inputs.fresh())
    for _ in range(runs - 1):
        matrix.same(run(case.op, variant, inputs.fresh()), first, "two runs of a step")


def check_guarded(variant: str, case: Case, device: str) -> None:
    """Rows of padding are not even read: NaN there goes nowhere."""
    inputs = case.make(device)
    if refusals(variant, case.op, inputs):
        pytest.skip("refused")
    padding = inputs.kwargs["slots"] < 0
    assert padding.any()
    want = run(case.op, variant, inputs.fresh())
    for x in tokens(inputs):
        if x.shape[:1] == padding.shape and x.dim() >= 2:
            x[padding] = float("nan")
    found = run(case.op, variant, inputs.fresh())
    matrix.same(found, want, "NaN in padding")


#: op -> further options of both the op and its step.
WAYS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    *((op.removesuffix("_step"), ()) for op in OP_NAMES),
    ("linear_attn", (("normalize", True),)),
    ("mamba2", (("gated", True), ("dt_limit", (0.002, 0.5)))),
    *((op.removesuffix("_step"), (("raw", True),)) for op in DELTA_STEP.cases.OP_NAMES),
    ("kda", (("raw", True), ("lower_bound", -5.0), ("allow_neg_eigval", True))),
    ("delta_product", (("num_householder", 3), ("ungated", True))),
)


def check_prefill_and_steps(variant: str, op: str, options: tuple[tuple[str, Any], ...], device: str, mode: str = "auto") -> None:
    """Prefill of n tokens and m steps equal one call over n + m, in outputs and states; the pool holds more than the batch."""
    n, m = 37, 5
    B, H, HV, K, V = 3, 1 if op == "mamba2" else 2, 4, 20, 36
    full = room_of(f"{op}_step").full.cases
    made = full.make_inputs(op, full.Sizes(B, n + m, H, HV, K, V), torch.float32, device, final_state=True, options=options)
    counts, handle = per_token(made, n + m), fd.op(op, mode=mode)

    def at(begin: int, end: int | None = None) -> dict[str, torch.Tensor]:
        """The leaves that tokens have, of one token without its dimension, or of several."""
        found = {}
        for name, each in counts.items():
            x = made.leaves()[name]
            found[name] = x[:, begin] if end is None and each == 1 else x[:, begin * each : (begin + 1 if end is None else end) * each]
        return found

    with torch.no_grad():
        o, final = handle(*made.args, **made.kwargs)
        first = made.replaced(at(0, n))
        o_first, state = handle(*first.args, **first.kwargs)
    slots = torch.tensor([4, 0, 2], device=device)
    pools = []
    for x in state if isinstance(state, tuple) else (state,):
        pool = torch.full((6, *x.shape[1:]), 7.0, device=device)
        pool[slots] = x
        pools.append(pool)
    pool = tuple(pools) if isinstance(state, tuple) else pools[0]
    step = fd.op(f"{op}_step", mode=variant)
    outputs = [o_first]
    with torch.no_grad():
        for t in range(n, n + m):
            token = made.replaced(at(t))
            kwargs = {name: x for name, x in token.kwargs.items() if name != "output_final_state"}
            outputs.append(step(*token.args, pool, slots=slots, **kwargs)[:, None])
    assert matrix.distance(torch.cat(outputs, 1), o.double()) < 1e-5
    for x, want in zip(pools, final if isinstance(final, tuple) else (final,), strict=True):
        assert matrix.distance(x[slots], want.double()) < 1e-5
        assert (x[[1, 3, 5]] == 7).all()


#: What is hard for a delta rule: keys that come again at full weight, decays that forget all or nothing, transforms from raw input.
STRESS = ("repeated", "strong", "none", "reset", "raw")


def check_stress(variant: str, op: str, kind: str, device: str, tokens_of_each: int = 40) -> None:
    """Many tokens on one pool against float64: errors neither grow nor hide where an update cancels what is stored."""
    sizes, raw = Sizes(2, 1, 2, 32, 20), (("raw", True),) if kind == "raw" else ()
    regime = kind if kind in ("strong", "none", "reset") else "mild"
    pool = make_inputs(op, sizes, device=device).args[-1]
    exact = pool.double()
    key = make_inputs(op, sizes, device=device).args[1]
    for t in range(tokens_of_each):
        args, kwargs = make_inputs(op, sizes, device=device, seed=t + 1, regime=regime, options=raw)
        q, k, *rest, beta, _ = args
        if kind == "repeated":
            k, beta = key, torch.ones_like(beta)
            q = k if k.dim() == 3 else k[:, -1]
        call = Inputs((q, k, *rest, beta, pool), kwargs)
        found = run(op, variant, call)
        want = run(op, "reference", Inputs((*call.wide().args[:-1], exact), call.wide().kwargs))
        judge(found, want, torch.float32)
        if kind == "repeated" and op != "comba_step":  # what was stored is replaced: the state gives back the value
            value = rest[0] if rest[0].dim() == 3 else rest[0][:, -1]
            assert matrix.distance(found["o"], value.double() * sizes.K**-0.5) < 1e-5
