"""mamba2 on a GPU runs its step sizes and its gate in kernels, with and without gradients, and leaves both to a compiler in a trace."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch

import fla_dispatch as fd
from fla_dispatch.kernels._shared.pair import fusable
from fla_dispatch.kernels.scalar_decay import ops
from fla_dispatch.kernels.scalar_decay.cases import Sizes, gradient_scales, make_inputs, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPTIONS: tuple[tuple[str, Any], ...] = (("gated", True), ("dt_limit", (0.002, 0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_and_torch_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = make_inputs("mamba2", Sizes(2, 1000, 1, 24, 64, 64), dtype, "cuda", options=OPTIONS)
    used: list[bool] = []

    def seen(*tensors: torch.Tensor | None) -> bool:
        used.append(fusable(*tensors))
        return used[-1]

    monkeypatch.setattr(ops, "fusable", seen)
    found, gradients = matrix.execute("mamba2", "auto", x, grad=True)
    assert used and all(used)
    with torch.no_grad():
        used.clear()
        matrix.same(matrix.runner("mamba2", "auto")(x), matrix.execute("mamba2", "auto", x, grad=False)[0], "two runs")
        assert used and all(used)
    monkeypatch.setattr(ops, "fusable", lambda *tensors: False)
    want, others = matrix.execute("mamba2", "auto", x, grad=True)
    scales = gradient_scales("mamba2", x, others)
    for name, y in found.items():
        assert matrix.distance(y, want[name].double()) < tolerance(dtype), name
    for name, y in gradients.items():
        assert matrix.distance(y, others[name].double(), scales.get(name)) < tolerance(dtype, "d"), name


def test_a_trace_keeps_torch() -> None:
    x = make_inputs("mamba2", Sizes(1, 128, 1, 4, 64, 64), torch.bfloat16, "cuda", options=OPTIONS)
    handle = fd.op("mamba2")
    with torch.no_grad():
        want = handle(*x.args, **x.kwargs)[0]
        found = torch.compile(lambda: handle(*x.args, **x.kwargs)[0], fullgraph=True)()
    assert matrix.distance(found, want.double()) < tolerance(torch.bfloat16)
