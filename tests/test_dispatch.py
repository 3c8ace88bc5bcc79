"""The dispatcher: which variant a call gets and why, refusals, scopes, handles as values, binding and explanations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fla_dispatch as fd
from fla_dispatch import device, errors, registry, settings
from fla_dispatch.dispatch import plan as plans
from fla_dispatch.dispatch.bridge import get_bridge
from fla_dispatch.kernels.scalar_decay import chunk_torch, reference
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.registry import Variant
from fla_dispatch.requirements import Dim, DTypes, Gpu, Lacks, RefusalCode

PLANTED = "fla_dispatch_planted_variant"


def qkv(T: int = 20, *, grad: bool = False, dtype: torch.dtype = torch.float32, K: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, T, 2, K, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def planted_module(calls: list[str]) -> types.ModuleType:
    """A variant that computes as chunk_torch does and keeps a record of its calls."""
    module = types.ModuleType(PLANTED)

    def forward(config: Any, tensors: Any, options: Any) -> Any:
        calls.append("forward")
        return chunk_torch.forward(TorchConfig(16), tensors, options)

    def backward(config: Any, residuals: Any, grads: Any, options: Any, wanted: Any) -> Any:
        calls.append("backward")
        return chunk_torch.backward(TorchConfig(16), residuals, grads, options, wanted)

    module.forward, module.backward = forward, backward
    return module


@contextlib.contextmanager
def planted(variant: Variant, module: types.ModuleType | None = None) -> Iterator[None]:
    """A variant of scalar_decay for the length of a block; without a module its import fails."""
    registry._loaded.pop(variant.module, None)
    if module is not None:
        sys.modules[variant.module] = module
    registry.register_variant("scalar_decay", variant)
    try:
        yield
    finally:
        registry.unregister_variant("scalar_decay", variant.name)
        registry._loaded.pop(variant.module, None)
        sys.modules.pop(variant.module, None)


def cheap(name: str = "planted_torch", *requirements: Any, seconds: float = 1e-9, module: str = PLANTED) -> Variant:
    return Variant(name, module, requirements, lambda problem, config, direction: seconds)


# -- tiers -------------------------------------------------------------------------------------------------------------------


def test_estimate_takes_the_cheapest_and_says_why() -> None:
    handle, args = fd.op("retention"), qkv()
    before = handle.explain(*args)
    assert before.forward[0] == "chunk_torch"
    assert before.tier == "estimate"
    calls: list[str] = []
    with planted(cheap(), planted_module(calls)):
        why = handle.explain(*args)
        assert why.forward == ("planted_torch", {})
        assert "chunk_torch" in why.reason
        handle(*args)
        assert calls == ["forward"]
    handle(*args)
    assert calls == ["forward"], "taking a variant out makes plans stale"


def test_forward_and_backward_are_chosen_each_for_itself() -> None:
    def cost(problem: Any, config: Any, direction: Any) -> float:
        return 1e3 if direction.backward else 1e-9

    calls: list[str] = []
    handle, args = fd.op("retention"), qkv(grad=True)
    with planted(Variant("planted_torch", PLANTED, (), cost), planted_module(calls)):
        why = handle.explain(*args)
        assert why.forward[0] == "planted_torch"
        assert why.backward[0] == "chunk_torch"
        handle(*args)[0].sum().backward()
    assert calls == ["forward"]
    expected = torch.autograd.grad(fd.op("retention", mode="reference")(*args)[0].sum(), args)
    for x, dx in zip(args, expected, strict=True):
        torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-4)


def test_reference_is_the_last_resort() -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    args = qkv()
    problem = recurrence.problem(*fd.op("retention").contract(*args)[1:3], False)
    narrow = (Dim("K", minimum=512),)
    refused = tuple(v if v.name == "reference" else dataclasses.replace(v, requirements=narrow) for v in recurrence.variants)
    decision = plans.decide(dataclasses.replace(recurrence, variants=refused), problem, None)
    assert decision.tier == "reference"
    assert decision.forward.variant.name == "reference"
    all_refused = tuple(dataclasses.replace(v, requirements=narrow) for v in recurrence.variants)
    decision = plans.decide(dataclasses.replace(recurrence, variants=all_refused), problem, None)
    assert decision.forward is None
    assert "dim.too_small" in plans.refused_text(decision, None)


def test_modes_name_a_variant_a_family_or_the_reference() -> None:
    args = qkv()
    for mode, expected in (("reference", "reference"), ("chunk", "chunk_torch"), ("chunk_torch", "chunk_torch")):
        why = fd.op("simple_gla", mode=mode).explain(*args, torch.zeros(2, 20, 2))
        assert (why.tier, why.forward[0]) == ("forced", expected)
        assert "mode" in why.reason


def test_a_forced_variant_that_must_refuse_raises_with_every_reason() -> None:
    args = qkv()
    variant = cheap("planted_torch", Dim("K", minimum=32), DTypes("qkv", ("bfloat16",)))
    with planted(variant, planted_module([])):
        handle = fd.op("retention", mode="planted_torch")
        with pytest.raises(errors.RefusedError, match=r"(?s)dim\.too_small.*dtype\.unsupported") as raised:
            handle(*args)
        assert isinstance(raised.value, ValueError)
        why = handle.explain(*args)
        assert (why.tier, why.forward) == ("refused", None)
        assert fd.op("retention").explain(*args).forward[0] == "chunk_torch"


def test_triton_variants_are_refused_on_a_cpu_unless_forced_and_interpreted() -> None:
    if torch.cuda.is_available() or settings.current.interpret:
        pytest.skip("about a process on a CPU that does not interpret")
    args = qkv()
    with pytest.raises(errors.RefusedError, match=r"device\.kind"):
        fd.op("retention", mode="sweep_triton")(*args)
    with settings.override(interpret=True):
        assert fd.op("retention").explain(*args).forward[0] == "chunk_torch"
        assert fd.op("retention", mode="chunk").explain(*args).forward[0] == "chunk_torch"
        assert fd.op("retention", mode="sweep").explain(*args).forward[0] == "sweep_triton"
        assert fd.op("retention", mode="sweep_triton").explain(*args).forward[0] == "sweep_triton"


# -- scopes ------------------------------------------------------------------------------------------------------------------


def test_mode_wins_over_use_which_wins_over_the_setting() -> None:
    args, handle = qkv(), fd.op("retention")
    with settings.override(use=(("retention", "reference"),)):
        why = handle.explain(*args)
        assert (why.forward[0], why.tier) == ("reference", "forced")
        assert "FLA_DISPATCH_USE" in why.reason
        with fd.use(retention="chunk_torch"):
            assert handle.explain(*args).forward[0] == "chunk_torch"
            assert fd.op("retention", mode="reference").explain(*args).forward[0] == "reference"
            with fd.use(retention="auto", mamba2="reference"):
                assert handle.explain(*args).tier == "estimate"
            assert "use(...)" in handle.explain(*args).reason
    assert handle.explain(*args).tier == "estimate"


def test_use_reaches_calls_and_belongs_to_its_thread() -> None:
    calls: list[str] = []
    args, handle, seen = qkv(), fd.op("retention"), []
    with planted(cheap(seconds=1e6), planted_module(calls)), fd.use(retention="planted_torch"):
        handle(*args)
        thread = threading.Thread(target=lambda: seen.append(handle.choice()))
        thread.start()
        thread.join()
        assert calls == ["forward"]
    assert seen == [None]
    assert handle.choice() is None


def test_backward_runs_the_variant_of_its_forward_after_the_scope() -> None:
    calls: list[str] = []
    args = qkv(grad=True)
    with planted(cheap(seconds=1e6), planted_module(calls)):
        with fd.use(retention="planted_torch"):
            o, _ = fd.op("retention")(*args)
        o.sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("choices", [{"retentoin": "reference"}, {"retention": "chunck"}])
def test_use_knows_its_names(choices: dict[str, str]) -> None:
    with pytest.raises(errors.UnknownNameError, match="did you mean"), fd.use(**choices):
        pass


# -- names and registration --------------------------------------------------------------------------------------------------


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'retention'"):
        fd.op("retentoin")
    with pytest.raises(ValueError, match="did you mean 'chunk"):
        fd.op("retention", mode="chunk_torhc")
    with pytest.raises(ValueError, match="did you mean"):
        fd.explain("retention", dtype="bfloat61")
    with pytest.raises(ValueError, match=r"known: .*B, H"):
        fd.explain("retention", device="sm90", TT=3)
    with pytest.raises(ValueError, match="unknown architecture"):
        fd.explain("retention", device="sm9")
    with pytest.raises(ValueError, match="integer"):
        fd.explain("retention", device="sm90", T=-1)
    with pytest.raises(ValueError, match="did you mean 'chunk_torch'"):
        fd.op("retention").explain(*qkv()).why_not("chunk_trch")


def test_ops_lists_what_op_finds() -> None:
    assert fd.ops() == ["linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2"]
    assert all(fd.op(name).name == name for name in fd.ops())


def test_duplicates_and_reserved_names_are_refused() -> None:
    with pytest.raises(errors.RegistrationError, match="two variants are named"):
        registry.register_variant("scalar_decay", cheap("chunk_torch"))
    with pytest.raises(errors.RegistrationError, match="reserved"):
        registry.register_variant("scalar_decay", cheap("auto"))
    with pytest.raises(errors.RegistrationError, match="registered already"):
        registry.register_op(registry.get_op("retention"))
    with pytest.raises(errors.RegistrationError, match="registered already"):
        registry.register_recurrence(registry.get_recurrence("scalar_decay"))


@pytest.mark.parametrize(
    "changes",
    [
        {"differentiable": ("q", "k")},
        {"outputs": registry.Lowering},
        {"saved": registry.Lowering},
        {"options": registry.Lowering},
    ],
)
def test_a_recurrence_whose_types_disagree_is_refused(changes: dict[str, Any]) -> None:
    wrong = dataclasses.replace(registry.get_recurrence("scalar_decay"), name="wrong_decay", **changes)
    with pytest.raises(errors.RegistrationError, match="wrong_decay"):
        registry.register_recurrence(wrong)


def test_a_variant_that_fails_to_import_is_a_refusal_with_the_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_planted.py").write_text("raise OSError('libmissing.so: no such file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    args = qkv()
    with planted(cheap(module="broken_planted")):
        fd.op("retention")(*args)
        why = fd.op("retention").explain(*args)
        row = next(r for r in why.rows if r.name == "planted_torch")
        assert row.status == "refused"
        assert row.refusals[0].code is RefusalCode.IMPORT_ERROR
        assert "libmissing.so" in why.why_not("planted_torch")
        with pytest.raises(errors.RefusedError, match=r"libmissing\.so"):
            fd.op("retention", mode="planted_torch")(*args)


def test_a_module_without_backward_is_a_registration_error() -> None:
    module = planted_module([])
    del module.backward
    with planted(cheap(), module), pytest.raises(errors.RegistrationError, match="backward"):
        fd.op("retention")(*qkv())
    with planted(cheap("planted_torch", Lacks(("grad",))), module):
        assert fd.op("retention").explain(*qkv()).forward[0] == "planted_torch"
        assert fd.op("retention").explain(*qkv(grad=True)).forward[0] == "chunk_torch"


# -- handles -----------------------------------------------------------------------------------------------------------------


def test_handles_are_values() -> None:
    handle = fd.op("mamba2", mode="chunk")
    for twin in (pickle.loads(pickle.dumps(handle)), copy.deepcopy(handle), copy.copy(handle), fd.op("mamba2", mode="chunk")):
        assert twin == handle
        assert hash(twin) == hash(handle)
        assert (twin.name, twin.mode) == ("mamba2", "chunk")
    assert handle != fd.op("mamba2")
    assert handle != fd.op("retention", mode="chunk")
    assert repr(handle) == "fla_dispatch.op('mamba2', mode='chunk')"
    assert list(inspect.signature(fd.op("retention")).parameters)[:4] == ["q", "k", "v", "scale"]
    assert [v.name for v in handle.variants()] == [v.name for v in registry.get_recurrence("scalar_decay").variants]


def test_plans_are_found_again_and_forgotten_when_settings_change() -> None:
    handle, args, cache = fd.op("retention"), qkv(), get_bridge("scalar_decay").plans
    handle(*args)
    _, tensors, options, _, _ = handle.contract(*args)
    first = cache.lookup(tensors, options, False, None)
    assert cache.lookup(tensors, options, False, None) is first
    with settings.override(use=()):
        assert cache.lookup(tensors, options, False, None) is not first


def test_plan_cache_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_PLANS", 4)
    cache = plans.Plans("scalar_decay")
    contract = fd.op("retention").contract
    for K in range(16, 26):
        _, tensors, options, _, _ = contract(*qkv(K=K))
        cache.lookup(tensors, options, False, None)
        assert len(cache._by_facts) <= 4


def test_threads_agree_on_one_plan() -> None:
    cache = plans.Plans("scalar_decay")
    _, tensors, options, _, _ = fd.op("retention").contract(*qkv())
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(cache.lookup(tensors, options, False, None))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(p) for p in found}) == 1


def test_only_wanted_gradients_are_computed() -> None:
    wants: list[tuple[bool, ...]] = []
    module = planted_module([])
    plain = module.backward
    module.backward = lambda *args: wants.append(args[-1]) or plain(*args)
    q, k, v = qkv()
    with planted(cheap(), module):
        fd.op("retention")(q, k, v.requires_grad_())[0].sum().backward()
    assert wants == [(False, False, True, False, False, False, False)]
    assert q.grad is None
    assert v.grad is not None


def test_gradient_through_the_state_alone_and_the_output_alone() -> None:
    for use_output, use_state in ((True, False), (False, True), (True, True)):
        found = []
        for mode in ("auto", "reference"):
            args = qkv(grad=True)
            h0 = torch.full((2, 2, 16, 16), 0.1, requires_grad=True)
            o, state = fd.op("retention", mode=mode)(*args, initial_state=h0, output_final_state=True)
            sum(x.sin().sum() for x, used in ((o, use_output), (state, use_state)) if used).backward()
            found.append([x.grad for x in (*args, h0)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_second_derivative_is_a_typed_error() -> None:
    args = qkv(grad=True)
    o, _ = fd.op("retention")(*args)
    with pytest.raises(errors.DoubleBackwardError, match="create_graph"):
        torch.autograd.grad(o.sum(), args, create_graph=True)


# -- bound handles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bound_handle_is_the_handle(name: str, grad: bool, packed: bool) -> None:
    op, handle = registry.get_op(name), fd.op(name)
    sizes = {**op.sizes, "B": 2, "T": 20} | {s: 16 for s in ("K", "V", "N", "P") if s in op.sizes} | {"H": 2}
    lengths = [12, 0, 8] if packed else None
    make = [op.example(sizes, torch.float32, "cpu", seed=s, lengths=lengths, output_final_state=True, requires_grad=grad) for s in (0, 1)]
    bound = handle.bind(*make[0][0], **make[0][1])
    args, kwargs = make[1]
    o, state = bound(*args, **{n: x for n, x in kwargs.items() if n in bound._names})
    expected, expected_state = handle(*args, **kwargs)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, expected_state)
    if grad:
        found, wanted = (torch.autograd.grad(x.sum(), args) for x in (o, expected))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_bound_handle_refuses_other_tensors() -> None:
    handle, (q, k, v) = fd.op("retention"), qkv()
    bound = handle.bind(q, k, v)
    for wrong in ((*(x[:, :10] for x in (q, k, v)),), (q.double(), k.double(), v.double()), (q, k), (q, k, v.transpose(1, 1)[:, ::2])):
        with pytest.raises(errors.CallError, match="bound call"):
            bound(*wrong)
    with pytest.raises(errors.CallError, match="gradient"):
        bound(q, k, v.clone().requires_grad_())
    with pytest.raises(errors.CallError, match="options are bound"):
        bound(q, k, v, scale=2.0)
    with torch.no_grad():
        bound(q, k, v.clone().requires_grad_())
    trained = handle.bind(*qkv(grad=True))
    torch.testing.assert_close(trained(q, k, v)[0], handle(q, k, v)[0])
    assert "retention" in repr(bound)


def test_bound_handle_with_a_state_and_with_unpacked_arguments() -> None:
    handle, args = fd.op("linear_attn"), [x.abs() for x in qkv()]
    S, z = torch.ones(2, 2, 16, 16), torch.ones(2, 2, 16)
    bound = handle.bind(*args, initial_state=(S, z), normalize=True, output_final_state=True)
    o, (S1, z1) = bound(*args, initial_state=(2 * S, 2 * z))
    expected, (S2, z2) = handle(*args, initial_state=(2 * S, 2 * z), normalize=True, output_final_state=True)
    for a, b in ((o, expected), (S1, S2), (z1, z2)):
        torch.testing.assert_close(a, b)
    with pytest.raises(errors.CallError, match="initial_state by name"):
        bound(*args)


# -- explain -----------------------------------------------------------------------------------------------------------------


def test_explain_lists_every_variant_and_computes_nothing() -> None:
    class NoComputing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert all(issubclass(t, FakeTensor) for t in types), f"explain ran {func}"
            return func(*args, **(kwargs or {}))

    op = registry.get_op("mamba2")
    args, kwargs = op.example({**op.sizes, "B": 1, "T": 20, "H": 2}, torch.bfloat16, "cpu", requires_grad=True)
    with NoComputing():
        why = fd.op("mamba2").explain(*args, **kwargs)
    assert [r.name for r in why.rows] == [v.name for v in fd.op("mamba2").variants()]
    assert why.backward is not None
    assert json.loads(json.dumps(why.to_dict()))["forward"]["variant"] == "chunk_torch"
    for row in why.rows:
        assert row.status in ("chosen", "eligible", "refused")
        assert bool(row.refusals) == (row.status == "refused")
        assert row.name in why.to_text()
        assert why.why_not(row.name)
    assert "is chosen" in why.why_not("chunk_torch")
    assert "everything else is refused" in why.why_not("reference")
    assert str(why) == why.to_text()


def test_explain_says_what_the_call_does() -> None:
    calls: list[str] = []
    for grad in (False, True):
        args = qkv(grad=grad)
        with planted(cheap(), planted_module(calls)):
            assert fd.op("retention").explain(*args).forward[0] == "planted_torch"
            assert (fd.op("retention").explain(*args).backward is not None) == grad
            with torch.no_grad():
                assert fd.op("retention").explain(*args).backward is None
    assert calls == []


def test_explain_raises_what_the_call_raises() -> None:
    q, k, v = qkv()
    with pytest.raises(errors.CallError):
        fd.op("retention").explain(q, k[:, :3], v)


def test_explain_takes_meta_and_fake_tensors() -> None:
    expected = fd.op("retention").explain(*qkv()).key
    with FakeTensorMode():
        assert fd.op("retention").explain(*qkv_like("cpu")).key == expected
    assert fd.op("retention").explain(*qkv_like("meta")).forward is not None


def qkv_like(where: str) -> list[torch.Tensor]:
    return [torch.empty(2, 20, 2, 16, device=where) for _ in range(3)]


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120", "gfx942", "gfx950", "xe", "cpu", None])
@pytest.mark.parametrize("packed", [False, True])
def test_explain_for_devices_that_are_not_here(arch: str | None, packed: bool) -> None:
    for name in fd.ops():
        why = fd.explain(name, device=arch, packed=packed, grad=True, initial_state=True, output_final_state=True, T=512)
        assert why.tier in ("estimate", "reference")
        if arch not in (None, "cpu") and arch != "xe":
            assert why.forward[0].endswith("_triton")
            assert "not here" in why.device
        assert packed == ("&packed" in why.key)


def test_explain_of_a_forced_variant_reports_the_others_too() -> None:
    why = fd.explain("retention", device="sm90", mode="recurrent_triton")
    assert (why.forward[0], why.tier) == ("recurrent_triton", "forced")
    assert {r.status for r in why.rows} == {"chosen", "eligible"}
    assert "was named" in why.why_not("sweep_triton")
    old = fd.explain("retention", device="sm90", dtype="float64", mode="sweep_triton")
    assert old.forward is None
    assert "dtype" in old.why_not("sweep_triton")


# -- warnings and routes -----------------------------------------------------------------------------------------------------


def test_a_torch_variant_on_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_warned", set())
    recurrence = registry.get_recurrence("scalar_decay")
    args = qkv(dtype=torch.float64)
    problem = recurrence.problem(*fd.op("retention").contract(*args)[1:3], False)
    problem = dataclasses.replace(problem, device=device.hypothetical("sm90"))
    with pytest.warns(UserWarning, match=r"(?s)torch variant.*H200.*dtype"):
        plans._plan(recurrence, problem, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans._plan(recurrence, dataclasses.replace(problem, T=4096), None)
        plans._plan(recurrence, dataclasses.replace(problem, K=64), "reference")


def test_capability_requirements_reach_the_dispatcher() -> None:
    with planted(cheap("planted_torch", Lacks(("deterministic",)), Gpu()), planted_module([])):
        row = next(r for r in fd.op("retention").explain(*qkv()).rows if r.name == "planted_torch")
        assert [r.code for r in row.refusals] == [RefusalCode.DEVICE_KIND]
    calls: list[str] = []
    handle, args = fd.op("retention"), qkv()
    with planted(cheap("planted_torch", Lacks(("deterministic",))), planted_module(calls)):
        handle(*args)
        torch.use_deterministic_algorithms(True)
        try:
            handle(*args)
            assert handle.explain(*args).forward[0] == "chunk_torch"
        finally:
            torch.use_deterministic_algorithms(False)
        handle(*args)
    assert calls == ["forward", "forward"]


def test_results_are_not_the_inputs() -> None:
    q, k, v = (x[:, :0] for x in qkv())
    h0 = torch.ones(2, 2, 16, 16)
    for mode in ("chunk_torch", "reference"):
        _, state = fd.op("retention", mode=mode)(q, k, v, initial_state=h0, output_final_state=True)
        assert state is not h0
        torch.testing.assert_close(state, h0)


def test_reference_module_is_the_oracle() -> None:
    args = qkv(dtype=torch.float64)
    low = fd.op("retention").contract(*args)
    direct = reference.forward(None, low.tensors, low.options)
    torch.testing.assert_close(fd.op("retention", mode="reference")(*args)[0], direct.o)
