"""The bound on the memory of training (benchmarks.bounds), held against what the host code of every Triton variant allocates.

Kernels are left out: what is allocated does not depend on them. tests/gpu/test_memory_on_gpu.py measures whole calls.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import WAYS, Layout, packed

from benchmarks import bounds
from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared import launch
from fla_dispatch.kernels.scalar_decay.cases import Sizes, make_inputs

ROOM = registry.get_recurrence("scalar_decay")
TRITON = [v for v in ROOM.variants if v.language == "triton"]
LAYOUTS = {"dense": Layout(2, 1024, 2), "packed": packed((300, 0, 1, 700, 535), 2)}


def peak(call: Callable[[], object], to: Path) -> int:
    """Most bytes that the call holds at a time beyond what was there before, its results among them; on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    del kept
    found.export_chrome_trace(str(to))
    events = [e for e in json.loads(to.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


class Trained(torch.autograd.Function):
    """forward and backward of one config of a variant, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, module: Any, config: Any, options: Any, kind: Any, *tensors: Any) -> torch.Tensor:
        t = kind(*tensors)
        outputs = module.forward(config, t, options)
        ctx.rest = module, config, options, ROOM.residuals(t, outputs, options)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        module, config, options, residuals = ctx.rest
        wanted = ctx.needs_input_grad[4:][: len(ROOM.differentiable)]
        found = module.backward(config, residuals, ROOM.output_grads(do, None, None), options, wanted)
        return (None,) * 4 + tuple(found) + (None,) * (len(ctx.needs_input_grad) - 4 - len(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("op", "options"), WAYS, ids=str)
def test_host_code_stays_within_the_bound(
    op: str, options: tuple[tuple[str, Any], ...], D: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_recorded", collections.deque(maxlen=0))  # launches are neither run nor kept
    x = LAYOUTS[layout].make(op, D, "cpu", options=options)
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    most, leaves, do = sum(bounds.training_bytes(op, x).values()), list(x.leaves().values()), torch.ones_like(low.tensors.v)
    key = dataclasses.replace(ROOM.problem(low.tensors, low.options, True), device=hypothetical("sm90"))
    found = {}
    able = [v for v in TRITON if not v.static_refusals(key)]
    for variant in able:
        for config in variant.configs(key):

            def call(variant: Any = variant, config: Any = config) -> object:
                t = low.tensors if low.prepare is None else low.prepare(low.tensors)
                o = Trained.apply(variant.load(), config, low.options, type(t), *t)
                return torch.autograd.grad(o, leaves, do)

            call()  # constants that are built once
            found[variant.name, config] = peak(call, tmp_path / "trace.json")
    assert len(found) > len(able) and all(size <= most for size in found.values()), (most, found)
    assert max(found.values()) > 0.75 * most, "a bound that nothing comes near"


def test_the_bound_knows_the_shortest_segment_and_the_narrowest_tile() -> None:
    for T in (64, 1024, 32768):
        for D in (16, 64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                made = make_inputs("simple_gla", Sizes(1, T, 1, 1, D, D), dtype, "meta")
                low = registry.get_op("simple_gla").contract(*made.args, **made.kwargs)
                key = dataclasses.replace(ROOM.problem(low.tensors, low.options, True), device=hypothetical("sm90"))
                configs = [config for variant in TRITON for config in variant.configs(key)]
                assert all(
                    (getattr(c, "SEG", 0) or bounds.SEGMENT) >= bounds.SEGMENT and getattr(c, "BE", bounds.TILE) >= bounds.TILE
                    for c in configs
                )


def test_the_bound_by_hand() -> None:
    """retention, (B, T, H, D) = (4, 4096, 16, 128): three gradients and o of 64 MiB, 16 x 4 x 16 segments of two float32
    states and of two bfloat16 states for each of four chunks."""
    parts = bounds.training_bytes("retention", make_inputs("retention", Sizes(4, 4096, 16, 16, 128, 128), torch.bfloat16, "meta"))
    assert parts["gradients"] == 3 * 2**26 and parts["outputs"] == 2**26 and parts["rows"] == parts["groups"] == 0
    states = 16 * 4 * 16 * 128 * 128 * (2 * 4 + 4 * 2 * 2)
    assert states < parts["states"] < 1.2 * states
