"""The inverses of `chunk_gluon` as Python on the CPU, against float64; and its whole call, with the other kernels interpreted."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_simulator import Schedule, simulated

from fla_dispatch import registry
from fla_dispatch.kernels._shared.token_cases import Sizes
from fla_dispatch.kernels.delta import MIN_LOG_DECAY, chunk_gluon, chunk_triton
from fla_dispatch.kernels.delta.cases import make_inputs
from fla_dispatch.kernels.delta.chunks import gluon_inverse
from fla_dispatch.kernels.delta.chunks.host import Call, prepare
from fla_dispatch.kernels.delta.configs import ChunkConfig

ROOM = registry.get_recurrence("delta")
CONFIG = ChunkConfig(64, 32, 2, 1)
CASES: dict[str, tuple[str, Sizes, dict[str, Any]]] = {
    "plain": ("delta", Sizes(1, 70, 1, 1, 64, 16), {}),
    "gated": ("gated_delta", Sizes(2, 130, 1, 2, 20, 16), {}),
    "strong": ("gated_delta", Sizes(1, 64, 1, 1, 32, 16), {"regime": "strong"}),
    "reset": ("gated_delta", Sizes(1, 64, 1, 1, 32, 16), {"regime": "reset"}),
    "early_pack": ("comba", Sizes(1, 195, 2, 2, 16, 16), {"lengths": (0, 1, 2, 63, 64, 65)}),
}


def call_of(name: str, dtype: torch.dtype) -> tuple[Any, Any, Call]:
    op, sizes, kwargs = CASES[name]
    inputs = make_inputs(op, sizes, dtype, **kwargs)
    low = registry.get_op(op).contract(*inputs.args, **inputs.kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    return tensors, low.options, prepare(tensors, low.options, CONFIG)


def expected(c: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse and scores of every chunk in float64, and cumulative log2 decays."""
    bounds = [0, c.T] if c.cu is None else c.cu.tolist()
    inverse, scores = (torch.zeros(c.HV, c.B * c.T, 64, dtype=torch.float64) for _ in range(2))
    gates = torch.zeros(c.HV, c.B * c.T, dtype=torch.float64)
    for b in range(c.B):
        for begin, end in itertools.pairwise(bounds):
            for start in range(begin, end, 64):
                here = slice(start, min(start + 64, end))
                for hv in range(c.HV):
                    h = hv // (c.HV // c.H)
                    q, k = c.q[b, here, h].double(), c.k[b, here, h].double()
                    p = k if c.p is None else c.p[b, here, h].double()
                    n = len(q)
                    G = E = torch.zeros(n, dtype=torch.float64)
                    if c.g is not None:
                        g = c.g[b, here, hv].double().clamp_min(MIN_LOG_DECAY)
                        G = g.cumsum(0)
                        E = G - g if c.same["EARLY"] else G
                    L = c.beta[b, here, hv].double()[:, None] * ((p @ k.T) * (E[:, None] - G[None, :]).exp()).tril(-1)
                    rows = slice(b * c.T + here.start, b * c.T + here.stop)
                    inverse[hv, rows, :n] = torch.linalg.inv(torch.eye(n, dtype=torch.float64) + L)
                    scores[hv, rows, :n] = c.scale * ((q @ k.T) * (G[:, None] - G[None, :]).exp()).tril()
                    gates[hv, rows] = G / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return inverse, scores, gates


def check(name: str, dtype: torch.dtype, late: bool, scores: bool = True) -> None:
    _, _, c = call_of(name, dtype)
    with simulated(Schedule(late)) as seen, torch.no_grad():
        found = gluon_inverse.run_inverse(c, scores)
    assert seen == ["gluon_inverse"]
    assert (found[1] is None) == (not scores) and (found[2] is None) == (c.g is None)
    bound = 2e-3 if dtype == torch.float16 else 8e-3  # half a unit in the last place of what is stored, times a few
    for x, y, allowed in zip(found, expected(c), (bound, bound, 1e-6), strict=True):
        if x is not None:
            error = float((x.double() - y).norm() / y.norm().clamp_min(1e-30))
            assert error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, late=dtype == torch.bfloat16, scores=name != "strong")


def test_precision() -> None:
    """Repeated keys and beta of 2: powers of L reach 1e9, the inverse 2. A product of single tf32 terms fails this."""
    _, _, c = call_of("plain", torch.float16)
    c.k.copy_(torch.nn.functional.normalize(torch.ones_like(c.k) + 0.01 * torch.randn(c.k.shape), dim=-1))
    c.beta.fill_(2.0)
    with simulated(Schedule()), torch.no_grad():
        found, _, _ = gluon_inverse.run_inverse(c, False)
    want = expected(c)[0]
    assert float((found.double() - want).norm() / want.norm()) <= 1e-3


def test_every_synchronisation_is_needed(tmp_path: Path) -> None:
    """Without any one of its fences and barriers before products the kernel fails here."""
    lines = Path(gluon_inverse.__file__).read_text(encoding="utf-8").splitlines()
    places = [i for i, line in enumerate(lines) if line.strip() in ("fence_async_shared()", "barrier()")]
    assert len(places) == 2
    for i in places:
        path = tmp_path / f"mutant_{i}.py"
        path.write_text("\n".join([*lines[:i], "    pass", *lines[i + 1 :]]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{gluon_inverse.__package__}.mutant_{i}", path)
        assert spec is not None and spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mutant)
        with pytest.raises(AssertionError), simulated(Schedule()):
            mutant.run_inverse(call_of("plain", torch.float16)[2], True)


def test_whole_call() -> None:
    """Outputs and gradients equal those of chunk_triton up to the inverses' rounding."""
    tensors, options, _ = call_of("gated", torch.float16)
    calls = []
    with simulated(Schedule()) as seen, torch.no_grad():
        for module in (chunk_triton, chunk_gluon):
            out = ROOM.outputs(*module.forward(CONFIG, tensors, options))
            grads = ROOM.output_grads(torch.ones_like(out.o), None)
            wanted = tuple(getattr(tensors, name) is not None for name in ROOM.differentiable)
            calls.append((out.o, *module.backward(CONFIG, ROOM.residuals(tensors, out, options), grads, options, wanted)))
    assert seen == ["gluon_inverse"] * 2
    for x, y in zip(*calls, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert float((x.double() - y.double()).norm() / x.double().norm()) <= 2e-3
