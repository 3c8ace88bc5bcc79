"""What torch.compile, fake tensors, dispatch modes and torch.func see: one opaque op per direction, whole graphs, right shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fla_dispatch as fd
from fla_dispatch import errors, registry
from fla_dispatch.dispatch.bridge import get_bridge

OPS = ["linear_attn", "retention", "lightning_attn", "simple_gla", "mamba2"]
LENGTHS = (50, 51, 63, 64, 65, 2, 5, 7, 9, 10, 11, 12, 13, 14, 17, 31, 33, 100, 127, 130)  # no head dim among them


def example(name: str, T: int, *, dtype: torch.dtype = torch.float32, where: str = "cpu", **options: Any) -> tuple[Any, dict[str, Any]]:
    op = registry.get_op(name)
    small = {"B": 3, "T": T, "H": 4, "HV": 4, "K": 16, "V": 24, "G": 4, "N": 16, "P": 24}
    return op.example({s: small[s] for s in op.sizes}, dtype, where, **options)


def leaves(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]


def results(call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs and, where something requires gradients, every gradient."""
    o, state = call(*args, **kwargs)
    found = [o] + ([] if state is None else [state])
    wanted = leaves(args, kwargs)
    if wanted:
        found += torch.autograd.grad(sum(x.float().sin().sum() for x in found), wanted)
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def graphs(counter: CompileCounterWithBackend) -> int:
    """Graphs that hold an op (Dynamo also hands over an empty one where it starts a frame again)."""
    return sum("scalar_decay" in graph.print_readable(print_output=False) for graph in counter.graphs)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# -- torch.compile -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_one_graph_serves_all_lengths_forward_and_backward(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    handle = fd.op(name)
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend=counter)
    for T in LENGTHS:
        args, kwargs = example(name, T, requires_grad=True, initial_state=True, output_final_state=True)
        assert_same(results(compiled, args, kwargs), results(handle, args, kwargs))
    assert graphs(counter) <= 2


@pytest.mark.parametrize("name", OPS)
def test_op_is_looked_up_inside_the_graph(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(*args: Any, **kwargs: Any) -> Any:
        o, state = fd.op(name)(*args, **kwargs)
        return 2 * o, state

    for T in (50, 51, 65, 128):
        args, kwargs = example(name, T)
        with torch.no_grad():
            assert_same([call(*args, **kwargs)[0] / 2], [fd.op(name)(*args, **kwargs)[0]])
    assert graphs(counter) == 1


def test_one_token_and_packs_add_one_graph_each() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    handle = fd.op("simple_gla")
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend=counter)
    for T, lengths in (
        (50, None),
        (1, None),
        (51, None),
        (51, [20, 0, 1, 2, 27, 1]),
        (83, [70, 10, 2, 1, 0]),
        (66, [1, 1, 30, 32, 1, 1, 0]),
    ):
        args, kwargs = example("simple_gla", T, lengths=lengths, requires_grad=True, output_final_state=True)
        assert_same(results(compiled, args, kwargs), results(handle, args, kwargs))
    assert graphs(counter) <= 3


def test_bare_cu_seqlens_and_normalizer_state_compile() -> None:
    args, kwargs = example("linear_attn", 50)
    args = [x[:1].abs() for x in args]
    kwargs = {"cu_seqlens": torch.tensor([0, 20, 50], dtype=torch.int32), "normalize": True, "output_final_state": True}

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, (S, z) = fd.op("linear_attn")(*args, **kwargs)
        return o, S, z

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(list(compiled(*args)), list(call(*args)))


def test_one_tensor_in_two_roles() -> None:
    handle = fd.op("retention")
    x = example("retention", 50, requires_grad=True)[0][0]
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(
        list(torch.autograd.grad(compiled(x, x, x)[0].sin().sum(), x)), list(torch.autograd.grad(handle(x, x, x)[0].sin().sum(), x))
    )


def test_a_bad_pack_is_refused_when_the_graph_runs() -> None:
    args, _ = example("retention", 50, lengths=[20, 30])
    compiled = torch.compile(fd.op("retention"), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*args, cu_seqlens=torch.tensor([0, 20, 50]))
    with pytest.raises(errors.CallError, match="cu_seqlens"):
        compiled(*args, cu_seqlens=torch.tensor([0, 20, 49]))


def test_inductor_forward_and_backward() -> None:
    handle = fd.op("retention")

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        o, state = handle(q.tanh(), k, v * 2, output_final_state=True)
        return o.relu(), state

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="inductor")
    for T in (50, 65):
        args, _ = example("retention", T, requires_grad=True)
        assert_same(results(compiled, args, {}), results(layer, args, {}))


def test_scopes_and_settings_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    handle = fd.op("retention")
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend=counter)
    bridge = get_bridge("scalar_decay")
    seen: list[tuple[bool, str | None]] = []
    lookup = bridge.plans.lookup
    monkeypatch.setattr(bridge.plans, "lookup", lambda t, o, grad, choice: seen.append((grad, choice)) or lookup(t, o, grad, choice))
    args, _ = example("retention", 50, requires_grad=True)
    with fd.use(retention="reference"):
        o, _ = compiled(*args)
    o.sum().backward()
    assert seen == [(True, "reference"), (True, "reference")], "the choice is saved for backward"
    seen.clear()
    compiled(*args)
    assert seen == [(True, None)]
    with torch.no_grad(), fd.use(retention="chunk"):
        compiled(*args)
    assert seen[-1] == (False, "chunk")
    forced = torch.compile(fd.op("retention", mode="reference"), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        forced(*args)
    assert seen[-1] == (False, "reference")


def test_selection_happens_when_the_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, seen = get_bridge("scalar_decay"), []
    lookup = bridge.plans.lookup
    monkeypatch.setattr(bridge.plans, "lookup", lambda t, *rest: seen.append(t.q.shape[1]) or lookup(t, *rest))
    compiled = torch.compile(fd.op("retention"), fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (50, 100, 500):
        compiled(*example("retention", T)[0])
    assert seen == [50, 100, 500]


def test_autocast_inside_and_outside_of_the_graph() -> None:
    handle = fd.op("retention")
    args, _ = example("retention", 50, requires_grad=True)

    def inside(*args: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return handle(*args)

    expected = results(inside, args, {})
    assert expected[0].dtype == torch.bfloat16
    assert_same(results(torch.compile(inside, fullgraph=True, dynamic=True, backend="aot_eager"), args, {}), expected, 1e-2)
    torch._dynamo.reset()
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(compiled, args, {}), expected, 1e-2)


def test_bound_handle_in_a_graph_is_the_handle() -> None:
    handle = fd.op("retention")
    args, _ = example("retention", 50)
    bound = handle.bind(*args, output_final_state=True)
    compiled = torch.compile(lambda *a: bound(*a), fullgraph=True, backend="aot_eager")
    assert_same(list(compiled(*args)), list(handle(*args, output_final_state=True)))


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
    recurrence = registry.get_recurrence("scalar_decay")
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


# -- other compilers and contexts --------------------------------------------------------------------------------------------


def test_make_fx_and_export_see_the_op() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    args, _ = example("retention", 20)
    graph = make_fx(lambda *a: fd.op("retention")(*a)[0])(*args)
    assert "scalar_decay_forward" in graph.code

    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fd.op("retention")(q, k, v)[0]

    program = torch.export.export(Layer(), tuple(args))
    assert_same([program.module()(*args)], [fd.op("retention")(*args)[0]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    args, _ = example("retention", 20, requires_grad=True)
    handle = fd.op("retention")
    checkpoint(lambda *a: handle(*a)[0], *args, use_reentrant=reentrant).sin().sum().backward()
    assert_same([x.grad for x in args], list(torch.autograd.grad(handle(*args)[0].sin().sum(), args)))


def test_inference_mode_and_saved_tensor_hooks() -> None:
    args, _ = example("retention", 20, requires_grad=True)
    handle, packed = fd.op("retention"), []
    with torch.inference_mode():
        handle(*args)
    expected = torch.autograd.grad(handle(*args)[0].sum(), args)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        o, _ = handle(*args)
    assert_same(list(torch.autograd.grad(o.sum(), args)), list(expected))
    assert packed == [x.shape for x in args]
