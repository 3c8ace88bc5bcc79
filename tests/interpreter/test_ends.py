"""What mamba2 does around its recurrence, in kernels: values and gradients against torch in float64, interpreted."""

from __future__ import annotations

import math
from typing import Any

import matrix
import pytest
import torch

from fla_dispatch.errors import DoubleBackwardError
from fla_dispatch.kernels._shared import pair
from fla_dispatch.kernels.scalar_decay import ops
from fla_dispatch.kernels.scalar_decay.ends import pairs

INF = math.inf


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def against(found: Any, want: Any, inputs: list[torch.Tensor | None], dtype: torch.dtype, tolerance: float = 2e-6) -> None:
    """Outputs and gradients, of inputs in float32 or half precision and of the same in float64."""
    mine = [None if x is None else x.clone().requires_grad_() for x in inputs]
    wide = [None if x is None else x.double().requires_grad_() for x in inputs]
    results = []
    for outputs, leaves in ((found(*mine), mine), (want(*wide), wide)):
        for_each = [made(*x.shape, seed=i).to(x.dtype) for i, x in enumerate(outputs)]
        results.append((*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], for_each)))
    rounded = {torch.float32: tolerance, torch.float16: 2.0**-11}
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all() and matrix.distance(x, y) < rounded[x.dtype], dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "bias", "softplus", "limits"),
    [
        ((2, 37, 5), True, True, None),
        ((1, 200, 64), False, True, (0.3, 0.9)),
        ((3, 1, 2), True, False, (0.0, INF)),
        ((1, 3, 2100), True, True, (0.01, INF)),
    ],
)
def test_steps(shape: tuple[int, int, int], bias: bool, softplus: bool, limits: tuple[float, float] | None, dtype: torch.dtype) -> None:
    dt = made(*shape, seed=1, dtype=dtype) * 3
    inputs = [dt, -made(shape[-1], seed=2).exp(), made(shape[-1], seed=3) if bias else None]
    against(
        lambda *x: pair.apply(pairs.steps(softplus, limits), *x),
        lambda *x: ops.step_sizes(*x, softplus, limits, torch.float64),
        inputs,
        dtype,
    )


def test_steps_of_any_layout_and_size() -> None:
    """dt as a slice of a projection; steps that are tiny, and inputs at which an exponential would overflow."""
    whole = made(2, 9, 20, seed=4)
    whole[0, 0, 7:10] = torch.tensor([-80.0, 100.0, 1e4])
    dt, A = whole[..., 7:15], -torch.ones(8)
    assert not dt.is_contiguous()
    d, g = pair.apply(pairs.steps(True, None), dt, A, None)
    want = torch.nn.functional.softplus(dt.double())
    assert ((d - want).abs() <= 4e-7 * want).all() and torch.equal(g, -d) and d.is_contiguous()
    leaf = dt.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pair.apply(pairs.steps(True, None), leaf, A, None)[0].sum(), [leaf])  # g has no gradient
    assert matrix.distance(gradient, torch.sigmoid(dt.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 20), (1, 3, 4, 300), (2, 1, 1, 1)])
def test_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs: list[torch.Tensor | None] = [made(*shape, seed=1, dtype=dtype), made(*shape, seed=2, dtype=dtype) * 4]
    against(
        lambda o, z: pair.apply(pairs.gate(dtype), o, z),
        lambda o, z: (o * torch.nn.functional.silu(z),),
        inputs,
        dtype,
    )


def test_gate_of_a_slice_and_extremes() -> None:
    whole = made(2, 4, 3, 2 * 8, seed=3).flatten(2).unflatten(2, (6, 8))
    z = whole[:, :, 3:]
    z[0, 0, 0, :3] = torch.tensor([-1e4, 1e4, -100.0])
    (y,) = pair.apply(pairs.gate(torch.float32), torch.ones(2, 4, 3, 8), z)
    assert matrix.distance(y, torch.nn.functional.silu(z.double())) < 1e-6 and y.isfinite().all()
    leaf = z.clone().requires_grad_()
    (y,) = pair.apply(pairs.gate(torch.float32), torch.ones(2, 4, 3, 8), leaf)
    (dz,) = torch.autograd.grad(y, [leaf], torch.ones(()).expand(2, 4, 3, 8))
    assert dz.isfinite().all() and dz[0, 0, 0, 1] == 1 and dz[0, 0, 0, 0] == 0


def test_only_what_is_wanted_and_once() -> None:
    o, z = made(1, 2, 1, 4, seed=1), made(1, 2, 1, 4, seed=2).requires_grad_()
    (y,) = pair.apply(pairs.gate(torch.float32), o, z)
    with pytest.raises(DoubleBackwardError, match="mamba2"):
        torch.autograd.grad(y.sum(), [z], create_graph=True)
    with torch.no_grad():
        assert not pair.apply(pairs.gate(torch.float32), o, z)[0].requires_grad


def test_an_op_with_them_is_the_op_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of mamba2 with kernels around the recurrence, against itself with torch there."""
    from fla_dispatch.kernels.scalar_decay.cases import Sizes, make_inputs

    x = make_inputs("mamba2", Sizes(2, 70, 1, 4, 20, 36), options=(("gated", True), ("dt_limit", (0.002, 0.5))))
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(ops, "fusable", lambda *tensors, kernels=kernels: kernels)
        outputs, gradients = matrix.execute("mamba2", "sweep_triton", x, grad=True)
        results.append({**outputs, **{f"d{name}": y for name, y in gradients.items()}})
    first, second = results
    assert first.keys() == second.keys() and {"o", "ddt", "dA", "ddt_bias", "dz"} <= first.keys()
    scales = {f"d{name}": scale for name, scale in matrix.gradient_scales("mamba2", x, gradients).items()}
    for name, y in first.items():
        assert matrix.distance(second[name], y.double(), scales.get(name)) < 2e-6, name
