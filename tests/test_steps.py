"""Steps on a CPU: the torch variants against float64, prefill and steps, contracts and their errors, handles and keys."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import matrix
import pytest
import steps
import torch
from drawn_steps import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import OP_NAMES, Case, Inputs, Sizes, StepRoom, make_inputs, recurrence_of

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.errors import CallError, RefusedError, UnknownNameError
from fla_dispatch.kernels.scalar_decay.recurrence import log_decay
from fla_dispatch.kernels.scalar_step.recurrence import head_decay
from fla_dispatch.tuning.keys import key_of, parse_key
from fla_dispatch.tuning.warmup import model_calls

CPU = torch.device("cpu")
SIZES = Sizes(4, 2, 4, 16, 24)


# -- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "case"), steps.pairs("small", ["step_torch", "reference"]))
def test_values(variant: str, case: Case) -> None:
    steps.check_values(variant, case, "cpu")


@pytest.mark.parametrize(("variant", "case"), steps.pairs("small", ["step_torch"], lambda c: c.pool == "padded" and "small" in c.tags))
def test_padding_is_not_read(variant: str, case: Case) -> None:
    steps.check_guarded(variant, case, "cpu")


@pytest.mark.parametrize("variant", ["step_torch", "reference"])
@pytest.mark.parametrize(("op", "options"), steps.WAYS, ids=str)
def test_prefill_and_steps_equal_one_call(variant: str, op: str, options: tuple[tuple[str, Any], ...]) -> None:
    steps.check_prefill_and_steps(variant, op, options, "cpu")


@pytest.mark.parametrize("room", steps.ROOMS, ids=lambda room: room.name)
@given(data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_steps(room: StepRoom, data: st.DataObject) -> None:
    steps.check_values("step_torch", data.draw(drawn(room)), "cpu")


@pytest.mark.parametrize("kind", steps.STRESS)
@pytest.mark.parametrize("op", steps.DELTA_STEP.cases.OP_NAMES)
def test_many_hard_tokens(op: str, kind: str) -> None:
    steps.check_stress("step_torch", op, kind, "cpu")


def test_constants_are_those_of_the_full_ops() -> None:
    """Rooms do not import each other, so the formulas stand twice."""
    for decay, rate in (("retention", 0.0), ("lightning", 0.75)):
        full = log_decay(decay, rate, 16, CPU, torch.float64).exp()
        assert matrix.distance(head_decay(decay, rate, 16, CPU, torch.float64), full) < 1e-14


# -- contracts ---------------------------------------------------------------------------------------------------------------


def make(op: str, **changes: Any) -> Inputs:
    return make_inputs(op, Sizes(*changes.pop("sizes", SIZES)), **changes)


def wrong(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], *parts: str) -> None:
    """The call raises, and its message names the op, what was expected, what came and what to do."""
    with pytest.raises(CallError) as caught, torch.no_grad():
        fd.op(op)(*args, **kwargs)
    text = str(caught.value)
    for part in ("expected ", "got ", "To fix: ", *parts):
        assert part in text, text


@pytest.mark.parametrize("op", OP_NAMES)
def test_wrong_tensors(op: str) -> None:
    args, kwargs = make(op)
    i, name = (3, "B") if op == "mamba2_step" else (1, "k")
    q, dims = ("C", "x") if op == "mamba2_step" else ("q", "v")

    def rest(n: int, x: Any) -> tuple[Any, ...]:
        return (*args[:n], x, *args[n + 1 :])

    wrong(op, rest(i, args[i][..., :-1]), kwargs, f"{op}: shape of {name}")
    wrong(op, rest(i, args[i].int()), kwargs, f"dtype of {q}" if i == 0 else "dtype")
    wrong(op, rest(i, None), kwargs, f"{op}: shape of {name}" if op == "delta_product_step" else f"{op}: {name}", "ensor")
    values = 0 if op == "mamba2_step" else 2
    if op == "delta_product_step":
        wrong(op, rest(values, args[values][:, 0]), kwargs, f"shape of {dims}", "[B, 2, HV, V]")
    else:
        wrong(op, rest(values, args[values][:, None]), kwargs, f"rank of {dims}", f"{dims}[:, 0]")
    wrong(op, rest(values, args[values][..., :3, :]), kwargs, "heads", "multiple")
    wrong(op, rest(values, args[values][:2]), kwargs, f"shape of {dims}")
    pool = args[-1]
    wrong(op, (*args[:-1], pool[:2]), kwargs, "rows of state", "slots")
    wrong(op, (*args[:-1], pool[:, :1]), kwargs, "shape of state", "[S, 4, 16, 24]")
    wrong(op, (*args[:-1], pool.double()), kwargs, "dtype of state", "float32 or torch.bfloat16")
    wrong(op, (*args[:-1], pool.half()), kwargs, "dtype of state")
    wrong(op, (*args[:-1], pool.transpose(2, 3).contiguous().transpose(2, 3)), kwargs, "layout of state", "strides")
    wrong(op, (*args[:-1], pool[:1].expand(4, -1, -1, -1)), kwargs, "layout of state", "overlap")


@pytest.mark.parametrize("op", OP_NAMES)
def test_wrong_slots(op: str) -> None:
    args, kwargs = make(op)
    for slots, text in (([0, 1, 2, 3], "slots"), (torch.arange(3), "shape of slots"), (torch.arange(4).float(), "dtype of slots")):
        wrong(op, args, {**kwargs, "slots": slots}, text)
    wrong(op, args, {**kwargs, "slots": torch.arange(4, device="meta")}, "device of slots")


def test_wrong_options() -> None:
    args, _ = make("linear_attn_step")
    wrong("linear_attn_step", args, {"normalize": True}, "LinearState")
    wrong("linear_attn_step", (*args[:-1], (args[-1], args[-1][..., 0])), {}, "state.S")
    z = torch.ones(4, 4, 16)
    wrong("linear_attn_step", (*args[:-1], (args[-1], z.bfloat16())), {"normalize": True}, "dtype of state.z", "float32")
    wrong("linear_attn_step", (*args[:-1], (args[-1], z[:, :2])), {"normalize": True}, "shape of state.z")
    wrong(
        "linear_attn_step", (*args[:-1], (args[-1], torch.ones(5, 4, 16))), {"normalize": True, "slots": torch.arange(4)}, "rows of state.z"
    )
    wrong("retention_step", make("retention_step").args, {"scale": torch.ones(())}, "scale")
    wrong("retention_step", make("retention_step").args, {"qk_l2norm": "no"}, "qk_l2norm", "True or False")
    wrong("linear_attn_step", args, {"normalize": 1}, "normalize", "True or False")
    wrong("mamba2_step", make("mamba2_step").args, {"dt_softplus": None}, "dt_softplus", "True or False")
    wrong("lightning_attn_step", make("lightning_attn_step").args, {"layer_idx": 3, "num_layers": 3}, "layer_idx")
    args, _ = make("simple_gla_step")
    wrong("simple_gla_step", (*args[:3], None, args[-1]), {}, "linear_attn_step")
    wrong("simple_gla_step", (*args[:3], args[3][:, :1], args[-1]), {}, "shape of g")
    args, kwargs = make("mamba2_step")
    wrong("mamba2_step", args, {**kwargs, "dt_limit": (1.0, 0.0)}, "dt_limit")
    wrong("mamba2_step", args, {**kwargs, "D": torch.ones(4, 3)}, "shape of D")
    wrong("mamba2_step", args, {**kwargs, "z": torch.ones(4, 4, 3)}, "shape of z")


def test_wrong_options_of_delta_rules() -> None:
    for op in steps.DELTA_STEP.cases.OP_NAMES:
        args, kwargs = make(op)
        beta, state = args[-2:]
        wrong(op, (*args[:-2], beta[..., :1], state), kwargs, "shape of beta")
        wrong(op, (*args[:-2], None, state), kwargs, "beta")
        wrong(op, args, {**kwargs, "use_qk_l2norm": 1}, "use_qk_l2norm", "True or False")
        wrong(op, args, {**kwargs, "allow_neg_eigval": True}, "use_beta_sigmoid=True")
        wrong(op, args, {**kwargs, "scale": "1"}, "scale")
    for op in steps.DELTA_STEP.cases.GATED:
        args, kwargs = make(op)
        i = 4 if op == "comba_step" else 3
        wrong(op, (*args[:i], args[i][:, :1], *args[i + 1 :]), kwargs, "shape of g")
        wrong(op, args, {**kwargs, "A_log": torch.ones(4)}, "A_log", "use_gate=True")
        wrong(op, args, {**kwargs, "use_gate": True}, "A_log", "lower_bound")
        wrong(op, args, {**kwargs, "use_gate": True, "lower_bound": 1.0}, "lower_bound", "below 0")
        if op != "delta_product_step":
            wrong(op, (*args[:i], None, *args[i + 1 :]), kwargs, "delta_step")
    args, kwargs = make("comba_step")
    wrong("comba_step", (*args[:3], args[3][:2], *args[4:]), kwargs, "shape of p")
    wrong("comba_step", (*args[:3], None, *args[4:]), kwargs, "gated_delta_step")
    args, _ = make("delta_product_step")
    for n in (0, True, 2.0):
        wrong("delta_product_step", args, {"num_householder": n}, "num_householder")
    wrong("delta_product_step", args, {"num_householder": 3}, "shape of k", "second dimension")
    args, kwargs = make("delta_product_step", options=(("ungated", True),))
    wrong("delta_product_step", args, {**kwargs, "use_gate": True, "lower_bound": -1.0}, "use_gate")


@pytest.mark.parametrize("op", OP_NAMES)
def test_gradients_are_refused(op: str) -> None:
    args, kwargs = make(op)
    for i in (i for i, x in enumerate(args) if x is not None):
        call = (*args[:i], args[i].clone().requires_grad_(), *args[i + 1 :])
        with pytest.raises(CallError, match=rf"(?s){op}: gradient of .*torch\.no_grad\(\), or {op.removesuffix('_step')}"):
            fd.op(op)(*call, **kwargs)
        with torch.no_grad():
            fd.op(op)(*call, **kwargs)
    with torch.inference_mode():
        fd.op(op)(*args, **kwargs)


def test_the_update_is_counted_as_one() -> None:
    """Autograd refuses a backward that would read a state after a step has overwritten it."""
    args, kwargs = make("retention_step")
    weight = torch.ones_like(args[-1]).requires_grad_()
    loss = (weight * args[-1]).sum()
    fd.op("retention_step")(*args, **kwargs)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_state_of_full_ops_is_taken_as_it_is() -> None:
    q, k, v = (torch.rand(2, 5, 2, 16) for _ in range(3))
    linear = fd.op("linear_attn")
    _, state = linear(q, k, v, normalize=True, output_final_state=True)
    o = fd.op("linear_attn_step")(q[:, 0], k[:, 0], v[:, 0], state, normalize=True)
    again = [torch.cat([x, x[:, :1]], 1) for x in (q, k, v)]
    want, final = linear(*again, normalize=True, output_final_state=True)
    torch.testing.assert_close(o, want[:, -1])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("op, cast", [("simple_gla_step", 3), ("comba_step", 4), ("delta_product_step", 3)])
def test_autocast(op: str, cast: int) -> None:
    inputs = make(op)
    by_hand = Inputs((*(x.bfloat16() for x in inputs.args[:cast]), *inputs.fresh().args[cast:]), inputs.kwargs)
    want = steps.run(op, "auto", by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        found = steps.run(op, "auto", inputs)
    assert found["o"].dtype == torch.bfloat16
    matrix.same(found, want, "a step under autocast")


# -- handles and keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OP_NAMES)
def test_handles(op: str) -> None:
    inputs = make(op, pool="padded")
    handle = copy.deepcopy(fd.op(op))
    why = handle.explain(*inputs.args, **inputs.kwargs)
    assert why.forward is not None and why.forward[0] == "step_torch" and why.backward is None
    before = inputs.fresh()
    bound = handle.bind(*inputs.args, **inputs.kwargs)
    matrix.same(dict(inputs.states()), dict(before.states()), "binding and explaining")
    one, two = inputs.fresh(), inputs.fresh()
    tensors = {name: x for name, x in inputs.kwargs.items() if isinstance(x, torch.Tensor)}
    torch.testing.assert_close(bound(*one.args, **tensors), handle(*two.args, **two.kwargs), rtol=0, atol=0)
    matrix.same(dict(one.states()), dict(two.states()), "a bound step")
    with pytest.raises(RefusedError, match="grad"):
        registry_grad(op)


def registry_grad(op: str) -> None:
    """A Key with gradients is refused by every variant."""
    from fla_dispatch.dispatch.plan import _plan

    args, kwargs = make(op)
    low = registry.get_op(op).contract(*args, **kwargs)
    _plan(recurrence_of(op), recurrence_of(op).problem(low.tensors, low.options, True), None)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize("op", OP_NAMES)
def test_explained_elsewhere(op: str, arch: str) -> None:
    for B in (1, 256):
        why = fd.explain(op, device=arch, B=B)
        assert why.forward is not None and why.forward[0] == "step_triton" and why.why_not("step_torch")
    with pytest.raises(CallError, match="one token"):
        fd.explain(op, device=arch, packed=True)


CHANGES: tuple[dict[str, Any], ...] = (
    {"sizes": (4, 2, 4, 16, 16)}, {"sizes": (4, 4, 4, 16, 24)}, {"sizes": (5, 2, 4, 16, 24)}, {"dtype": torch.bfloat16},
    {"state_dtype": torch.bfloat16}, {"pool": "slots"},
)  # fmt: skip
OWN: dict[str, tuple[dict[str, Any], ...]] = {
    "linear_attn_step": ({"options": (("normalize", True),)}, {"options": (("qk_l2norm", True),)}),
    "retention_step": ({"options": (("qk_l2norm", True),)},),
    "mamba2_step": (
        {"options": (("gated", True),)}, {"options": (("plain", True),)}, {"options": (("dt_limit", (0.1, 0.2)),)},
        {"options": (("dt_softplus", False),)}, {"options": (("dt_bias", None),)}, {"options": (("D", torch.ones(4, 24)),)},
    ),
}  # fmt: skip
_NORM, _LOGITS = ("use_qk_l2norm", True), ("use_beta_sigmoid", True)
OWN |= {
    op: ({"options": (_NORM,)}, {"options": (_LOGITS,)}, {"options": (_LOGITS, ("allow_neg_eigval", True))})
    for op in steps.DELTA_STEP.cases.OP_NAMES
}
RAW = steps.DELTA_STEP.cases.GATED
for op in RAW:
    for options in ((), (("dt_bias", None),), (("lower_bound", -5.0),), (("lower_bound", -5.0), ("A_log", None))):
        OWN[op] += ({"options": (("raw", True), *options)},)
OWN["delta_product_step"] += ({"options": (("num_householder", 3),)}, {"options": (("ungated", True),)})


@pytest.mark.parametrize("op", OP_NAMES)
def test_what_matters_changes_key_and_facts(op: str) -> None:
    def known(**changes: Any) -> tuple[Any, Any]:
        args, kwargs = make(op, **changes)
        low = registry.get_op(op).contract(*args, **kwargs)
        recurrence = recurrence_of(op)
        return recurrence.problem(low.tensors, low.options, False).key(), recurrence.facts(low.tensors, low.options)

    seen = [known()]
    for changes in CHANGES + OWN.get(op, ()):
        seen.append(known(**changes))
    assert len({key for key, _ in seen}) == len({facts for _, facts in seen}) == len(seen)
    assert known(options=(("scale", 0.25),)) == seen[0] if op != "mamba2_step" else True
    if op in RAW:
        assert known(options=(("raw", True), ("lower_bound", -5.0))) == known(options=(("raw", True), ("lower_bound", -2.0)))
    for key, _ in seen:
        assert parse_key(key.text(), key.device) == key


@pytest.mark.parametrize("arch", ["sm90", "cpu"])
@pytest.mark.parametrize("op", OP_NAMES)
def test_the_tuner_makes_calls_with_their_key(op: str, arch: str) -> None:
    recurrence, device = recurrence_of(op), hypothetical(arch)
    workload = recurrence.workload
    assert workload is not None
    for B, state, pool in ((1, "float32", "none"), (3, "bfloat16", "slots"), (256, "float32", "slots"), (700, "float32", "none")):
        for group in (1, 4):
            sizes = {"B": B, "D": 32} | ({"H": 8, "G": 8 // group} if op == "mamba2_step" else {"H": 8 // group, "HV": 8})
            key = key_of(op, sizes, device, options={"state_dtype": state, "pool": pool})
            tensors, options = workload.make(key, torch.device("meta"), 0)
            made = dataclasses.replace(recurrence.problem(tensors, options, False), device=device, interpret=False)
            assert made.key() == key
            assert workload.layout(key)[1:] == (tensors.q.shape[1], tensors.v.shape[-2])
            proof = workload.proof_key(key)
            assert proof == workload.proof_key(key_of(op, {**sizes, "B": 9}, device, options={"state_dtype": state, "pool": pool}))


@pytest.mark.parametrize("op", OP_NAMES)
def test_serving_any_op_prepares_its_step(op: str) -> None:
    calls = model_calls(op.removesuffix("_step"), "serve", heads=4, head_dim=32, batch=(1, 3), lengths=(64,))
    assert [(c.size("B"), dict(c.options)["pool"]) for c in calls if c.op == op] == [(1, "none"), (1, "slots"), (3, "none"), (3, "slots")]
    assert {c.op for c in calls} == {op, op.removesuffix("_step")}


def test_serving_calls_have_steps() -> None:
    calls = model_calls("mamba2", "serve", heads=4, head_dim=32, state_dim=64, batch=(1, 3), lengths=(64,), state_dtype="bfloat16")
    found = [c for c in calls if c.op == "mamba2_step"]
    assert [(c.size("B"), dict(c.options)["pool"]) for c in found] == [(1, "none"), (1, "slots"), (3, "none"), (3, "slots")]
    assert all(c.key(profile(CPU)).dtype("state") == "bfloat16" and c.shorter() is None for c in found)
    assert model_calls("mamba2_step", "serve", heads=4, head_dim=32, state_dim=64, batch=(1, 3), state_dtype="bfloat16") == found
    with pytest.raises(UnknownNameError, match="no gradients"):
        model_calls("retention_step", "train")
