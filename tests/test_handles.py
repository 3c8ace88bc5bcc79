"""Handles as values, the plan cache behind them, the one autograd.Function, and bound handles."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from planting import cheap, planted, planted_module, qkv

import fla_dispatch as fd
from fla_dispatch import errors, registry, settings
from fla_dispatch.dispatch import handle as handles
from fla_dispatch.dispatch import plan as plans
from fla_dispatch.dispatch.bridge import get_bridge

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
        assert len(cache._by_facts) <= 4 and len(cache._by_key) <= 4


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
    assert wants == [(False, False, True, *[False] * 5)]
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
    for no_tensor in (None, v.numpy()):
        with pytest.raises(errors.CallError, match="bound call"):
            bound(q, k, no_tensor)
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


def test_scopes_of_threads_that_overlap_leave_nothing_to_traces() -> None:
    first, second = fd.use(retention="reference"), fd.use(retention="chunk")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert handles.traced_scope == {"retention": "chunk"}
        other.submit(second.__exit__, None, None, None).result()
    assert handles.traced_scope == {}


def test_seq_info_is_a_copy_of_whole_numbers() -> None:
    cu = torch.tensor([0, 10, 33], dtype=torch.int32)
    info = fd.SeqInfo.from_cu_seqlens(cu)
    cu[1] = 20
    assert info.host.tolist() == info.cu_seqlens.tolist() == [0, 10, 33]
    for wrong in (lambda: fd.SeqInfo.from_lengths([1.5, 2.7]), lambda: fd.SeqInfo.from_cu_seqlens(cu.float())):
        with pytest.raises(errors.CallError, match="SeqInfo"):
            wrong()
    assert fd.SeqInfo.from_lengths([]).host.tolist() == [0]
