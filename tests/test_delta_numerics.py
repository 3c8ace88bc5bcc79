"""The delta room where arithmetic is hard: repeated keys, no gates, gates of -20, long keys, saturated logits; on a CPU."""

from __future__ import annotations

import delta_stress
import matrix
import pytest
import torch
from rooms import DELTA

from fla_dispatch.kernels.delta import pairs
from fla_dispatch.kernels.delta.cases import Sizes, gradient_scales, make_inputs, tolerance
from fla_dispatch.kernels.delta.transforms import sigmoid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", delta_stress.STRESS)
@pytest.mark.parametrize("variant", DELTA.variants("torch"))
def test_values_and_every_gradient(variant: str, name: str, dtype: torch.dtype) -> None:
    delta_stress.check(variant, name, "cpu", dtype)


@pytest.mark.parametrize("name", [name for name in delta_stress.STRESS if name.endswith(("repeated", "alternating", "strong_long_keys"))])
def test_over_many_chunks(name: str) -> None:
    delta_stress.check("chunk_torch", name, "cpu", T=500)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("early", [False, True])
def test_no_exponential_of_a_positive_sum(channels: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exponent that pairs of tokens take is <= 0, whatever the gates."""
    seen = []
    real = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: (seen.extend(x.amax().view(1).tolist() if x.numel() else ()), real(x))[1])
    g = -40 * torch.rand(2, 70, channels) * (torch.rand(2, 70, channels) < 0.5)
    a, b, X = torch.randn(2, 70, 5), torch.randn(2, 70, 5), torch.randn(2, 70, 70)
    x = pairs.gates(g, strict=early, early=early)
    found = (pairs.pairs(a, b, x), pairs.rows(X, b, x), pairs.columns(X, a, x))
    assert seen and max(seen) <= 0 and all(y.isfinite().all() for y in found)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(("strict", "early"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("C", [1, 15, 16, 17, 64])
def test_pairs_are_their_definition(channels: int, strict: bool, early: bool, C: int) -> None:
    g = -3 * torch.rand(2, C, channels, dtype=torch.float64)
    a, b, X = (torch.randn(2, C, n, dtype=torch.float64) for n in (5, 5, C))
    G = g.cumsum(1)
    L = torch.zeros(2, C, C, 5, dtype=torch.float64)
    for t in range(C):
        for s in range(t if strict else t + 1):
            L[:, t, s] = (G[:, t] - (g[:, t] if early else 0) - G[:, s]).exp()
    x = pairs.gates(g, strict=strict, early=early)
    torch.testing.assert_close(pairs.pairs(a, b, x), torch.einsum("ntc,nsc,ntsc->nts", a, b, L))
    torch.testing.assert_close(pairs.rows(X, b, x), torch.einsum("nts,nsc,ntsc->ntc", X, b, L))
    torch.testing.assert_close(pairs.columns(X, a, x), torch.einsum("nts,ntc,ntsc->nsc", X, a, L))


def test_a_saturated_logit_keeps_the_digits_of_its_gradient() -> None:
    for value in (-80.0, -12.0, 0.0, 12.0, 30.0):
        x = torch.tensor(value, requires_grad=True)
        (slope,) = torch.autograd.grad(sigmoid(x), x)
        wide = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(slope.double(), torch.sigmoid(wide) * torch.sigmoid(-wide), rtol=2e-5, atol=0)
        torch.testing.assert_close(sigmoid(x).double(), torch.sigmoid(wide), rtol=2e-5, atol=0)


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("op", ["gated_delta", "kda"])
def test_gradients_of_parameters_are_judged_by_what_they_sum(op: str, bound: float | None) -> None:
    """Of few heads they may cancel, by two digits among these seeds, and their errors do not shrink with them: those are of the gates'
    gradients that are summed, each of which holds the errors of all other tokens. The scale stays within two digits of what is judged."""
    ratios, relative, by_norm = [], [], []
    for seed in range(6):
        x = make_inputs(
            op, Sizes(2, 66, 1, 2, 32, 16), seed=seed, options=(("raw", True), ("lower_bound", bound)), initial_state=True, final_state=True
        )
        _, want, grads = matrix.oracle(op, x, grad=True)
        _, found = matrix.execute(op, "chunk_torch", x, grad=True, grads=grads)
        scales = gradient_scales(op, x, want)
        assert set(scales) == {"A_log", "dt_bias"}
        for name, scale in scales.items():
            norm = want[name].norm().item()
            assert scale >= norm * (1 - 1e-12)
            ratios.append(scale / norm)
            relative.append(matrix.distance(found[name], want[name], scale))
            by_norm.append(matrix.distance(found[name], want[name]))
    assert max(relative) < 0.5 * tolerance(torch.float32, "dg") and max(relative) < 0.5 * max(by_norm)
    assert sorted(ratios)[len(ratios) // 2] < 30, ratios
