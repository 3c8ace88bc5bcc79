"""Delta rules on a GPU run what layers do before them in kernels, with and without gradients, and leave it to a compiler in a trace."""

from __future__ import annotations

from typing import Any

import delta_stress
import matrix
import pytest
import torch
from saved import kept_bytes

import fla_dispatch as fd
from fla_dispatch.kernels._shared.delta_contract import Gate
from fla_dispatch.kernels._shared.pair import fusable
from fla_dispatch.kernels.delta import transforms
from fla_dispatch.kernels.delta.cases import Inputs, Sizes, gradient_scales, make_inputs, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"

#: op, sizes, options beside raw input, slices of one projection.
CALLS: dict[str, tuple[str, Sizes, tuple[tuple[str, Any], ...], bool]] = {
    "delta": ("delta", Sizes(2, 1000, 3, 3, 64, 64), (("allow_neg_eigval", True),), True),
    "gated_delta": ("gated_delta", Sizes(2, 1000, 4, 8, 128, 64), (), True),
    "bounded": ("gated_delta", Sizes(1, 333, 2, 2, 64, 64), (("lower_bound", -5.0), ("A_log", None)), False),
    "kda": ("kda", Sizes(2, 1000, 4, 4, 128, 64), (), True),
    "kda_bounded": ("kda", Sizes(1, 333, 3, 3, 100, 64), (("lower_bound", -5.0),), False),
    "kda_many": ("kda", Sizes(4, 4096, 16, 16, 128, 128), (("allow_neg_eigval", True),), False),
    "comba": ("comba", Sizes(2, 1000, 4, 4, 128, 64), (), False),
    "delta_product": ("delta_product", Sizes(2, 500, 2, 4, 64, 64), (("num_householder", 3),), False),
}


def call(name: str, dtype: torch.dtype) -> tuple[str, Inputs]:
    op, sizes, options, fused = CALLS[name]
    return op, make_inputs(op, sizes, dtype, DEVICE, options=(("raw", True), *options), fused=fused)


def made(x: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, p, beta and g as the recurrence gets them (what is absent is left out), from the call's leaves."""
    y, n = x.leaves(), x.kwargs
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gate = Gate(y.get("A_log"), y.get("dt_bias"), n.get("lower_bound")) if "g" in y else None
    found = transforms.unit_rows(y["q"], y["k"], y.get("p"), wide)
    both = transforms.vectors(y["beta"], n.get("allow_neg_eigval", False), y.get("g"), gate, wide)
    return tuple(z for z in (*found, *both) if z is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_against_float64(name: str, dtype: torch.dtype) -> None:
    """Of the transforms by themselves; parameters' gradients are sums over tokens, of terms that do not agree with each other here."""
    _, x = call(name, dtype)
    names = [n for n in x.leaves() if n != "v"]
    leaves = {n: y.detach().requires_grad_() for n, y in x.leaves().items() if n != "v"}
    assert fusable(*leaves.values())
    with matrix.poisoned():
        outputs = made(x.replaced(leaves), dtype)
        arriving = [
            torch.randn(y.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(100 + i)).to(y.dtype)
            for i, y in enumerate(outputs)
        ]
        found = torch.autograd.grad(outputs, [leaves[n] for n in names], arriving)
    wide = {n: y.double().detach().requires_grad_() for n, y in leaves.items()}
    want = made(x.replaced(wide), torch.float64)
    others = torch.autograd.grad(want, [wide[n] for n in names], [y.double() for y in arriving])
    rounded = {torch.float32: 5e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    for y, z in zip((*outputs, *found), (*want, *others), strict=True):
        assert y.shape == z.shape and matrix.distance(y, z) < rounded[y.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in CALLS if n != "kda_many"])
def test_calls_with_kernels_and_with_torch_agree(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    op, x = call(name, dtype)
    used: list[bool] = []

    def seen(*tensors: torch.Tensor | None) -> bool:
        used.append(fusable(*tensors))
        return used[-1]

    monkeypatch.setattr(transforms, "fusable", seen)
    found, gradients = matrix.execute(op, "auto", x, grad=True)
    assert len(used) >= 2 and all(used)
    with torch.no_grad():
        used.clear()
        matrix.same(matrix.runner(op, "auto")(x), matrix.execute(op, "auto", x, grad=False)[0], "two runs")
        assert used and all(used)
    matrix.same(matrix.execute(op, "auto", x, grad=True)[1], gradients, "gradients of two runs")
    monkeypatch.setattr(transforms, "fusable", lambda *tensors: False)
    want, others = matrix.execute(op, "auto", x, grad=True)
    scales = gradient_scales(op, x, others)
    for n, y in found.items():
        assert matrix.distance(y, want[n].double()) < tolerance(dtype), n
    for n, y in gradients.items():
        assert matrix.distance(y, others[n].double(), scales.get(n)) < 2 * tolerance(dtype, "d"), n  # both err


@pytest.mark.parametrize("name", [n for n in delta_stress.STRESS if "-raw" in n])
def test_stress(name: str) -> None:
    delta_stress.check("auto", name, DEVICE, torch.float32, T=200)


@pytest.mark.parametrize("name", ["gated_delta", "kda"])
def test_less_is_held_than_torch_holds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kept for backward: the raw tensors and nothing else. At its worst: those outputs and gradients that a call has, and sums."""
    op, x = call(name, torch.bfloat16)
    raw = sum(y.numel() * y.element_size() for n, y in x.leaves().items() if n != "v")
    assert kept_bytes(op, x) <= max(raw, 3 * raw if CALLS[name][3] else raw)  # slices keep the projection that they are of
    peaks = []
    for kernels in (True, False):
        monkeypatch.setattr(transforms, "fusable", lambda *tensors, kernels=kernels: kernels)
        leaves = {n: y.detach().requires_grad_() for n, y in x.leaves().items() if n != "v"}
        torch.autograd.backward([y.sum() for y in made(x.replaced(leaves), torch.bfloat16)])
        leaves = {n: y.detach().requires_grad_() for n, y in x.leaves().items() if n != "v"}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = made(x.replaced(leaves), torch.bfloat16)
        arriving = [torch.ones_like(y) for y in outputs]
        torch.autograd.backward(outputs, arriving)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if kernels:
            sizes = sum(2 * y.numel() * y.element_size() for y in outputs) + raw
            assert peaks[0] <= 1.2 * sizes + 2**20, (peaks, sizes)
    assert peaks[0] < peaks[1], peaks


def test_a_trace_keeps_torch() -> None:
    op, x = call("gated_delta", torch.bfloat16)
    handle = fd.op(op)
    with torch.no_grad():
        want = handle(*x.args, **x.kwargs)[0]
        found = torch.compile(lambda: handle(*x.args, **x.kwargs)[0], fullgraph=True)()
    assert matrix.distance(found, want.double()) < tolerance(torch.bfloat16)
