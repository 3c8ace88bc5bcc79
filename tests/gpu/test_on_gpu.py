"""op x variant x case on a GPU at real sizes, and what only a GPU shows: graphs, hidden waits, recompiles, 64-bit offsets."""

from __future__ import annotations

import matrix
import pytest
import torch
from waiting import no_waiting

import fla_dispatch as fd
from fla_dispatch.kernels.scalar_decay.cases import Case, Inputs, Sizes, make_inputs, select, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TRITON = [*matrix.variants("triton"), *matrix.variants("gluon")]
DEVICE = "cuda"


def chosen(case: Case) -> bool:
    """All sizes for a GPU, and of the small ones (head dims, packs, edges) those of one op: ops share kernels, compiling takes time."""
    return case.name.startswith("gpu_") or case.op == "simple_gla" or case.name in ("d80", "group2", "pack", "bf16", "bf16_normalized")


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", [*TRITON, "auto"], chosen))
def test_values(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", ["chunk_torch"], lambda c: c.name in ("gpu_group", "gpu_pack", "bf16")))
def test_values_in_torch(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", ["reference"], lambda c: c.name in ("pack", "group2", "bf16")))
def test_values_of_the_reference(variant: str, case: Case) -> None:
    matrix.check_values(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, matrix.has("partial")))
def test_partial_gradients(variant: str, case: Case) -> None:
    if case.op == "simple_gla" or case.name == "gpu_group":
        matrix.check_partial_gradients(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, lambda c: c.name == "gpu_group"))
def test_two_halves_equal_the_whole(variant: str, case: Case) -> None:
    matrix.check_halves(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, lambda c: c.name == "gpu_pack"))
def test_pack_equals_one_by_one(variant: str, case: Case) -> None:
    matrix.check_pack(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, lambda c: c.name.startswith("gpu_") and "repeat" in c.tags))
def test_same_bits_every_time(variant: str, case: Case) -> None:
    matrix.check_repeat(variant, case, DEVICE, runs=10)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, lambda c: c.name.startswith("gpu_") and "causal" in c.tags))
def test_causal(variant: str, case: Case) -> None:
    matrix.check_causal(variant, case, DEVICE)


@pytest.mark.parametrize(("variant", "case"), matrix.pairs("gpu", TRITON, lambda c: c.name == "group2"))
def test_autocast(variant: str, case: Case) -> None:
    matrix.check_autocast(variant, case, DEVICE)


def test_some_triton_variant_takes_every_case() -> None:
    assert not matrix.cases_refused_by_all("gpu", TRITON, DEVICE, grad=True)


def _named(name: str, op: str = "simple_gla") -> Case:
    (case,) = (c for c in select("gpu", op) if c.name == name)
    return case


@pytest.mark.parametrize("variant", [*TRITON, "chunk_torch", "auto"])
@pytest.mark.parametrize("bare", [False, True], ids=["SeqInfo", "tensor"])
def test_packs_never_wait_for_the_device(variant: str, bare: bool) -> None:
    case = _named("pack")
    inputs = case.make(DEVICE)
    if bare:
        inputs = Inputs(inputs.args, {**inputs.kwargs, "cu_seqlens": inputs.kwargs["cu_seqlens"].cu_seqlens})
    grad = matrix.trainable(variant, case.op, inputs)
    want = matrix.execute(case.op, variant, inputs, grad=grad)  # compiles, builds constants
    grads = matrix.output_grads(want[0], 1)
    with no_waiting():
        matrix.execute(case.op, variant, inputs, grad=grad, grads=grads)


@pytest.mark.parametrize("variant", TRITON)
@pytest.mark.parametrize("op", ["retention", "simple_gla", "mamba2"])
def test_graph_replays_the_same_bits(variant: str, op: str) -> None:
    case = _named("gpu_pack", op)
    inputs = case.make(DEVICE)
    matrix.trainable(variant, op, inputs)
    run = matrix.runner(op, variant)
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


@pytest.mark.parametrize("variant", TRITON)
def test_lengths_never_recompile(variant: str) -> None:
    """One compiled kernel per config serves every length of a bucket, odd or a multiple of 16, and every batch."""
    from triton import knobs

    compiled = []
    handle = fd.op("simple_gla", mode=variant)

    def step(B: int, T: int) -> None:
        inputs = make_inputs("simple_gla", Sizes(B, T, 2, 2, 64, 64), torch.bfloat16, DEVICE)
        matrix.execute("simple_gla", variant, inputs, grad=not matrix.refusals(variant, "simple_gla", inputs, grad=True))

    assert handle.mode == variant
    step(2, 65)
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["repr"])
    try:
        for B, T in ((2, 66), (2, 80), (2, 127), (2, 128), (3, 101), (16, 96), (1, 112)):
            step(B, T)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled, compiled


@pytest.mark.parametrize("variant", TRITON)
def test_offsets_beyond_int32(variant: str) -> None:
    """More than 2^31 elements per tensor: the last sequence of a long pack equals that sequence alone."""
    if torch.cuda.mem_get_info()[0] < 90 << 30:
        pytest.skip("needs 90 GiB of free device memory")
    length, N, H, D = 2048, 264, 32, 128
    pieces = make_inputs("simple_gla", Sizes(1, length, H, H, D, D), torch.bfloat16, DEVICE)
    whole = [x.repeat(1, N, *(1,) * (x.dim() - 2)).requires_grad_() for x in pieces.args]
    assert whole[0].numel() > 2**31
    info = fd.SeqInfo.from_lengths([length] * N, DEVICE)
    handle = fd.op("simple_gla", mode=variant)
    if matrix.refusals(variant, "simple_gla", Inputs(tuple(whole), {"cu_seqlens": info}), grad=True):
        pytest.skip("no backward")
    alone = [x.clone().requires_grad_() for x in pieces.args]
    o, _ = handle(*whole, cu_seqlens=info)
    want, _ = handle(*alone)
    assert matrix.distance(o[:, -length:], want) <= tolerance(torch.bfloat16)
    weight = torch.randn_like(want)
    found = torch.autograd.grad(o, whole, weight.repeat(1, N, 1, 1))
    del o
    for x, y in zip(found, torch.autograd.grad(want, alone, weight), strict=True):
        assert matrix.distance(x[:, -length:], y) <= 2 * tolerance(torch.bfloat16, "dq")
    torch.cuda.empty_cache()
