"""What a call holds at its worst on a GPU: training at most `bounds.training_bytes`, a step nothing but its output.

The bound is counted from the algorithm (tests/test_memory.py holds it against the host code), no constant of it is fitted: gradients,
the output and what is kept for backward; float32 states of segments of at least 256 tokens, three arrays of them at the worst (the
states before each segment, those of each segment from zero in reverse, those after each segment); float32 numbers per token and head
of gates; with grouped heads, dq and dk for each value head. The delta rules: matrices and errors of each chunk, states before and after
each in the inputs' dtype.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import steps
import torch
from memory import WAYS, Layout, packed

import fla_dispatch as fd
from benchmarks.bounds import training_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
#: Many heads keep no states; few heads and long sequences run in segments.
LAYOUTS = {
    "dense": Layout(4, 2048, 16),
    "dense_few_heads": Layout(1, 16384, 2),
    "packed": packed((2000, 0, 1, 3000, 63, 1024, 2104), 16),
    "packed_few_heads": packed((9000, 1, 0, 7000, 383), 2),
}
STEPS = [c for c in steps.CASES if c.name.startswith("bench") or c.name in ("gpu", "gpu_normalized", "gpu_gated", "gpu_bare", "gpu_raw")]


def held(call: Callable[[], object]) -> int:
    """Most bytes asked for at a time beyond what was there before, the call's results among them."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = call()
    torch.cuda.synchronize()
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del kept
    return int(most)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("op", "options", "group"), WAYS, ids=str)
def test_training_holds_gradients_and_a_few_states(op: str, options: tuple[tuple[str, Any], ...], group: int, D: int, layout: str) -> None:
    x = LAYOUTS[layout].make(op, D, DEVICE, options=options, group=group)
    handle, leaves = fd.op(op), list(x.leaves().values())
    explained = handle.explain(*x.args, **x.kwargs)
    do = torch.randn_like(handle(*x.args, **x.kwargs)[0])

    def train() -> object:
        return torch.autograd.grad(handle(*x.args, **x.kwargs)[0], leaves, do)

    train()  # compiles, builds constants
    found, parts = held(train), training_bytes(op, x, explained.backward[0])
    print(f"{found / 2**20:.1f} of {sum(parts.values()) / 2**20:.1f} MiB, {explained.forward}, {explained.backward}")
    assert found <= sum(parts.values()), (found, parts, explained.forward, explained.backward)
    assert found >= parts["gradients"], "nothing was measured"


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
def test_a_step_allocates_nothing_but_its_output(case: steps.Case) -> None:
    inputs = case.make(DEVICE)
    o = steps.run(case.op, "auto", inputs)["o"]  # compiles, builds constants
    handle = fd.op(case.op)
    with torch.no_grad():
        assert held(lambda: handle(*inputs.args, **inputs.kwargs)) == o.numel() * o.element_size()
