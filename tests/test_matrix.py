"""op x variant x case on a CPU: the torch variants (Triton's run in tests/interpreter and tests/gpu)."""

from __future__ import annotations

import dataclasses

import matrix
import pytest
import steps
from rooms import DELTA

from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels.scalar_decay.cases import CASES, OP_NAMES, Case

VARIANTS = matrix.variants("torch")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, matrix.has("partial")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, matrix.has("halves")))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, lambda c: c.lengths is not None))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, matrix.has("repeat")))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, matrix.has("causal")))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("small", VARIANTS, lambda c: c.name.startswith(("group2", "pack_mixed"))))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, "cpu")


def test_every_op_has_cases() -> None:
    assert {c.op for c in CASES} == set(OP_NAMES)
    assert {c.op for c in steps.CASES} == set(steps.OP_NAMES)
    assert sorted((*OP_NAMES, *steps.OP_NAMES, *DELTA.cases.OP_NAMES)) == sorted(registry.op_names())
    assert len({c.id for c in CASES}) == len(CASES)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_some_triton_variant_takes_every_gpu_case(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, on devices that need not be here: a Problem is made from meta tensors and moved to the device."""
    recurrence = registry.get_recurrence("scalar_decay")
    chosen = matrix.variants("triton")
    refused = []
    for case in CASES:
        if "wide" in case.tags:
            continue
        low = registry.get_op(case.op).contract(*(made := case.make("meta")).args, **made.kwargs)
        tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
        problem = dataclasses.replace(recurrence.problem(tensors, low.options, True), device=hypothetical(arch), interpret=False)
        reasons = {v: recurrence.variant(v).static_refusals(problem) for v in chosen}
        if all(reasons.values()):
            refused.append(f"{case.id}: {reasons}")
    assert not refused, "\n".join(refused)
