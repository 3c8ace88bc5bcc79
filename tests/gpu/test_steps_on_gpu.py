"""Steps on a GPU: the generated matrix at real sizes, graphs that are replayed, hidden waits, recompiles, 64-bit offsets."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import steps
import torch
from steps import OP_NAMES, TRITON, Case, Inputs, Sizes, make_inputs, recurrence_of
from waiting import no_waiting

import fla_dispatch as fd
from fla_dispatch.kernels._shared.step_plan import StepConfig
from fla_dispatch.tuning.proof import prove

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"


@pytest.mark.parametrize(("variant", "case"), steps.pairs("gpu", [*TRITON, "auto"]))
def test_values(variant: str, case: Case) -> None:
    steps.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), steps.pairs("gpu", ["step_torch"], lambda c: c.name.startswith("gpu")))
def test_values_in_torch(variant: str, case: Case) -> None:
    steps.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), steps.pairs("gpu", TRITON, lambda c: c.pool == "padded" and c.name.startswith("gpu")))
def test_padding_and_repeats(variant: str, case: Case) -> None:
    steps.check_guarded(variant, case, DEVICE)
    steps.check_repeat(variant, case, DEVICE, runs=10)


@pytest.mark.parametrize("variant", TRITON)
@pytest.mark.parametrize(("op", "options"), steps.WAYS, ids=str)
def test_prefill_and_steps_equal_one_call(variant: str, op: str, options: tuple[tuple[str, Any], ...]) -> None:
    steps.check_prefill_and_steps(variant, op, options, DEVICE, mode="chunk_torch")


@pytest.mark.parametrize("variant", TRITON)
@pytest.mark.parametrize("kind", steps.STRESS)
@pytest.mark.parametrize("op", steps.DELTA_STEP.cases.OP_NAMES)
def test_many_hard_tokens(op: str, kind: str, variant: str) -> None:
    steps.check_stress(variant, op, kind, DEVICE)


@pytest.mark.parametrize("K, V", [(16, 16), (16, 256), (100, 36), (128, 128), (256, 256)])
@pytest.mark.parametrize(
    "op, options",
    [
        ("simple_gla_step", ()), ("linear_attn_step", (("normalize", True),)), ("gated_delta_step", ()), ("kda_step", (("raw", True),)),
        ("comba_step", ()), ("delta_product_step", (("num_householder", 3),)),
    ],
    ids=str,
)  # fmt: skip
def test_every_config_is_proven(op: str, options: tuple[tuple[str, Any], ...], K: int, V: int) -> None:
    """Small tiles too, which several warps hold at once."""
    from fla_dispatch.device import profile
    from fla_dispatch.tuning.keys import key_of

    device, recurrence = torch.device(DEVICE, torch.cuda.current_device()), recurrence_of(op)
    variant = recurrence.variant("step_triton")
    key = key_of(op, {"B": 64, "H": 4, "HV": 8, "K": K, "V": V}, profile(device), options={"pool": "slots", **dict(options)})
    for config in dict.fromkeys((*variant.configs(key), StepConfig(16, 4), StepConfig(16, 8))):
        found = prove(recurrence, variant, config, key, device)
        assert found.status == "ok", (config, found.detail)


def padded(op: str, *, seed: int = 0, options: tuple[tuple[str, Any], ...] = ()) -> Inputs:
    return make_inputs(op, Sizes(24, 4, 8, 128, 64), torch.bfloat16, DEVICE, seed=seed, pool="padded", fused=True, options=options)


WAYS = [*((op, ()) for op in OP_NAMES), ("linear_attn_step", (("normalize", True),)), ("mamba2_step", (("gated", True),))]
WAYS += [(op, (("raw", True),)) for op in steps.DELTA_STEP.cases.OP_NAMES]


@pytest.mark.parametrize(("op", "options"), WAYS, ids=str)
def test_steps_never_wait_for_the_device(op: str, options: tuple[tuple[str, Any], ...]) -> None:
    inputs = padded(op, options=options)
    steps.run(op, "auto", inputs)  # compiles, builds constants
    handle = fd.op(op)
    with no_waiting(), torch.no_grad():
        handle(*inputs.args, **inputs.kwargs)


@pytest.mark.parametrize(("op", "options"), WAYS, ids=str)
def test_replayed_graphs_update_the_state(op: str, options: tuple[tuple[str, Any], ...]) -> None:
    """A graph replayed on new tokens and other slots gives the bits of eager steps, in output and pools."""
    inputs = padded(op, options=options)
    eager, handle = inputs.fresh(), fd.op(op)
    with torch.no_grad():
        handle(*inputs.fresh().args, **inputs.kwargs)  # compiles
        graph = torch.cuda.CUDAGraph()
        start = inputs.fresh()
        with torch.cuda.graph(graph):
            o = handle(*inputs.args, **inputs.kwargs)
        matrix.same(dict(inputs.states()), dict(start.states()), "capturing")
        slots = inputs.kwargs["slots"]
        for seed in (1, 2, 3):
            other = padded(op, seed=seed, options=options)
            for x, y in zip(steps.tokens(inputs), steps.tokens(other), strict=True):
                x.copy_(y)
            for name, x in inputs.kwargs.items():
                if isinstance(x, torch.Tensor) and name != "slots":
                    x.copy_(other.kwargs[name])
            slots.copy_(slots.roll(1))
            graph.replay()
            now = Inputs((*inputs.args[:-1], eager.args[-1]), inputs.kwargs)
            assert torch.equal(o, handle(*now.args, **now.kwargs))
            matrix.same(dict(inputs.states()), dict(eager.states()), "a replayed graph")
    assert not torch.equal(inputs.states()["state"], start.states()["state"])


@pytest.mark.parametrize("op", ["retention_step", "gated_delta_step"])
def test_batches_never_recompile(op: str) -> None:
    from triton import knobs

    compiled: list[Any] = []

    def step(B: int, pool: str) -> None:
        inputs = make_inputs(op, Sizes(B, 4, 4, 64, 64), torch.bfloat16, DEVICE, pool=pool)
        steps.run(op, "step_triton", inputs)

    step(40, "slots")
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["repr"])
    try:
        for B in (33, 48, 63, 64):  # one bucket of counts on any device with up to 128 units
            step(B, "slots")
            step(B, "padded")
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled, compiled


@pytest.mark.parametrize("op", ["retention_step", "gated_delta_step"])
def test_offsets_beyond_int32(op: str) -> None:
    """More than 2^31 elements in the pool: its last slots are updated as those of a small one."""
    S, H, D = 4200, 32, 128
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    pool = torch.zeros(S, H, D, D, dtype=torch.bfloat16, device=DEVICE)
    assert pool.numel() > 2**31
    inputs = make_inputs(op, Sizes(3, H, H, D, D), torch.bfloat16, DEVICE, state_dtype=torch.bfloat16)
    slots = torch.tensor([S - 1, 0, S - 2], device=DEVICE)
    pool[slots] = inputs.args[-1]
    with torch.no_grad():
        o = fd.op(op)(*inputs.args[:-1], pool, slots=slots)
        want = fd.op(op)(*inputs.args)
    assert torch.equal(o, want) and torch.equal(pool[slots], inputs.args[-1])
    assert not pool[1 : S - 2].any()
