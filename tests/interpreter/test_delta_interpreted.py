"""The delta room's Triton variants, interpreted on the CPU at small sizes: the generated matrix, stress, drawn calls and proofs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import delta_stress
import matrix
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rooms import DELTA

from fla_dispatch.device import profile
from fla_dispatch.kernels.delta.cases import GATED, OP_NAMES, Case, Sizes
from fla_dispatch.requirements import RefusalCode
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import prove

VARIANTS = DELTA.variants("triton")
CPU = torch.device("cpu")


def pairs(only: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    return matrix.pairs("interpreter", VARIANTS, only, DELTA)


def named(*names: str, ops: tuple[str, ...] = ("kda", "comba")) -> Callable[[Case], bool]:
    """Cases by name, for one op of each kind of gate: ops share kernels, and the interpreter is slow."""
    return lambda case: case.name in names and case.op in ops


def in_values(case: Case) -> bool:
    """delta and gated_delta are kda and comba with less, and delta_product is gated_delta with more tokens, so a few cases of each do."""
    few = {
        "delta": ("no_tokens", "one_token", "two_tokens", "d20_d36", "bf16_small", "raw"),
        "gated_delta": ("two_tokens", "group2", "fp16_small", "strong"),
        "delta_product": ("two_tokens", "three_updates"),
    }
    return case.op not in few or case.name in few[case.op]


@pytest.mark.parametrize(("variant", "case"), pairs(in_values))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("d20_d36")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("130_tokens", ops=("comba",))))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("pack", "pack_of_none", ops=("kda",))))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("d20_d36")))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("pack")))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(named("d20_d36")))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, "cpu", torch.float16)


@pytest.mark.parametrize("name", [name for name in delta_stress.STRESS if not name.startswith("delta_product")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stress(variant: str, name: str) -> None:
    delta_stress.check(variant, name, "cpu", T=24)


#: Chunks in a row with operands in half precision, for gates of each kind and every kind of key.
LONG = (
    "delta-repeated", "delta-alternating", "delta-doubled", "gated_delta-strong_gates", "gated_delta-raw_saturated", "comba-repeated",
    "kda-repeated", "kda-mixed_gates",
)  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_stress_over_chunks(name: str) -> None:
    delta_stress.check("chunk_triton", name, "cpu", torch.float16, T=140)


@st.composite
def calls(draw: Any) -> Case:
    """A call of any op: up to three sequences or rows, up to 66 tokens, odd head dims, grouped heads."""
    op = draw(st.sampled_from(OP_NAMES))
    lengths = draw(st.none() | st.lists(st.sampled_from((0, 1, 2, 7, 16, 33)), min_size=1, max_size=3))
    rows, tokens = (1, sum(lengths)) if lengths is not None else (draw(st.integers(1, 2)), draw(st.integers(0, 30)))
    heads, group = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (1, 3))))
    dims = st.sampled_from((1, 3, 16, 20, 40))
    return Case(
        "drawn", op, Sizes(rows, tokens, heads, heads * group, draw(dims), draw(dims)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        lengths=None if lengths is None else tuple(lengths),
        regime=draw(st.sampled_from(("mild", "strong", "none", "reset"))) if op in GATED else "mild",
        initial_state=draw(st.booleans()), final_state=draw(st.booleans()), fused=draw(st.booleans()),
        options=draw(st.sampled_from(((), (("scale", 0.5),)))),
    )  # fmt: skip


@given(case=calls(), seed=st.integers(0, 3))
@settings(
    max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_drawn_calls(case: Case, seed: int) -> None:
    inputs = case.make("cpu", seed=seed)
    outputs, gradients, grads = matrix.oracle(case.op, inputs, grad=True)
    for variant in VARIANTS:
        if matrix.refusals(variant, case.op, inputs, grad=True):
            continue
        with matrix.poisoned():
            found, found_grads = matrix.execute(case.op, variant, inputs, grad=True, grads=grads)
        matrix.judge(found, outputs, case)
        matrix.judge(found_grads, gradients, case, prefix="d", scales=matrix.gradient_scales(case.op, inputs, gradients))


def proof_of(variant: str, op: str, packed: bool, backward: bool, **changes: int) -> Any:
    """The tuner's own proof with its guard bands, of the trials that are small enough here."""
    key = key_of(op, {"B": 2, "T": 64, "H": 1, "HV": 2, "K": 16, "V": 16}, profile(CPU), dtype="float32", packed=packed, initial_state=True)
    work = DELTA.recurrence.workload
    assert work is not None
    small = dataclasses.replace(work, trials=lambda p, config: tuple(t for t in work.trials(p, config) if t.name in ("odd", "one")))
    recurrence = dataclasses.replace(DELTA.recurrence, workload=small)
    against = [r.text() for r in recurrence.variant(variant).static_refusals(key) if r.code is RefusalCode.FLAG]
    if against:
        pytest.skip("; ".join(against))
    config: Any = recurrence.variant(variant).configs(key)[0]
    return prove(recurrence, recurrence.variant(variant), config._replace(**changes), key, CPU, backward=backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "packed"), [("kda", False), ("comba", True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_are_proven(variant: str, op: str, packed: bool, backward: bool) -> None:
    found = proof_of(variant, op, packed, backward)
    assert found.status == "ok", found.detail


SEGMENTED = [
    ("gated_delta", False, False),
    ("gated_delta", False, True),
    ("comba", True, False),
    ("comba", True, True),
    ("kda", False, False),
]


@pytest.mark.parametrize(("op", "packed", "backward"), [*SEGMENTED, ("kda", False, False)])
def test_segments_are_proven(op: str, packed: bool, backward: bool) -> None:
    found = proof_of("chunk_triton", op, packed, backward, SEG=64)
    assert found.status == "ok", found.detail


def test_something_is_interpreted() -> None:
    """The variants are found and admitted: a matrix of skips would prove nothing."""
    assert VARIANTS
    assert not matrix.cases_refused_by_all("interpreter", VARIANTS, "cpu", grad=True, room=DELTA)
