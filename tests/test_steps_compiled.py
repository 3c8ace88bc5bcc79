"""Steps where something else runs them: torch.compile, the library op, other modes; and the prover, against planted faults."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import matrix
import pytest
import steps
import torch
from steps import OP_NAMES, Inputs, Sizes, make_inputs, recurrence_of
from torch._dynamo.testing import CompileCounterWithBackend

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.dispatch.bridge import get_bridge
from fla_dispatch.errors import RegistrationError
from fla_dispatch.kernels.delta_step import step_torch as delta_torch
from fla_dispatch.kernels.scalar_step import step_torch as scalar_torch
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import Prover, prove

CPU = torch.device("cpu")
SIZES = Sizes(4, 2, 4, 16, 24)


def make(op: str, **changes: Any) -> Inputs:
    return make_inputs(op, Sizes(*changes.pop("sizes", SIZES)), **changes)


# -- compilers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OP_NAMES)
def test_compiled(op: str, backend: str) -> None:
    """One graph for all batches of a kind, and the state that was passed is updated."""
    if backend == "inductor" and op not in ("retention_step", "mamba2_step", "kda_step"):
        pytest.skip("the same library op")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def layer(*args: Any, **kwargs: Any) -> torch.Tensor:
        return fd.op(op)(*args, **kwargs).tanh()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for B in (5, 7, 9):  # no other size among them, which Dynamo would take for the same
        inputs = make(op, sizes=(B, *SIZES[1:]), pool="padded")
        one, two = inputs.fresh(), inputs.fresh()
        with torch.no_grad():
            torch.testing.assert_close(compiled(*one.args, **one.kwargs), layer(*two.args, **two.kwargs))
        matrix.same(dict(one.states()), dict(two.states()), "a compiled step")
        assert not torch.equal(one.states()["state"], inputs.states()["state"])
    # Dynamo also hands over an empty graph where it starts a frame again
    assert sum(recurrence_of(op).name in graph.print_readable(print_output=False) for graph in counter.graphs) == 1


def test_compiled_pair_of_pools_and_a_pool_made_in_the_graph() -> None:
    torch._dynamo.reset()
    (q, k, v, pools), kwargs = make("linear_attn_step", options=(("normalize", True),))

    def two_steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, S: torch.Tensor, z: torch.Tensor) -> Any:
        pools = S * 2, z + 1
        step = fd.op("linear_attn_step")
        return step(q, k, v, pools, **kwargs), step(k, q, v, pools, **kwargs), *pools

    with torch.no_grad():
        found = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(q, k, v, *pools)
        torch.testing.assert_close(found, two_steps(q, k, v, *pools))


def test_library_op() -> None:
    for name, z in (("scalar_step", True), ("delta_step", False)):
        bridge = get_bridge(name)
        schema = str(bridge.forward_op._schema)
        assert "Tensor(a!) state" in schema and ("Tensor(b!)? z" in schema) == z and bridge.backward_op is None
    raw: tuple[tuple[str, Any], ...] = (("raw", True),)
    ways = (("retention_step", ()), ("linear_attn_step", (("normalize", True),)), ("comba_step", ()))
    for op, options in (*ways, ("kda_step", raw), ("delta_product_step", raw)):
        bridge = get_bridge(recurrence_of(op).name)
        low = registry.get_op(op).contract(*(made := make(op, pool="padded", options=options)).args, **made.kwargs)
        torch.library.opcheck(bridge.forward_op, (*low.tensors, *low.options, False, None))


@pytest.mark.parametrize("op", ["retention_step", "gated_delta_step", "delta_product_step"])
def test_meta_and_flops(op: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make(op, device="meta")
    assert fd.op(op)(*inputs.args, **inputs.kwargs).shape == (4, 4, 24)
    inputs = make(op)
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    with FlopCounterMode(display=False) as counter:
        fd.op(op)(*inputs.args, **inputs.kwargs)
    assert counter.get_total_flops() == recurrence_of(op).flops(low.tensors, low.options)


# -- proofs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_candidates_pass(op: str, dtype: str) -> None:
    variant = recurrence_of(op).variant("step_torch")
    prover = Prover(recurrence_of(op), CPU)
    for state, pool in (("float32", "none"), ("bfloat16", "slots")):
        sizes = {"B": 4, "D": 24} | ({"H": 4} if op == "mamba2_step" else {"H": 2, "HV": 4})
        key = key_of(op, sizes, profile(CPU), dtype=dtype, options={"state_dtype": state, "pool": pool})
        found = prover.prove(variant, None, prover.workload.proof_key(key), backward=False)
        assert found.status == "ok", found.detail
        assert found.certificate is not None and found.certificate.repeats >= 3 and {"o", "state"} <= set(found.certificate.errors)
        assert found.certificate.tolerances["state"] == steps.tolerance(getattr(torch, state))


@pytest.mark.parametrize("op", steps.DELTA_STEP.cases.OP_NAMES)
@pytest.mark.parametrize("options", [{"raw": True}, {"raw": True, "lower_bound": -5.0, "allow_neg_eigval": True}], ids=["raw", "bounded"])
def test_right_candidates_pass_with_every_transform_inside(op: str, options: dict[str, Any]) -> None:
    if op == "delta_step":
        options = {name: x for name, x in options.items() if name != "lower_bound"}
    recurrence = recurrence_of(op)
    key = key_of(op, {"B": 4, "D": 24, "H": 2, "HV": 4}, profile(CPU), dtype="float32", options={"pool": "slots", **options})
    assert key.flag("l2norm") == "true" and (op == "delta_step" or key.flag("gate") != "given") and key.flag("weight") != "given"
    found = prove(recurrence, recurrence.variant("step_torch"), None, key, CPU)
    assert found.status == "ok", found.detail


def faulty(kind: str, step_torch: Any) -> Any:
    """A step_torch with one fault."""
    runs = []

    def forward(config: None, t: Any, o: Any) -> Any:
        runs.append(None)
        before = t.state.clone()
        out = step_torch.forward(config, t, o)
        if kind == "stale":  # the update goes into a copy
            t.state.copy_(before)
        elif kind == "wrong":
            t.state.mul_(1.01)
        elif kind == "stray":  # one bit of a slot that no row has
            free = next(s for s in range(t.state.shape[0]) if s not in t.slots.tolist())
            t.state[free, 0, 0, 0] += 1e-6
        elif kind == "padding":
            out.o[t.slots < 0] = 1.0
        elif kind == "racy":
            t.state[t.slots[0]] += 1e-7 * len(runs)
        elif kind == "input":
            t.q.add_(1)
        return out

    return types.SimpleNamespace(forward=forward)


@pytest.mark.parametrize(
    "kind, status, words",
    [
        ("good", "ok", ""), ("stale", "wrong", "state "), ("wrong", "wrong", "state"), ("stray", "wrong", "state where it stays were"),
        ("padding", "wrong", "o "), ("racy", "racy", "other bits of state"), ("input", "wrong", "inputs q were changed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op, step_torch", [("simple_gla_step", scalar_torch), ("gated_delta_step", delta_torch)], ids=["scalar", "delta"])
def test_faults_of_a_step_are_named(op: str, step_torch: Any, kind: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = recurrence_of(op)
    variant = dataclasses.replace(recurrence.variant("step_torch"), module=f"planted_{kind}")
    monkeypatch.setitem(registry._loaded, variant.module, faulty(kind, step_torch))
    key = key_of(op, {"B": 4, "D": 16, "H": 2}, profile(CPU), dtype="float32", options={"pool": "slots"})
    found = prove(recurrence, variant, None, key, CPU)
    assert (found.status, words in found.detail) == (status, True), found


def test_a_recurrence_that_updates_in_place_has_no_gradients() -> None:
    for changes in ({"mutates": ("nothing",)}, {"mutates": ("state",), "differentiable": ("q",)}):
        with pytest.raises(RegistrationError, match="wrong_step"):
            registry.register_recurrence(dataclasses.replace(steps.SCALAR_STEP.recurrence, name="wrong_step", **changes))


def test_softplus_series() -> None:
    """The kernel's series for log1p, in float32, where log(1 + e) loses digits."""
    x = torch.linspace(-60, 60, 4001, dtype=torch.float32)
    e = (-x.abs()).exp()
    s = e / (2 + e)
    u, series = s * s, torch.zeros_like(s)
    for n in (15, 13, 11, 9, 7, 5, 3, 1):
        series = 1 / n + u * series
    found = x.clamp(min=0) + 2 * s * series
    want = torch.log1p((-x.double().abs()).exp()) + x.double().clamp(min=0)
    assert ((found.double() - want) / want).abs().max() < 1e-6
