"""500 lengths and 500 packings of one op: no Key, plan, graph, binary or cache entry is added after the first call of each bucket."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import pytest
import torch
from lengths import COUNT, HEADS, LONGEST, Shape, bucket, dense, firsts, packed
from matrix import variants
from torch._dynamo.testing import CompileCounterWithBackend

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.dispatch import plan
from fla_dispatch.dispatch.bridge import get_bridge
from fla_dispatch.dispatch.plan import Plans
from fla_dispatch.problem import Problem
from fla_dispatch.sequences import SEGMENTS
from fla_dispatch.tuning.store import get_store

D = 24  # no number of sequences times four, which Dynamo would take for the same size
ROOM = registry.get_recurrence("scalar_decay")
Sizes = tuple[bool, int, int, int, int]


def count(n: int, units: int) -> int:
    """Bucket of a count, in words: exact below the number of units, then the next power of two."""
    top = 1
    while top < n:
        top *= 2
    return n if n < units else top


def expected(shape: Shape, units: int) -> Sizes:
    """The sizes of a shape's Key as the documents have them: packed, T, mean length, N, states."""
    if shape.rows:
        return False, bucket(shape.T), bucket(shape.T), 1, count(shape.rows * HEADS, units)
    N = len(shape.lengths)
    return True, bucket(shape.T), bucket((shape.T + N - 1) // N), count(N, units), count(N * HEADS, units)


def sizes(key: Problem) -> Sizes:
    return key.packed, key.T, key.mean_length, key.N, key.BH


def lowered(shape: Shape, *, grad: bool = False, D: int = D, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Tensors and options of a call."""
    args, kwargs = shape.call(D, dtype, "cpu", grad=grad)
    return registry.get_op("simple_gla").contract(*args, **kwargs)[1:3]


def run(shape: Shape, *, grad: bool, call: Any = None) -> None:
    args, kwargs = shape.call(D, torch.float32, "cpu", grad=grad)
    with torch.set_grad_enabled(grad):
        o, _ = (call or fd.op("simple_gla"))(*args, **kwargs)
    if grad:
        torch.autograd.grad(o, args, torch.ones_like(o))


# ---- Keys and plans ----


def test_what_is_counted_is_what_is_meant() -> None:
    lengths, packings = dense(), packed()
    assert len({s.T for s in lengths}) == len({s.lengths for s in packings}) == COUNT
    assert len({len(s.lengths) for s in packings}) > 20 and any(0 in s.lengths for s in packings) and all(s.T <= LONGEST for s in packings)
    assert {s.bare for s in packings} == {False, True}
    assert (
        {bucket(s.T) for s in lengths}
        == {bucket(s.T) for s in packings}
        == {bucket(s.T) for s in firsts()}
        == {1, 16, 32, 64, 128, 256, 512}
    )


@pytest.mark.parametrize("arch", ["cpu", "sm90", "gfx942"])
def test_keys_are_the_buckets(arch: str) -> None:
    device = hypothetical(arch)
    for shapes in (dense(), packed()):
        problems = [ROOM.problem(*lowered(shape), False) for shape in shapes]
        keys = {dataclasses.replace(p, device=device).key() for p in problems}
        wanted = {expected(shape, device.units) for shape in shapes}
        assert {sizes(key) for key in keys} == wanted and len(keys) == len(wanted)


@pytest.mark.parametrize("grad", [False, True])
def test_plans_are_as_many_as_keys(grad: bool) -> None:
    cache, shapes = Plans("scalar_decay"), [*dense(), *packed()]
    units = profile(torch.device("cpu")).units
    wanted = {expected(shape, units) for shape in shapes}
    calls = [lowered(shape, grad=grad) for shape in shapes]
    for tensors, options in calls:
        cache.lookup(tensors, options, grad, None)
    assert {sizes(key) for key, _, _ in cache._by_key} == wanted and len(cache._by_key) == len(wanted) < COUNT // 4
    decisions, facts = {id(p.decision) for p in cache._by_facts.values()}, len(cache._by_facts)
    assert len(decisions) == len(wanted)
    for tensors, options in reversed(calls):
        cache.lookup(tensors, options, grad, None)
    assert (len(cache._by_key), len(cache._by_facts)) == (len(wanted), facts)


# ---- everything else that is kept ----


def kept() -> dict[str, int]:
    """Entries of every container and function cache of the library's modules, and of the objects that keep what calls left."""
    found = {"library ops": len(torch._C._dispatch_get_all_op_names())}
    owners = [(name, vars(module)) for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "fla_dispatch"]
    bridge, store = get_bridge("scalar_decay"), get_store()
    objects = [bridge, bridge.plans, store, *store._shelves.values()]
    for name, fields in (*owners, *((f"{type(x).__name__} {i}", vars(x)) for i, x in enumerate(objects))):
        for field, x in fields.items():
            if isinstance(x, (dict, set, list)) and not field.startswith("__"):
                found[f"{name}.{field}"] = len(x)
            elif isinstance(x, functools._lru_cache_wrapper):
                found[f"{name}.{field}"] = x.cache_info().currsize
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_grows_with_the_number_of_calls(grad: bool) -> None:
    """Raw facts of packings are remembered, up to a bound; anything else is as large after 1,000 calls as after one of each Key."""
    units, shapes = profile(torch.device("cpu")).units, [*dense(), *packed()]
    for shape in {expected(shape, units): shape for shape in shapes}.values():
        run(shape, grad=grad)
    before = kept()
    assert any(name.endswith("._by_key") and n for name, n in before.items()) and any(name.endswith("log_decay") for name in before)
    for shape in shapes:
        run(shape, grad=grad)
    grown = {name: n for name, n in kept().items() if n != before.get(name)}
    assert all(name.startswith("Plans ") and name.endswith("._by_facts") and n <= plan.MOST_PLANS for name, n in grown.items()), grown


@pytest.mark.parametrize("grad", [False, True])
def test_graphs_are_of_the_first_calls(grad: bool) -> None:
    """Dynamo holds batches of one row apart, as any size of one; of the others none adds a graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fd.op("simple_gla"), fullgraph=True, dynamic=True, backend=counter)
    for shape in firsts():
        run(shape, grad=grad, call=compiled)
    graphs = counter.frame_count
    for shape in (*dense(), *packed()):
        if shape.rows != 1:
            run(shape, grad=grad, call=compiled)
    assert counter.frame_count == graphs


# ---- binaries ----


def test_rows_of_the_segment_table_are_aligned() -> None:
    for N in range(1, 40):
        info = fd.SeqInfo.from_lengths([300 * n for n in range(N)])
        assert info.segments.shape == (len(SEGMENTS), N + 1)
        assert all(row.data_ptr() % 16 == 0 and row.is_contiguous() for row in info.segments)


def binaries(variant: registry.Variant, shape: Shape) -> set[tuple[Any, ...]]:
    """What Triton would compile for a call on an H200 and its backward: types, constants and alignments of every launch."""
    from fla_dispatch.kernels._shared.ahead import launch_key
    from fla_dispatch.kernels._shared.launch import record

    tensors, options = lowered(shape, D=64, dtype=torch.bfloat16)
    key = dataclasses.replace(ROOM.problem(tensors, options, True), device=hypothetical("sm90")).key()
    module: Any = variant.load()
    with record() as launches, torch.no_grad():
        outputs = ROOM.outputs(*ROOM.empty_outputs(tensors, options))
        module.forward(variant.configs(key)[0], tensors, options)
        if not variant.static_refusals(key):
            wanted = tuple(getattr(tensors, name) is not None for name in ROOM.differentiable)
            grads = ROOM.output_grads(torch.empty_like(outputs.o), None, None)
            module.backward(variant.configs(key)[0], ROOM.residuals(tensors, outputs, options), grads, options, wanted)
    assert launches
    return {(*launch_key(x), *(t.data_ptr() % 16 for t in x.args if isinstance(t, torch.Tensor))) for x in launches}


@pytest.mark.parametrize("name", variants("triton"))
def test_binaries_are_of_the_first_calls(name: str) -> None:
    """As tests/gpu/test_lengths_on_gpu.py has it, told from the launches."""
    pytest.importorskip("triton")
    variant = ROOM.variant(name)
    compiled = set().union(*(binaries(variant, shape) for shape in firsts()))
    for shape in (*dense(), *packed()):
        new = binaries(variant, shape) - compiled
        assert not new, (shape, new)
