"""op x variant x case for Triton variants, interpreted on the CPU at small sizes."""

from __future__ import annotations

import matrix
import pytest

from fla_dispatch.kernels.scalar_decay.cases import Case

VARIANTS = matrix.variants("triton")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, matrix.has("partial")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, matrix.has("halves")))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, lambda c: c.name.startswith(("pack", "pack_of_none"))))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, matrix.has("repeat")))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, matrix.has("causal")))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("interpreter", VARIANTS, lambda c: c.name.startswith("group2")))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, "cpu")


def test_something_is_interpreted() -> None:
    """The variants are found and admitted: a matrix of skips would prove nothing."""
    assert VARIANTS
    assert not matrix.cases_refused_by_all("interpreter", VARIANTS, "cpu", grad=True)
