"""The delta room on a GPU at real sizes: the generated matrix, stress, graphs, hidden waits and 64-bit offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import delta_stress
import matrix
import pytest
import torch
from rooms import DELTA
from waiting import no_waiting

import fla_dispatch as fd
from fla_dispatch.device import profile
from fla_dispatch.kernels.delta.cases import Case, Sizes, make_inputs, tolerance
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import prove

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TRITON = DELTA.variants("triton")
DEVICE = "cuda"


def pairs(variants: list[str], only: Callable[[Case], bool]) -> list[Any]:
    return matrix.pairs("gpu", variants, only, DELTA)


def chosen(case: Case) -> bool:
    """All sizes for a GPU, and of the small ones those of kda and comba: ops share kernels, compiling takes time."""
    return case.name.startswith("gpu_") or case.op in ("kda", "comba") or case.name in ("group2", "pack", "bf16", "raw", "three_updates")


@pytest.mark.parametrize(("variant", "case"), pairs([*TRITON, "auto"], chosen))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(["chunk_torch"], lambda c: c.name in ("gpu_group", "gpu_pack", "bf16")))
def test_values_in_torch(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(["reference"], lambda c: c.name in ("pack", "group2")))
def test_values_of_the_reference(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, matrix.has("partial")))
def test_partial_gradients(variant: str, case: Case) -> None:
    matrix.check_partial_gradients(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, lambda c: c.name == "gpu_group"))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, lambda c: c.name == "gpu_pack"))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, lambda c: c.name.startswith("gpu_") and "repeat" in c.tags))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, DEVICE, runs=5)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, lambda c: c.name.startswith("gpu_") and "causal" in c.tags))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), pairs(TRITON, lambda c: c.name == "group2"))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", delta_stress.STRESS)
@pytest.mark.parametrize("variant", [*TRITON, "chunk_torch"])
def test_stress(variant: str, name: str, dtype: torch.dtype) -> None:
    delta_stress.check(variant, name, DEVICE, dtype, T=200)


@pytest.mark.parametrize("variant", [*TRITON, "chunk_torch", "auto"])
@pytest.mark.parametrize("bare", [False, True], ids=["SeqInfo", "tensor"])
@pytest.mark.parametrize("op", ["kda", "delta_product"])
def test_packs_never_wait_for_the_device(variant: str, bare: bool, op: str) -> None:
    (case,) = (c for c in DELTA.cases.select("gpu", op) if c.name == "pack")
    inputs = case.make(DEVICE)
    matrix.trainable(variant, op, inputs)
    if bare:
        inputs = inputs._replace(kwargs={**inputs.kwargs, "cu_seqlens": inputs.kwargs["cu_seqlens"].cu_seqlens})
    want = matrix.execute(op, variant, inputs, grad=True)  # compiles
    grads = matrix.output_grads(want[0], 1)
    with no_waiting():
        matrix.execute(op, variant, inputs, grad=True, grads=grads)


@pytest.mark.parametrize("variant", TRITON)
@pytest.mark.parametrize("op", ["gated_delta", "kda"])
def test_graph_replays_the_same_bits(variant: str, op: str) -> None:
    (case,) = (c for c in DELTA.cases.select("gpu", op) if c.name == "gpu_pack")
    inputs, run = case.make(DEVICE), matrix.runner(op, variant)
    matrix.trainable(variant, op, inputs)
    with torch.no_grad():
        run(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(inputs)
        other = case.make(DEVICE, seed=1)
        for name, x in inputs.leaves().items():
            x.copy_(other.leaves()[name])
        graph.replay()
        matrix.same(captured, run(other), "a replayed graph")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "packed"), [("gated_delta", False), ("comba", True)])
def test_segments_are_proven(op: str, packed: bool, backward: bool) -> None:
    """The tuner's own proof, of segments short enough that every trial has several."""
    sizes = {"B": 1, "T": 4096, "H": 2, "HV": 4, "K": 128, "V": 128}
    key = key_of(op, sizes, profile(torch.device(DEVICE)), dtype="bfloat16", packed=packed, initial_state=True)
    variant = DELTA.recurrence.variant("chunk_triton")
    config: Any = variant.configs(key)[0]
    found = prove(DELTA.recurrence, variant, config._replace(SEG=64), key, torch.device(DEVICE), backward=backward)
    assert found.status == "ok", found.detail


@pytest.mark.parametrize("variant", TRITON)
def test_offsets_beyond_int32(variant: str) -> None:
    """More than 2^31 elements per tensor: the last sequence of a long pack equals that sequence alone (forward: gradients keep more)."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free device memory")
    length, N, H, D = 256, 2112, 32, 128
    pieces = make_inputs("gated_delta", Sizes(1, length, H, H, D, D), torch.bfloat16, DEVICE)
    whole = [x.repeat(1, N, *(1,) * (x.dim() - 2)) for x in pieces.args if x is not None]
    assert whole[0].numel() > 2**31
    handle = fd.op("gated_delta", mode=variant)
    with torch.no_grad():
        o, _ = handle(*whole, cu_seqlens=fd.SeqInfo.from_lengths([length] * N, DEVICE))
        want, _ = handle(*pieces.args)
    assert matrix.distance(o[:, -length:], want) <= tolerance(torch.bfloat16)
    torch.cuda.empty_cache()
