"""The bound on the memory of training (benchmarks.bounds), held against what the host code of every Triton variant allocates.

Kernels are left out: what is allocated does not depend on them. tests/gpu/test_memory_on_gpu.py measures whole calls.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
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
from fla_dispatch.kernels._shared.token_cases import Sizes
from fla_dispatch.kernels.delta import transforms
from fla_dispatch.kernels.delta.cases import make_inputs as delta_inputs
from fla_dispatch.kernels.scalar_decay.cases import make_inputs
from fla_dispatch.registry import Recurrence, Variant

ROOM = registry.get_recurrence("scalar_decay")


def triton_variants(room: Recurrence) -> list[Variant]:
    """In Triton and in Gluon."""
    return [v for v in room.variants if v.language in ("triton", "gluon")]


TRITON = triton_variants(ROOM)
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
    def forward(ctx: Any, room: Recurrence, module: Any, config: Any, options: Any, *tensors: Any) -> torch.Tensor:
        t = room.tensors(*tensors)
        outputs = module.forward(config, t, options)
        ctx.rest = room, module, config, options, room.residuals(t, outputs, options)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        room, module, config, options, residuals = ctx.rest
        wanted = ctx.needs_input_grad[4:][: len(room.differentiable)]
        grads = room.output_grads(do, *[None] * (len(room.output_grads._fields) - 1))
        found = module.backward(config, residuals, grads, options, wanted)
        return (None,) * 4 + tuple(found) + (None,) * (len(ctx.needs_input_grad) - 4 - len(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("op", "options", "group"), WAYS, ids=str)
def test_host_code_stays_within_the_bound(
    op: str, options: tuple[tuple[str, Any], ...], group: int, D: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_recorded", collections.deque(maxlen=0))  # launches are neither run nor kept
    monkeypatch.setattr(transforms, "fusable", lambda *tensors: True)
    x = LAYOUTS[layout].make(op, D, "cpu", options=options, group=group)
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    room = registry.get_recurrence(low.recurrence)
    leaves, do = list(x.leaves().values()), torch.ones_like(low.tensors.v)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    key = dataclasses.replace(room.problem(tensors, low.options, True), device=hypothetical("sm90")).key()
    able = [v for v in triton_variants(room) if not v.static_refusals(key)]
    found, bound = {}, {v.name: sum(bounds.training_bytes(op, x, v.name).values()) for v in able}
    for variant in able:
        for config in variant.configs(key):

            def call(variant: Any = variant, config: Any = config) -> object:
                t = low.tensors if low.prepare is None else low.prepare(low.tensors)
                o = Trained.apply(room, variant.load(), config, low.options, *t)
                return torch.autograd.grad(o, leaves, do)

            call()  # constants that are built once
            found[variant.name, config] = peak(call, tmp_path / "trace.json")
    assert len(found) > len(bound) and all(size <= bound[name] for (name, _), size in found.items()), (bound, found)
    for most in set(bound.values()):
        assert max(size for (name, _), size in found.items() if bound[name] == most) > 0.75 * most, ("nothing comes near", bound, found)


@pytest.mark.parametrize("op", ["delta", "gated_delta", "kda", "comba", "delta_product"])
def test_transforms_hold_their_outputs_and_gradients(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients arrive as they would from a recurrence, one for each output."""
    monkeypatch.setattr(launch, "_recorded", collections.deque(maxlen=0))  # launches are neither run nor kept
    monkeypatch.setattr(transforms, "fusable", lambda *tensors: True)
    made = delta_inputs(op, Sizes(2, 2048, 2, 4, 64, 64), torch.bfloat16, options=(("raw", True),))
    x = made.replaced({name: y.detach().requires_grad_() for name, y in made.leaves().items()})
    low = registry.get_op(op).contract(*x.args, **x.kwargs)
    leaves = [y for name, y in x.leaves().items() if name != "v"]
    names = [name for name in ("q", "k", "p", "g", "beta") if name in x.leaves()]
    assert low.prepare is not None
    updates = x.kwargs.get("num_householder", 1)
    arriving = [torch.ones_like(getattr(low.prepare(low.tensors), name)) for name in names]

    def call() -> object:
        t = low.prepare(low.tensors)
        return torch.autograd.grad([getattr(t, name) for name in names], leaves, arriving)

    call()
    found, parts = peak(call, tmp_path / "trace.json"), bounds.transform_bytes(x)
    if updates > 1:  # torch pads q and g, and takes the paddings away from their gradients
        parts["paddings"] = updates * (x.leaves()["q"].numel() * 2 + x.leaves()["g"].numel() * 4)
    assert parts["outputs"] + parts["gradients"] <= found <= sum(parts.values()), (found, parts)


def test_the_bound_knows_the_shortest_segment_and_the_narrowest_tile() -> None:
    for T in (64, 1024, 32768):
        for D in (16, 64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                made = make_inputs("simple_gla", Sizes(1, T, 1, 1, D, D), dtype, "meta")
                low = registry.get_op("simple_gla").contract(*made.args, **made.kwargs)
                key = dataclasses.replace(ROOM.problem(low.tensors, low.options, True), device=hypothetical("sm90"))
                configs = [config for variant in TRITON for config in variant.configs(key)]
                shortest = min(getattr(c, "SEG", 0) or bounds.SEGMENT for c in configs)
                assert shortest >= bounds.SEGMENT and min(getattr(c, "BE", bounds.TILE) for c in configs) >= bounds.TILE


def test_the_bound_by_hand() -> None:
    """retention, (B, T, H, D) = (4, 4096, 16, 128): three gradients and o of 64 MiB, 16 x 4 x 16 segments of two float32
    states and of two bfloat16 states for each of four chunks."""
    parts = bounds.training_bytes("retention", make_inputs("retention", Sizes(4, 4096, 16, 16, 128, 128), torch.bfloat16, "meta"))
    assert parts["gradients"] == 3 * 2**26 and parts["outputs"] == 2**26 and parts["rows"] == parts["groups"] == 0
    states = 16 * 4 * 16 * 128 * 128 * (2 * 4 + 4 * 2 * 2)
    assert states < parts["states"] < 1.2 * states


def test_the_bound_of_delta_knows_chunks_and_segments() -> None:
    """Whatever a Key says, its configs cut sequences as the bound counts them; at lengths beside the edges too."""
    room, segments = registry.get_recurrence("delta"), set()
    for T, D, H in itertools.product((64, 1025, 2049, 32768), (16, 64, 128, 256), (1, 64)):
        made = delta_inputs("gated_delta", Sizes(1, T, H, H, D, D), torch.bfloat16, "meta")
        low = registry.get_op("gated_delta").contract(*made.args, **made.kwargs)
        key = dataclasses.replace(room.problem(low.tensors, low.options, True), device=hypothetical("sm90")).key()
        configs = [config for variant in triton_variants(room) for config in variant.configs(key)]
        assert all(getattr(c, "BT", bounds.DELTA_CHUNK) == bounds.DELTA_CHUNK and c.BV >= bounds.TILE for c in configs if D >= 64)
        segments |= {getattr(c, "SEG", 0) for c in configs}
        assert all(2 * getattr(c, "SEG", 0) <= key.T for c in configs)
    assert segments == {0, *bounds.DELTA_SEGMENTS}


def test_the_bound_of_delta_by_hand() -> None:
    """gated_delta, (B, T, H, D) = (4, 4096, 16, 128): o, w, dy and the gradients of q, k, v of 64 MiB, A and X of 32 MiB, g, beta, their
    gradients and cumulated gates of 1 MiB; 64 x 4 x 16 chunks with two bfloat16 states, 8 x 4 x 16 segments with three float32 ones."""
    parts = bounds.training_bytes("gated_delta", delta_inputs("gated_delta", Sizes(4, 4096, 16, 16, 128, 128), torch.bfloat16, "meta"))
    assert parts["gradients"] == 3 * 2**26 + 2 * 2**20 and parts["outputs"] == parts["matrices"] == parts["errors"] // 2 == 2**26
    assert parts["rows"] == 2**20 and parts["groups"] == parts["prepared"] == 0
    assert parts["states"] == (64 * 2 * 2 + 8 * 3 * 4) * 4 * 16 * 128 * 128
