"""The delta room on a CPU: op x variant x case for the torch variants, and the contracts' own errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matrix
import pytest
import torch
from rooms import DELTA

from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.errors import CallError
from fla_dispatch.kernels.delta import ops, recurrence
from fla_dispatch.kernels.delta.cases import CASES, GATED, OP_NAMES, Case, Inputs, Sizes, make_inputs
from fla_dispatch.registry import BACKWARD, FORWARD
from fla_dispatch.sequences import SeqInfo
from fla_dispatch.tuning.keys import key_of

VARIANTS = DELTA.variants("torch")


def pairs(only: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    return matrix.pairs("small", VARIANTS, only, DELTA)


@pytest.mark.parametrize(("variant", "case"), pairs())
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(matrix.has("partial")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(matrix.has("halves")))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(lambda c: c.lengths is not None))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(matrix.has("repeat")))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(matrix.has("causal")))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), pairs(lambda c: c.name in ("group2", "pack_mixed", "raw")))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, "cpu")


def test_every_op_has_cases() -> None:
    assert {c.op for c in CASES} == set(OP_NAMES)
    assert {registry.get_op(name).recurrence for name in OP_NAMES} == {"delta"}
    assert len({c.id for c in CASES}) == len(CASES)


# -- contracts ---------------------------------------------------------------------------------------------------------------

SIZES = Sizes(2, 6, 2, 4, 8, 16)
each_op = pytest.mark.parametrize("op", OP_NAMES)


def wrong(op: str, inputs: Inputs, *parts: str, **kwargs: Any) -> None:
    """The call raises, and its message names the op, what was expected, what came and what to do."""
    with pytest.raises(ValueError) as caught:
        low = getattr(ops, op)(*inputs.args, **{**inputs.kwargs, **kwargs})
        tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
        recurrence.check(tensors, low.options)
    text = str(caught.value)
    assert isinstance(caught.value, CallError)
    for part in ("expected ", "got ", "To fix: ", *parts):
        assert part in text, text


def change(inputs: Inputs, **edits: Callable[[torch.Tensor], Any]) -> Inputs:
    return inputs.replaced({name: edit(inputs.leaves()[name]) for name, edit in edits.items()})


@each_op
def test_wrong_shapes_and_dtypes(op: str) -> None:
    good = make_inputs(op, SIZES, initial_state=True)
    for name in good.names:
        wrong(op, change(good, **{name: lambda x: x[0]}), name)
        wrong(op, change(good, **{name: lambda x: x[:, :-1]}), "shape of")
        wrong(op, change(good, **{name: lambda x: x.to(torch.int32)}))
        if not (op == "delta_product" and name == "g"):
            wrong(op, change(good, **{name: lambda x: None}), name)
    wrong(op, change(good, v=lambda x: x[:, :, :3]), "multiple")
    wrong(op, change(good, beta=lambda x: x[:, :, :2]), "shape of beta")
    wrong(op, change(good, initial_state=lambda x: x[:1]), "shape of initial_state")
    wrong(op, change(good, initial_state=lambda x: x.half()), "dtype of initial_state")
    wrong(op, good, "scale", scale="1")
    wrong(op, good, "B = 1", cu_seqlens=torch.tensor([0, 6]))
    wrong(op, good, "use_qk_l2norm", use_qk_l2norm=1)
    wrong(op, good, "output_final_state", output_final_state=None)
    wrong(op, good, "allow_neg_eigval", "use_beta_sigmoid=True", allow_neg_eigval=True)
    half = make_inputs(op, SIZES, torch.bfloat16)
    wrong(op, change(half, beta=lambda x: x.half()), "dtype of beta")
    one_row = make_inputs(op, SIZES._replace(B=1))
    wrong(op, one_row, "last entry", cu_seqlens=SeqInfo.from_lengths([2, 3]))


@pytest.mark.parametrize("op", GATED)
def test_wrong_gates(op: str) -> None:
    good, raw = make_inputs(op, SIZES), make_inputs(op, SIZES, options=(("raw", True),))
    A_log, dt_bias = raw.kwargs["A_log"], raw.kwargs["dt_bias"]
    wrong(op, good, "A_log", "use_gate=True", A_log=A_log)
    wrong(op, good, "dt_bias", dt_bias=dt_bias)
    wrong(op, good, "lower_bound", lower_bound=-5.0)
    wrong(op, raw, "A_log", "lower_bound", A_log=None)
    wrong(op, raw, "shape of A_log", A_log=A_log[:1])
    wrong(op, raw, "shape of dt_bias", dt_bias=dt_bias[:1])
    for bound in (0.0, 1.0, -float("inf"), float("nan"), True, "x"):
        wrong(op, raw, "lower_bound", "below 0", lower_bound=bound)


def test_what_ops_are_asked_for_by_mistake() -> None:
    with pytest.raises(TypeError):
        registry.get_op("delta").contract(*make_inputs("delta", SIZES).args, use_gate=True)
    product = make_inputs("delta_product", SIZES)
    for n in (0, -1, True, 2.0):
        wrong("delta_product", product, "num_householder", num_householder=n)
    wrong("delta_product", product, "shape of k", num_householder=3)
    ungated = make_inputs("delta_product", SIZES, options=(("ungated", True),))
    wrong("delta_product", ungated, "use_gate", use_gate=True, lower_bound=-5.0)
    comba = make_inputs("comba", SIZES, torch.bfloat16)
    wrong("comba", change(comba, p=lambda x: x.float()), "dtype of p")


@each_op
def test_what_a_call_lowers_to(op: str) -> None:
    low = getattr(ops, op)(*(made := make_inputs(op, SIZES)).args, **made.kwargs)
    assert low.recurrence == "delta" and low.options.scale == 8**-0.5 and (low.prepare is None) == (op != "delta_product")
    decay = {"delta": "none", "kda": "channel"}.get(op, "token")
    assert (low.options.decay, low.options.early) == (decay, op == "comba")
    with torch.autocast("cpu", torch.bfloat16):
        low = getattr(ops, op)(*made.args, **made.kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    assert {x.dtype for x in (tensors.q, tensors.k, tensors.v, tensors.p) if x is not None} == {torch.bfloat16}
    assert {x.dtype for x in (tensors.g, tensors.beta) if x is not None} == {torch.float32}


# -- costs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("arch", ["sm90", "gfx942", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_costs_are_finite_and_grow_with_the_length(op: str, arch: str, packed: bool) -> None:
    found: dict[tuple[str, Any, bool], list[float]] = {}
    for T in (0, 1, 64, 4096, 1 << 20):
        key = key_of(op, {"T": T}, hypothetical(arch), packed=packed, grad=True)
        for variant in DELTA.recurrence.variants:
            for config in variant.configs(key):
                for direction in (FORWARD, BACKWARD):
                    found.setdefault((variant.name, config, direction.backward), []).append(variant.cost(key, config, direction))
    for what, costs in found.items():
        assert costs == sorted(costs) and all(type(c) is float and 0 < c < 1e6 for c in costs), (what, costs)
