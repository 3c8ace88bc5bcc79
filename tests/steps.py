"""The generated matrix of steps, op x variant x case: its parameters and checks, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import matrix
import pytest
import torch
from rooms import per_token

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.kernels.scalar_decay import cases as full
from fla_dispatch.kernels.scalar_step.cases import CASES, GATED, OP_NAMES, Case, Inputs, Sizes, select, tolerance
from fla_dispatch.requirements import Refusal

__all__ = ["CASES", "GATED", "OP_NAMES", "Case", "Inputs", "Sizes", "select", "tolerance"]

RECURRENCE = registry.get_recurrence("scalar_step")


def variants(language: str) -> list[str]:
    return [v.name for v in RECURRENCE.variants if v.language == language]


def pairs(tag: str, chosen: list[str], only: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """pytest parameters (variant, case) for a tag."""
    return [pytest.param(v, c, id=f"{v}-{c.id}") for c in select(tag) if only(c) for v in chosen]


def refusals(variant: str, op: str, inputs: Inputs) -> tuple[Refusal, ...]:
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    problem = dataclasses.replace(RECURRENCE.problem(low.tensors, low.options, False), forced=True)
    return RECURRENCE.variant(variant).static_refusals(problem)


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


def check_values(variant: str, case: Case, device: str, seed: int = 0) -> None:
    """Output and pools against the reference in float64; other slots and padding keep their bits; inputs are not touched."""
    inputs = case.make(device, seed=seed)
    if variant != "auto" and (against := refusals(variant, case.op, inputs)):
        pytest.skip("; ".join(r.text() for r in against))
    want = run(case.op, "reference", inputs.wide())
    mine = inputs.fresh()
    given = [x.clone() for x in inputs.args[:-1]]
    with matrix.poisoned():
        found = run(case.op, variant, mine)
    judge(found, want, case.dtype)
    assert found["o"].dtype == case.dtype and found["o"].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(given, inputs.args[:-1], strict=True))
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
    for x in inputs.args[:-1]:
        if x.shape[:1] == padding.shape and x.dim() >= 2:
            x[padding] = float("nan")
    found = run(case.op, variant, inputs.fresh())
    matrix.same(found, want, "NaN in padding")


#: op -> further options of both the op and its step.
WAYS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    *((op.removesuffix("_step"), ()) for op in OP_NAMES),
    ("linear_attn", (("normalize", True),)),
    ("mamba2", (("gated", True), ("dt_limit", (0.002, 0.5)))),
)


def check_prefill_and_steps(variant: str, op: str, options: tuple[tuple[str, Any], ...], device: str, mode: str = "auto") -> None:
    """Prefill of n tokens and m steps equal one call over n + m, in outputs and states; the pool holds more than the batch."""
    n, m = 37, 5
    B, H, HV, K, V = 3, 1 if op == "mamba2" else 2, 4, 20, 36
    made = full.make_inputs(op, full.Sizes(B, n + m, H, HV, K, V), torch.float32, device, final_state=True, options=options)
    names, handle = list(per_token(made, n + m)), fd.op(op, mode=mode)
    with torch.no_grad():
        o, final = handle(*made.args, **made.kwargs)
        first = made.replaced({name: made.leaves()[name][:, :n] for name in names})
        o_first, state = handle(*first.args, **first.kwargs)
    slots = torch.tensor([4, 0, 2], device=device)
    pools = []
    for x in state if isinstance(state, tuple) else (state,):
        pool = torch.full((6, *x.shape[1:]), 7.0, device=device)
        pool[slots] = x
        pools.append(pool)
    pool = tuple(pools) if isinstance(state, tuple) else pools[0]
    step = fd.op(f"{op}_step", mode=variant)
    options_of_step = {name: x for name, x in made.kwargs.items() if name not in names and name != "output_final_state"}
    outputs = [o_first]
    with torch.no_grad():
        for t in range(n, n + m):
            token = made.replaced({name: made.leaves()[name][:, t] for name in names})
            kwargs = {name: token.kwargs[name] for name in options_of_step.keys() | (token.kwargs.keys() & set(names))}
            outputs.append(step(*token.args, pool, slots=slots, **kwargs)[:, None])
    assert matrix.distance(torch.cat(outputs, 1), o.double()) < 1e-5
    for x, want in zip(pools, final if isinstance(final, tuple) else (final,), strict=True):
        assert matrix.distance(x[slots], want.double()) < 1e-5
        assert (x[[1, 3, 5]] == 7).all()
