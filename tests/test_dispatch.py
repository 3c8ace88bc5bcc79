"""The dispatcher: which variant a call gets and why, refusals, scopes, names and registration."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

import pytest
import torch
from planting import PLANTED, cheap, planted, planted_module, qkv

import fla_dispatch as fd
from fla_dispatch import device, errors, registry, settings
from fla_dispatch.dispatch import plan as plans
from fla_dispatch.kernels.scalar_decay import reference
from fla_dispatch.registry import Variant
from fla_dispatch.requirements import Dim, DTypes, Gpu, Lacks, RefusalCode

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
    full = ["linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2"]
    deltas = ["delta", "gated_delta", "kda", "comba", "delta_product"]
    assert fd.ops() == [*full, *(f"{name}_step" for name in full), *deltas, *(f"{name}_step" for name in deltas)]
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
