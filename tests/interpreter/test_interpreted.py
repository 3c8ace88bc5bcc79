"""op x variant x case for Triton variants, interpreted on the CPU at small sizes."""

from __future__ import annotations

from collections.abc import Callable

import matrix
import pytest
import torch

from fla_dispatch.kernels.scalar_decay.cases import Case

VARIANTS = matrix.variants("triton")


def one_of_a_kind(*names: str) -> Callable[[Case], bool]:
    """Cases by name, for one op of each kind of gate: ops share kernels, and the interpreter is slow."""
    normalized = {f"{name}_normalized" for name in names}
    return lambda case: case.name in normalized or (case.name in names and case.op in ("retention", "simple_gla", "mamba2"))


def in_values(case: Case) -> bool:
    """lightning_attn differs from retention in its constants alone, so a few cases do."""
    return case.op != "lightning_attn" or case.name in ("two_tokens", "130_tokens", "group2")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, in_values))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("d20_d36")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("130_tokens")))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("pack", "pack_of_none")))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("65_tokens")))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("65_tokens", "pack")))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, one_of_a_kind("group2")))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, "cpu", torch.float16)


def test_something_is_interpreted() -> None:
    """The variants are found and admitted: a matrix of skips would prove nothing."""
    assert VARIANTS
    assert not matrix.cases_refused_by_all("interpreter", VARIANTS, "cpu", grad=True)
