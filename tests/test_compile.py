"""torch.compile, export and make_fx: whole graphs through one opaque op per direction, chosen when they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import LENGTHS, OPS, assert_same, example, results
from torch._dynamo.testing import CompileCounterWithBackend

import fla_dispatch as fd
from fla_dispatch import errors
from fla_dispatch.dispatch.bridge import get_bridge


def graphs(counter: CompileCounterWithBackend) -> int:
    """Graphs that hold an op (Dynamo also hands over an empty one where it starts a frame again)."""
    return sum("fla_dispatch." in graph.print_readable(print_output=False) for graph in counter.graphs)


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


@pytest.mark.parametrize("name", ["gated_delta", "kda", "comba", "delta_product"])
def test_transforms_of_the_delta_ops_compile(name: str) -> None:
    """Normalisation, logits and gates from raw input, with packs: one graph for all of these lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    handle = fd.op(name)
    compiled = torch.compile(handle, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([20, 0, 1, 2, 27], [70, 10, 2, 1, 0], [30, 32, 1, 1, 0]):
        args, kwargs = example(
            name, sum(lengths), lengths=lengths, requires_grad=True, output_final_state=True, options=(("raw", True), ("lower_bound", -5.0))
        )  # fmt: skip
        assert_same(results(compiled, args, kwargs), results(handle, args, kwargs))
    assert graphs(counter) <= 2


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
