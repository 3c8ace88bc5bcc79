"""explain: every variant with its reasons, for calls and for devices that are not here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from planting import cheap, planted, planted_module, qkv
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fla_dispatch as fd
from fla_dispatch import errors, registry

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
    for name in (name for name in fd.ops() if "T" in registry.get_op(name).sizes):
        why = fd.explain(name, device=arch, packed=packed, grad=True, initial_state=True, output_final_state=True, T=512)
        assert why.tier in ("estimate", "reference")
        if arch not in (None, "cpu") and arch != "xe":
            assert why.forward[0].endswith(("_triton", "_gluon") if arch == "sm90" else "_triton")
            assert "not here" in why.device
        assert packed == ("&packed" in why.key)


def test_explain_of_a_forced_variant_reports_the_others_too() -> None:
    why = fd.explain("retention", device="sm90", mode="recurrent_triton")
    assert (why.forward[0], why.tier) == ("recurrent_triton", "forced")
    assert {r.status for r in why.rows} == {"chosen", "eligible", "refused"}
    assert "T" in why.why_not("parallel_triton")  # for short calls alone
    assert "was named" in why.why_not("sweep_triton")
    old = fd.explain("retention", device="sm90", dtype="float64", mode="sweep_triton")
    assert old.forward is None
    assert "dtype" in old.why_not("sweep_triton")
