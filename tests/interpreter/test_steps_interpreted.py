"""Steps of Triton variants, interpreted on the CPU: the generated matrix, drawn calls, prefill and steps, and proofs."""

from __future__ import annotations

import dataclasses
from typing import Any

import matrix
import pytest
import steps
import torch
from drawn_steps import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import Case, Inputs, Sizes, StepRoom

from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.kernels._shared.step_plan import StepConfig
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import prove

VARIANTS = steps.TRITON
CPU = torch.device("cpu")


@pytest.mark.parametrize(("variant", "case"), steps.pairs("interpreter", VARIANTS))
def test_values(variant: str, case: Case) -> None:
    steps.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), steps.pairs("interpreter", VARIANTS, lambda c: c.name.startswith(("padded", "bf16_both"))))
def test_padding_and_repeats(variant: str, case: Case) -> None:
    steps.check_guarded(variant, case, "cpu")
    steps.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("op", "options"), steps.WAYS, ids=str)
def test_prefill_and_steps_equal_one_call(variant: str, op: str, options: tuple[tuple[str, Any], ...]) -> None:
    steps.check_prefill_and_steps(variant, op, options, "cpu", mode="chunk_torch")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", steps.STRESS)
@pytest.mark.parametrize("op", steps.DELTA_STEP.cases.OP_NAMES)
def test_many_hard_tokens(op: str, kind: str, variant: str) -> None:
    steps.check_stress(variant, op, kind, "cpu", tokens_of_each=12)


def test_weights_and_gates_of_any_strides() -> None:
    """beta and gates per head are read where they are, whatever lies between their heads."""
    inputs = steps.make_inputs("gated_delta_step", Sizes(3, 1, 2, 16, 16))
    want = steps.run("gated_delta_step", "step_triton", inputs.fresh())
    *args, g, beta, state = inputs.fresh().args
    g, beta = (torch.stack([x, x.new_full((), float("nan")).expand_as(x)], -1)[..., 0] for x in (g, beta.t().contiguous().t()))
    assert g.stride() == (4, 2)
    matrix.same(steps.run("gated_delta_step", "step_triton", Inputs((*args, g, beta, state), {})), want, "a step with other strides")


@pytest.mark.parametrize("room", steps.ROOMS, ids=lambda room: room.name)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_steps(room: StepRoom, data: st.DataObject) -> None:
    case = data.draw(drawn(room))
    for variant in VARIANTS:
        steps.check_values(variant, case, "cpu")


@pytest.mark.parametrize(
    "op, options",
    [
        ("simple_gla_step", {}), ("linear_attn_step", {"normalize": True}), ("kda_step", {"raw": True}), ("comba_step", {}),
        ("delta_product_step", {"num_householder": 3}),
    ],
)  # fmt: skip
def test_every_config_is_proven(op: str, options: dict[str, Any]) -> None:
    """By the tuner's own proof, of the first of its trials: blocks run one after the other here."""
    work = steps.recurrence_of(op).workload
    assert work is not None
    small = dataclasses.replace(work, trials=lambda p, config: work.trials(p, config)[:1])
    recurrence = dataclasses.replace(steps.recurrence_of(op), workload=small)
    variant = recurrence.variant("step_triton")
    key = key_of(op, {"B": 4, "H": 1, "HV": 2, "K": 40, "V": 72}, profile(CPU), dtype="float32", options={"pool": "slots", **options})
    configs = variant.configs(key)
    assert StepConfig(64, 4) == configs[0] and len(configs) >= 4
    for config in configs:
        found = prove(recurrence, variant, config, key, CPU)
        assert found.status == "ok", (config, found.detail)


def test_something_is_interpreted() -> None:
    assert VARIANTS and {registry.get_op(op).recurrence for op in steps.OP_NAMES} == {room.name for room in steps.ROOMS}
    for case in steps.select("interpreter"):
        assert not steps.refusals(VARIANTS[0], case.op, case.make())
