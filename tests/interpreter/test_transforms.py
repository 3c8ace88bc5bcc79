"""What layers do before a delta rule, in kernels: values and gradients against torch in float64, interpreted."""

from __future__ import annotations

from typing import Any

import delta_stress
import matrix
import pytest
import torch
from saved import kept_bytes

from fla_dispatch.errors import DoubleBackwardError
from fla_dispatch.kernels._shared.delta_contract import Gate
from fla_dispatch.kernels.delta import transforms
from fla_dispatch.kernels.delta.cases import Sizes, make_inputs

DTYPES = [torch.float32, torch.float16]
Tensors = tuple[torch.Tensor | None, ...]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the place of torch on the interpreter's CPU, but for float64."""
    monkeypatch.setattr(transforms, "fusable", lambda *tensors: True)


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor | None) -> Tensors:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return tuple(x for x in transforms.unit_rows(q, k, p, wide) if x is not None)


def against(function: Any, inputs: list[torch.Tensor | None], tolerance: float = 2e-6) -> None:
    """Outputs and gradients, of inputs as they are and of the same in float64, from memory that held NaN."""
    mine = [None if x is None else x.detach().requires_grad_() for x in inputs]
    wide = [None if x is None else x.double().detach().requires_grad_() for x in inputs]
    results = []
    for leaves in (mine, wide):
        with matrix.poisoned():
            outputs = function(*leaves)
            arriving = [
                made(*x.shape, seed=100 + i).to(mine[0].dtype if x.dtype == torch.float16 else x.dtype) for i, x in enumerate(outputs)
            ]
            results.append((*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], arriving)))
    rounded = {torch.float32: tolerance, torch.float16: 2.0**-11}
    for x, y in zip(*results, strict=True):
        assert x.shape == y.shape and x.isfinite().all() and matrix.distance(x, y) < rounded[x.dtype], (x.dtype, matrix.distance(x, y))


# ---- rows ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "n", "removal"),
    [
        (2, 37, 3, 20, 1, False),
        (1, 9, 2, 100, 1, True),
        (3, 1, 1, 128, 1, True),
        (2, 7, 2, 16, 3, False),
        (1, 3, 1, 300, 1, False),
        (1, 5, 2, 3, 2, False),
    ],
)
def test_rows(B: int, T: int, H: int, K: int, n: int, removal: bool, dtype: torch.dtype) -> None:
    q, k, p = (
        made(B, T, H, K, seed=1, dtype=dtype),
        3 * made(B, T * n, H, K, seed=2, dtype=dtype),
        made(B, T * n, H, K, seed=3, dtype=dtype),
    )
    against(norms, [q, k, p if removal else None])


def test_slices_of_one_projection() -> None:
    """Heads side by side at the stride of a wider row; rows of no regular stride are copied."""
    whole = made(2, 11, 3 * 2 * 20, seed=1)
    q, k, p = whole.unflatten(2, (3, 2, 20)).unbind(2)
    assert not q.is_contiguous()
    against(norms, [q, k, p])
    against(norms, [made(2, 2, 11, 20, seed=2).transpose(1, 2), k, made(1, 1, 1, 20, seed=3).expand(2, 11, 2, 20)])


def test_rows_of_zeros_and_extremes() -> None:
    q = made(1, 6, 1, 20, seed=1)
    q[0, 0], q[0, 1], q[0, 2], q[0, 3] = 0, 1e-5 * q[0, 1], 1e4 * q[0, 2], 1e-20
    against(norms, [q, q.flip(1), None])
    (zero, _) = norms(q, q, None)
    assert torch.equal(zero[0, 0], torch.zeros(1, 20))


@pytest.mark.parametrize("T", [0, 1])
def test_no_tokens_or_one(T: int) -> None:
    against(norms, [made(2, T, 1, 16, seed=i) for i in range(2)] + [None])
    b, g, A_log, bias = made(2, T, 3, seed=1), made(2, T, 3, 20, seed=2), made(3, seed=3), made(3, 20, seed=4)
    against(gates(True, True, None), [b, g, A_log, bias])
    against(gates(True, True, None), [b, g[..., 0], A_log, bias[:, 0]])


# ---- weights and gates ----


def gates(logits: bool, doubled: bool, bound: float | None) -> Any:
    """(logits, raw, A_log, dt_bias) -> what there is of (beta, g)."""

    def function(b: torch.Tensor | None, g: torch.Tensor | None, A_log: torch.Tensor | None, bias: torch.Tensor | None) -> Tensors:
        some = g if b is None else b
        assert some is not None
        wide = torch.float64 if some.dtype == torch.float64 else torch.float32
        gate = None if g is None else Gate(A_log, bias, bound)
        return tuple(x for x in transforms.vectors(b if logits else None, doubled, g, gate, wide) if x is not None)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize(
    ("shape", "n", "rate", "bias"),
    [
        ((2, 37, 5), 1, True, True),
        ((1, 200, 64), 2, True, True),
        ((3, 1, 1), 1, True, False),
        ((1, 3, 1100), 1, True, True),
        ((2, 37, 3, 20), 1, True, True),
        ((1, 5, 2, 100), 1, True, False),
        ((1, 40, 5, 128), 1, True, True),
        ((2, 9, 2, 16), 1, False, True),
        ((2, 9, 4), 1, False, False),
    ],
)
def test_weights_and_gates(shape: tuple[int, ...], n: int, rate: bool, bias: bool, bound: float | None, dtype: torch.dtype) -> None:
    if not rate and bound is None:
        pytest.skip("softplus has a rate")
    B, T, HV = shape[:3]
    inputs = [
        made(B, T * n, HV, seed=1, dtype=dtype) * 3,
        made(*shape, seed=2, dtype=dtype) * 3,
        made(HV, seed=3) if rate else None,
        made(*shape[2:], seed=4) if bias else None,
    ]
    against(gates(True, n > 1, bound), inputs)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_one_without_the_other(bound: float | None) -> None:
    b, A_log = made(2, 9, 4, seed=1), made(4, seed=3)
    against(gates(True, False, None), [b, None, None, None])
    against(gates(False, False, bound), [None, made(2, 9, 4, seed=2), A_log, made(4, seed=4)])
    against(gates(False, False, bound), [None, made(2, 9, 4, 20, seed=2), A_log, made(4, 20, seed=4)])


def test_parameters_in_half_precision_and_any_layout() -> None:
    """Weights and gates as slices of a projection, of any strides; dt_bias and A_log in the inputs' dtype."""
    whole = made(2, 9, 5 * 20 + 10, seed=4, dtype=torch.float16)
    b, scalar, g = whole[..., :5], whole[..., 1:10:2], whole[..., 10:].unflatten(2, (5, 20))
    assert not (b.is_contiguous() or scalar.is_contiguous() or g.is_contiguous())
    A_log, bias = made(5, seed=5, dtype=torch.float16), made(5, 20, seed=6, dtype=torch.float16)
    against(gates(True, False, None), [b, g, A_log, bias])
    against(gates(True, True, -3.0), [b, scalar, A_log, bias[:, 3]])
    against(
        gates(True, True, None),
        [b.transpose(0, 1).contiguous().transpose(0, 1), g.transpose(2, 3).contiguous().transpose(2, 3), A_log, bias],
    )


@pytest.mark.parametrize("bound", [None, -5.0])
def test_saturated(bound: float | None) -> None:
    """Each element by itself: a gradient keeps its digits where its function is all but flat, and nothing overflows."""
    values = torch.tensor([-1e4, -60.0, -30.0, -12.0, -1.0, 0.0, 1e-3, 12.0, 30.0, 60.0, 1e4])
    b, g = values.view(1, -1, 1), values.flip(0).view(1, -1, 1)
    A_log = torch.zeros(1)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (b, g, A_log)]
        outputs = gates(True, False, bound)(*leaves, None)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])])
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all() and ((x - y).abs() <= 1e-5 * y.abs() + 1e-30).all(), (x, y)


def test_gradients_are_summed_alike_in_every_run() -> None:
    b, g, A_log, bias = made(3, 2000, 5, seed=1), made(3, 2000, 5, seed=2), made(5, seed=3), made(5, seed=4)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (b, g, A_log, bias)]
        outputs = gates(True, False, None)(*leaves)
        runs.append(torch.autograd.grad(outputs, leaves, [made(*x.shape, seed=7) for x in outputs]))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    against(gates(True, False, None), [b, g, A_log, bias])


# ---- what is kept and what has a gradient ----


def test_only_what_is_wanted_and_once() -> None:
    q, k = made(1, 4, 1, 20, seed=1).requires_grad_(), made(1, 4, 1, 20, seed=2)
    units = norms(q, k, None)
    assert [x.requires_grad for x in units] == [True, False]
    with pytest.raises(DoubleBackwardError, match="delta"):
        torch.autograd.grad(units[0].sum(), [q], create_graph=True)
    b, g, A_log = made(1, 4, 2, seed=1), made(1, 4, 2, seed=2), made(2, seed=3)
    for leaf, needed in ((b, [True, False]), (g, [False, True]), (A_log, [False, True])):
        leaf.requires_grad_()
        outputs = gates(True, False, None)(b, g, A_log, None)
        assert [x.requires_grad for x in outputs] == needed
        (alone,) = torch.autograd.grad(outputs[needed.index(True)].sum(), [leaf])
        assert alone.isfinite().all() and alone.shape == leaf.shape
        leaf.requires_grad_(False)
    both = [x.requires_grad_() for x in (b, g)]
    assert torch.autograd.grad(gates(True, False, None)(*both, A_log, None)[0].sum(), both, allow_unused=True)[1] is None
    with torch.no_grad():
        assert not any(x.requires_grad for x in norms(q, k, None))


@pytest.mark.parametrize("op", ["gated_delta", "kda", "comba", "delta_product"])
def test_less_is_kept_for_backward_than_torch_keeps(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(op, Sizes(2, 50, 2, 4, 32, 16), torch.float16, options=(("raw", True),))
    held = {}
    for name in (True, False):
        monkeypatch.setattr(transforms, "fusable", lambda *tensors, name=name: name)
        held[name] = kept_bytes(op, x)
    raw = sum(y.numel() * y.element_size() for name, y in x.leaves().items() if name != "v")
    assert held[True] <= raw < held[False], (held, raw)


# ---- an op with them ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("gated_delta", ()),
        ("gated_delta", (("lower_bound", -5.0), ("A_log", None))),
        ("kda", (("allow_neg_eigval", True),)),
        ("kda", (("lower_bound", -5.0),)),
        ("comba", ()),
        ("delta_product", (("num_householder", 3),)),
        ("delta", ()),
    ],
)
def test_an_op_with_them_is_the_op_without(op: str, options: tuple[Any, ...], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(op, Sizes(2, 30, 1, 2, 20, 36), fused=fused, options=(("raw", True), *options), initial_state=True, final_state=True)
    results, used = [], []
    for kernel in (False, True):
        monkeypatch.setattr(transforms, "fusable", lambda *tensors, kernel=kernel: used.append(kernel) or kernel)
        outputs, gradients = matrix.execute(op, "chunk_torch", x, grad=True)
        results.append({**outputs, **{f"d{name}": y for name, y in gradients.items()}})
    first, second = results
    assert True in used and first.keys() == second.keys() and {"o", "dq", "dk", "dbeta"} <= first.keys()
    scales = {f"d{name}": scale for name, scale in matrix.gradient_scales(op, x, gradients).items()}
    for name, y in first.items():
        assert matrix.distance(second[name], y.double(), scales.get(name)) < 1e-5, name


@pytest.mark.parametrize("name", [name for name in delta_stress.STRESS if "-raw" in name])
def test_stress(name: str) -> None:
    delta_stress.check("chunk_torch", name, "cpu")


def test_float64_and_wide_heads_keep_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> Any:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(transforms, "apply", forbidden)
    norms(made(1, 1, 1, 1025, seed=1), made(1, 1, 1, 1025, seed=2), None)
    norms(made(1, 1, 1, 8, seed=1).double(), made(1, 1, 1, 8, seed=2).double(), None)
    gates(True, False, None)(made(1, 1, 2, seed=1).double(), None, None, None)
