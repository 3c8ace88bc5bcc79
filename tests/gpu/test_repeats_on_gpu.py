"""Remembered calls on a GPU: the bits and the memory of the first call, also where a graph captures or another stream is current."""

from __future__ import annotations

import gc
from typing import Any

import matrix
import pytest
import steps
import torch
from rooms import DELTA, SCALAR_DECAY

import fla_dispatch as fd
from fla_dispatch.kernels._shared import tape
from fla_dispatch.kernels._shared.step_cases import Sizes
from fla_dispatch.kernels.scalar_step.cases import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
CALLS = [
    p for room in (SCALAR_DECAY, DELTA) for p in matrix.pairs("gpu", room.variants("triton"), lambda c: c.name.startswith("gpu_"), room)
]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launches of the tapes that were played."""
    found: list[int] = []
    plain = tape.Tape.__call__

    def call(self: tape.Tape, given: Any) -> Any:
        result = plain(self, given)
        if result is not None:
            found.append(len(self._steps))
        return result

    monkeypatch.setattr(tape.Tape, "__call__", call)
    return found


@pytest.mark.parametrize(("variant", "case"), steps.pairs("gpu", steps.TRITON, lambda c: c.name.startswith("gpu")))
def test_steps(variant: str, case: Any, played: list[int]) -> None:
    inputs, handle, first = case.make(DEVICE), fd.op(case.op, mode=variant), None
    with torch.no_grad():
        for _ in range(4):
            one = inputs.fresh()
            found = [handle(*one.args, **one.kwargs), *one.states().values()]
            first = first or found
            for x, y in zip(found, first, strict=True):
                assert torch.equal(x, y)
    assert len(played) in (0, 2)  # a fused case may begin anywhere, and delta_product with one update takes a view first


@pytest.mark.parametrize(("variant", "case"), CALLS)
def test_calls(variant: str, case: Any, played: list[int]) -> None:
    inputs, handle = case.make(DEVICE), fd.op(case.op, mode=variant)
    grad = matrix.trainable(variant, case.op, inputs)
    leaves = {name: x.detach().requires_grad_(grad) for name, x in inputs.leaves().items()}
    inputs = inputs.replaced(leaves)
    runs = []
    for _ in range(4):
        o = found = None
        gc.collect()  # what tests before this one left is not freed in the middle of a call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = handle(*inputs.args, **inputs.kwargs)[0]
        found = [o.detach()]
        if grad:
            found += torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o), allow_unused=True)
        runs.append((found, torch.cuda.max_memory_allocated() - before))
    for found, peak in runs[1:]:
        assert peak <= runs[0][1]
        for x, y in zip(found, runs[0][0], strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


def test_streams_and_graphs(played: list[int]) -> None:
    """A played step runs on the current stream; a capture takes the whole road, and its replays what slots hold then."""
    x = make_inputs("retention_step", Sizes(4, 4, 4, 64, 64), torch.bfloat16, DEVICE, pool="slots")
    handle, first = fd.op("retention_step"), x.fresh()
    with torch.no_grad():
        expected = handle(*first.args, **first.kwargs)
        for _ in range(3):
            one = x.fresh()
            handle(*one.args, **one.kwargs)
        assert played
        stream = torch.cuda.Stream()
        one = x.fresh()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            o = handle(*one.args, **one.kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(o, expected)
        count, one, graph = len(played), x.fresh(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = handle(*one.args, **one.kwargs)
        assert len(played) == count
        graph.replay()
        assert torch.equal(o, expected)
        assert torch.equal(one.args[-1], first.args[-1])
