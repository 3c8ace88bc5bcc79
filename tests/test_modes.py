"""The library ops themselves, and who else goes through them: fake and meta tensors, modes, subclasses; and torch.func, which does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import OPS, assert_same, example, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fla_dispatch as fd
from fla_dispatch import errors, registry
from fla_dispatch.dispatch.bridge import get_bridge

# -- the library ops ---------------------------------------------------------------------------------------------------------


CASES = {
    "dense": ("retention", {}),
    "states": ("simple_gla", {"initial_state": True, "output_final_state": True}),
    "packed": ("simple_gla", {"lengths": [5, 0, 7], "output_final_state": True}),
    "two gates": ("mamba2", {"initial_state": True, "output_final_state": True}),
    "half": ("lightning_attn", {"dtype": torch.bfloat16, "output_final_state": True}),
    "no tokens": ("retention", {"T": 0, "initial_state": True, "output_final_state": True}),
}


def forward_arguments(case: str) -> tuple[Any, Any, tuple[Any, ...]]:
    name, options = CASES[case]
    options = dict(options)
    args, kwargs = example(name, options.pop("T", 12), **options)
    _, tensors, chosen, prepare, _ = fd.op(name).contract(*args, **kwargs)
    if prepare is not None:
        tensors = prepare(tensors)
    return tensors, chosen, (*tensors, *chosen, True, None)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("choice", [None, "reference"])
def test_opcheck(case: str, choice: str | None) -> None:
    bridge = get_bridge("scalar_decay")
    tensors, options, args = forward_arguments(case)
    torch.library.opcheck(bridge.forward_op, (*args[:-1], choice))
    outputs = bridge.outputs(*bridge.forward_op(*args))
    saved = bridge.residuals(tensors, outputs, options)
    grads = [torch.randn_like(outputs.o), torch.randn_like(outputs.state) if options.final_state else None, None]
    wanted = [tensors[i] is not None and i != 1 for i in bridge.positions]
    torch.library.opcheck(bridge.backward_op, (*tensors, *saved[1:], *grads, *options, wanted, choice))


@pytest.mark.parametrize("case", list(CASES))
def test_outputs_are_new_contiguous_and_empty_where_not_asked_for(case: str) -> None:
    bridge = get_bridge("scalar_decay")
    tensors, options, args = forward_arguments(case)
    outputs = bridge.outputs(*bridge.forward_op(*args))
    storages = [x.untyped_storage()._cdata for x in (*outputs, *(t for t in tensors if t is not None))]
    assert len({*storages[: len(outputs)]}) == len(outputs)
    assert not {*storages[: len(outputs)]} & {*storages[len(outputs) :]}
    assert all(x.is_contiguous() for x in outputs)
    assert outputs.z.shape == outputs.weight.shape == (0,)
    assert (outputs.state.shape == (0,)) == (not options.final_state)
    saved = bridge.residuals(tensors, outputs, options)
    wanted = [i == 2 for i in bridge.positions]
    found = bridge.backward_op(*tensors, *saved[1:], outputs.o, None, None, *options, wanted, None)
    assert [x.shape == (0,) for x in found] == [not want for want in wanted]


def test_an_aliasing_variant_is_copied() -> None:
    from fla_dispatch.dispatch.bridge import _fresh

    x = torch.randn(4, 6)
    first, second, third, none = _fresh([x, x.t(), x[1:], None], [x], x)
    assert all(y.is_contiguous() for y in (first, second, third))
    assert len({y.untyped_storage()._cdata for y in (x, first, second, third)}) == 4
    torch.testing.assert_close(second, x.t())
    assert none.shape == (0,)


# -- fake and meta tensors, modes, subclasses --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [False, True])
def test_meta_and_fake_tensors_give_the_shapes(name: str, grad: bool) -> None:
    args, kwargs = example(name, 20, requires_grad=grad, initial_state=True, output_final_state=True)
    real = results(fd.op(name), args, kwargs)
    args, kwargs = example(name, 20, where="meta", requires_grad=grad, initial_state=True, output_final_state=True)
    meta = results(fd.op(name), args, kwargs)
    with FakeTensorMode():
        args, kwargs = example(name, 20, where="meta", requires_grad=grad, initial_state=True, output_final_state=True)
        fake = results(fd.op(name), args, kwargs)
    for x, m, f in zip(real, meta, fake, strict=True):
        assert x.shape == m.shape == f.shape
        assert x.dtype == m.dtype == f.dtype
        assert m.is_meta


def test_fake_cuda_tensors_need_no_gpu() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        o, state = fd.op("retention")(q, k, v, output_final_state=True)
    assert o.device.type == "cuda"
    assert state.dtype == torch.float32
    assert state.shape == (2, 4, 64, 64)


@pytest.mark.parametrize("name", OPS)
def test_flop_counter_counts_forward_and_backward(name: str) -> None:
    args, kwargs = example(name, 70, requires_grad=True)
    recurrence = registry.get_recurrence(registry.get_op(name).recurrence)
    _, tensors, options, _, _ = fd.op(name).contract(*args, **kwargs)
    expected = recurrence.flops(tensors, options)
    with FlopCounterMode(display=False) as counter:
        o, _ = fd.op(name)(*args, **kwargs)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == expected
    assert counter.get_total_flops() == 4 * expected
    assert_same([o], [fd.op(name)(*args, **kwargs)[0]])


def test_flop_counter_around_backward_alone() -> None:
    args, _ = example("retention", 70, requires_grad=True)
    o, _ = fd.op("retention")(*args)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    _, tensors, options, _, _ = fd.op("retention").contract(*args)
    assert counter.get_total_flops() == 3 * registry.get_recurrence("scalar_decay").flops(tensors, options)


class Wrapped(torch.Tensor):
    """A subclass that says which ops reached it."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return func(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def test_tensor_subclasses_see_the_op() -> None:
    args, _ = example("retention", 20)
    for position in range(3):
        Wrapped.seen.clear()
        mixed = [Wrapped(x) if i == position else x for i, x in enumerate(args)]
        o, _ = fd.op("retention")(*mixed)
        assert any("scalar_decay_forward" in name for name in Wrapped.seen)
        assert_same([o], [fd.op("retention")(*args)[0]])


def test_parameters_take_the_direct_road(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = get_bridge("scalar_decay")
    monkeypatch.setattr(bridge, "forward_op", None)
    args = [torch.nn.Parameter(x) for x in example("retention", 20)[0]]
    fd.op("retention")(*args)[0].sum().backward()
    assert all(x.grad is not None for x in args)


def test_second_derivative_through_the_ops_is_a_typed_error() -> None:
    args, _ = example("retention", 20, requires_grad=True)
    with FlopCounterMode(display=False):
        o, _ = fd.op("retention")(*args)
        with pytest.raises(errors.DoubleBackwardError):
            torch.autograd.grad(o.sum(), args, create_graph=True)


# -- torch.func and forward mode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_functional_gradients(name: str, mode: str) -> None:
    handle = fd.op(name, mode=mode)
    args, kwargs = example(name, 20)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return handle(*tensors, **kwargs)[0].sin().sum()

    found = torch.func.grad(loss, argnums=tuple(range(len(args))))(*args)
    real = [x.clone().requires_grad_() for x in args]
    assert_same(list(found), list(torch.autograd.grad(loss(*real), real)))
    value, pullback = torch.func.vjp(loss, *args)
    assert_same([value, *pullback(torch.tensor(2.0))], [loss(*args), *(2 * x for x in found)])


def test_maps_jacobians_and_forward_mode() -> None:
    handle = fd.op("simple_gla")
    args, _ = example("simple_gla", 20)
    many = [torch.stack([x, x.flip(1)]) for x in args]
    mapped = torch.func.vmap(lambda *a: handle(*a)[0])(*many)
    assert_same([mapped], [torch.stack([handle(*(x[i] for x in many))[0] for i in range(2)])])
    tangent = torch.randn_like(args[0])
    _, pushed = torch.func.jvp(lambda q: handle(q, *args[1:])[0], (args[0],), (tangent,))
    assert_same([pushed], [handle(tangent, *args[1:])[0]], 1e-3)  # linear in q
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0], tangent)
        found = torch.autograd.forward_ad.unpack_dual(handle(dual, *args[1:])[0]).tangent
    assert_same([found], [pushed])
    second = torch.func.hessian(lambda q: handle(q, *(x[:1, :3] for x in args[1:]))[0].sin().sum())(args[0][:1, :3])
    assert second.isfinite().all()


def test_a_forced_triton_variant_cannot_be_transformed() -> None:
    args, _ = example("retention", 20)
    with pytest.raises(errors.RefusedError, match=r"torch\.func"):
        torch.func.grad(lambda q: fd.op("retention", mode="sweep_triton")(q, *args[1:])[0].sum())(args[0])
