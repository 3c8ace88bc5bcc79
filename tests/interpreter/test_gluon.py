"""sweep_gluon as Python on the CPU, with its Triton companions interpreted: values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_simulator import simulated

from fla_dispatch import registry
from fla_dispatch.kernels.scalar_decay import reference, sweep_gluon
from fla_dispatch.kernels.scalar_decay.cases import Sizes, gate_gradient_scale, make_inputs, tolerance
from fla_dispatch.kernels.scalar_decay.configs import GluonConfig

ROOM = registry.get_recurrence("scalar_decay")
CASES: dict[str, tuple[str, Sizes, dict[str, Any]]] = {
    "none": ("linear_attn", Sizes(1, 130, 2, 2, 64, 64), {}),
    "constant": ("retention", Sizes(2, 130, 2, 2, 32, 72), {"initial_state": True, "final_state": True}),
    "one_token": ("retention", Sizes(2, 1, 1, 1, 16, 16), {"initial_state": True, "final_state": True}),
    "token": ("simple_gla", Sizes(1, 197, 1, 2, 64, 128), {"initial_state": True, "final_state": True}),
    "strong": ("simple_gla", Sizes(1, 131, 1, 1, 64, 64), {"regime": "strong"}),
    "reset": ("simple_gla", Sizes(1, 131, 1, 1, 64, 64), {"regime": "reset"}),
    "pack": ("simple_gla", Sizes(1, 197, 2, 2, 64, 64), {"lengths": [0, 1, 64, 65, 0, 67], "initial_state": True, "final_state": True}),
    "weights": ("mamba2", Sizes(1, 131, 1, 2, 64, 64), {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    op, sizes, kwargs = CASES[name]
    inputs = make_inputs(op, sizes, dtype, **kwargs)
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    wide = type(tensors)(*[x.double() if x is not None and x.is_floating_point() else x for x in tensors])
    want = ROOM.outputs(*reference.forward(None, wide, low.options))
    grads = ROOM.output_grads(
        torch.randn_like(want.o).to(dtype), torch.randn_like(want.state).float() if low.options.final_state else None, None
    )
    wanted = tuple(getattr(tensors, field) is not None for field in ROOM.differentiable)
    exact = ROOM.output_grads(*[None if x is None else x.double() for x in grads])
    truth = reference.backward(None, ROOM.residuals(wide, want, low.options), exact, low.options, wanted)
    config = GluonConfig(64, 4, 2)
    with simulated() as seen, torch.no_grad():
        found = ROOM.outputs(*sweep_gluon.forward(config, tensors, low.options))
        gradients = sweep_gluon.backward(config, ROOM.residuals(tensors, found, low.options), grads, low.options, wanted)
    assert seen == ["gluon_sweep"] * 4
    close(found.o, want.o, tolerance(dtype))
    if low.options.final_state:
        close(found.state, want.state, tolerance(dtype))
    for field, x, y in zip(ROOM.differentiable, gradients, truth, strict=True):
        if y is not None:
            scale = gate_gradient_scale(y, wide.q, truth[0]) if field == "g" else None
            close(x, y, tolerance(dtype, f"d{field}"), scale)


def close(x: torch.Tensor | None, y: torch.Tensor, bound: float, scale: float | None = None) -> None:
    assert x is not None and x.shape == y.shape
    error = float((x.double() - y).norm() / max(float(y.norm()) if scale is None else scale, 1e-30))
    assert error <= bound, f"error {error:.1e}, allowed {bound:.1e}"
