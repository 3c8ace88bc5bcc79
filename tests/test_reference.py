"""The oracle itself, in float64: against closed forms written here from the papers, and its backward against autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fla_dispatch.kernels.scalar_decay import chunk_torch, ops, reference
from fla_dispatch.kernels.scalar_decay.cases import Inputs, Sizes, make_inputs
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.kernels.scalar_decay.recurrence import Gradients, Options, OutputGrads, Outputs, Tensors, residuals
from fla_dispatch.sequences import SeqInfo

F64 = torch.float64
LENGTHS = (3, 0, 1, 6)


def call(op: str, inputs: Inputs) -> Any:
    """The op through its contract and the reference."""
    low = getattr(ops, op)(*inputs.args, **inputs.kwargs)
    tensors = low.tensors if low.prepare is None else low.prepare(low.tensors)
    out = reference.forward(None, tensors, low.options)
    return low.finish(out) if low.finish is not None else (out.o, out.state if low.options.final_state else None)


def closed_form(
    q: torch.Tensor,  # [T, K]
    k: torch.Tensor,  # [T, K]
    v: torch.Tensor,  # [T, V]
    a: torch.Tensor,  # [T] decay factors
    S0: torch.Tensor,  # [K, V]
    z0: torch.Tensor,  # [K]
    scale: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, S_T, z_T of one head as one sum over pairs of tokens, with M_ts a product of the decays between."""
    T = q.shape[0]
    since_start = torch.stack([a[: t + 1].prod() for t in range(T)]) if T else a
    M = torch.zeros(T, T, dtype=F64)
    for t, s in itertools.product(range(T), range(T)):
        if s <= t:
            M[t, s] = a[s + 1 : t + 1].prod()
    weights = scale * M * (q @ k.T)
    o = weights @ v + scale * since_start[:, None] * (q @ S0)
    to_end = M[-1] if T else a
    total = since_start[-1] if T else 1.0
    S = torch.einsum("t,tk,tv->kv", to_end, k, v) + total * S0
    z = to_end @ k + total * z0
    if normalize:
        o = o / (weights.sum(1) + scale * since_start * (q @ z0) + 1e-10)[:, None]
    return o, S, z


def decays(op: str, inputs: Inputs, heads: int) -> torch.Tensor:
    """Decay factors [B, T, HV] as the papers define them."""
    B, T = inputs.args[0].shape[:2]
    if op == "simple_gla":
        return inputs.args[3].exp()
    per_head = torch.ones(heads, dtype=F64)
    if op == "retention":
        per_head = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=F64)
    if op == "lightning_attn":  # layer 3 of 12
        per_head = torch.tensor([math.exp(-8 / heads * h * (1 - 3 / 12)) for h in range(heads)], dtype=F64)
    return per_head.expand(B, T, heads)


def spans(inputs: Inputs) -> list[tuple[int, int, int]]:
    """(row, begin, end) of every sequence."""
    B, T = inputs.args[0].shape[:2]
    info = inputs.kwargs.get("cu_seqlens")
    if info is None:
        return [(b, 0, T) for b in range(B)]
    return [(0, begin, end) for begin, end in itertools.pairwise(info.host.tolist())]


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize(
    ("op", "regime", "options"),
    [
        ("linear_attn", "mild", {}), ("linear_attn", "mild", {"normalize": True}),
        ("linear_attn", "mild", {"normalize": True, "scale": 2.0}),
        ("retention", "mild", {}), ("retention", "mild", {"scale": 0.3}), ("lightning_attn", "mild", {}), ("simple_gla", "mild", {}),
        ("simple_gla", "strong", {}), ("simple_gla", "none", {}), ("simple_gla", "reset", {}),
    ],
)  # fmt: skip
def test_forward_is_the_closed_form(
    op: str, regime: str, options: dict[str, Any], lengths: tuple[int, ...] | None, initial_state: bool
) -> None:
    sizes = Sizes(1 if lengths else 2, 10, 2, 4, 3, 5)
    inputs = make_inputs(
        op, sizes, F64, lengths=lengths, regime=regime, initial_state=initial_state, final_state=True, options=tuple(options.items())
    )
    o, state = call(op, inputs)
    q, k, v = inputs.args[:3]
    a = decays(op, inputs, sizes.HV)
    normalize, scale = options.get("normalize", False), options.get("scale", 3**-0.5)
    S, z = state if normalize else (state, None)
    given = inputs.kwargs.get("initial_state")
    S0, z0 = given if normalize and given is not None else (given, None)
    for n, (b, begin, end) in enumerate(spans(inputs)):
        for j in range(sizes.HV):
            h = j // 2
            start = torch.zeros(3, 5, dtype=F64) if S0 is None else S0[n, j]
            start_z = torch.zeros(3, dtype=F64) if z0 is None else z0[n, j]
            row = slice(begin, end)
            want = closed_form(q[b, row, h], k[b, row, h], v[b, row, j], a[b, row, j], start, start_z, scale, normalize)
            close(o[b, row, j], want[0])
            close(S[n, j], want[1])
            if normalize:
                close(z[n, j], want[2])


def naive_ssd(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's scan, token by token and channel by channel, in the published layout of states ([P, N], transposed at the end)."""
    x, dt, A, B, C = inputs.args
    options = inputs.kwargs
    D, z, bias, h0 = (options.get(name) for name in ("D", "z", "dt_bias", "initial_state"))
    low, high = options.get("dt_limit", (0.0, math.inf))
    H, G = x.shape[2], B.shape[2]
    y, states = torch.zeros_like(x), []
    for n, (b, begin, end) in enumerate(spans(inputs)):
        per_head = []
        for h in range(H):
            group = h // (H // G)
            S = torch.zeros(x.shape[3], B.shape[3], dtype=F64) if h0 is None else h0[n, h].T.clone()
            for t in range(begin, end):
                step = dt[b, t, h] + (0 if bias is None else bias[h])
                if options.get("dt_softplus"):
                    step = torch.log1p(torch.exp(step))
                step = min(max(step.item(), low), high)
                S = math.exp(step * A[h].item()) * S + step * torch.outer(x[b, t, h], B[b, t, group])
                out = S @ C[b, t, group]
                if D is not None:
                    out = out + D[h] * x[b, t, h]
                if z is not None:
                    out = out * z[b, t, h] * torch.sigmoid(z[b, t, h])
                y[b, t, h] = out
            per_head.append(S.T)
        states.append(torch.stack(per_head))
    return y, torch.stack(states)


@pytest.mark.parametrize("regime", ["mild", "strong"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize(
    "edit",
    [
        {}, {"D": None}, {"gated": True}, {"dt_limit": (0.01, 0.05)}, {"dt_bias": None, "dt_softplus": False},
        {"D": torch.linspace(-1, 1, 20, dtype=F64).view(4, 5), "gated": True, "dt_limit": (0.0, 0.5)},
        {"dt_softplus": True, "dt_bias": None},
    ],
)  # fmt: skip
def test_mamba2_is_the_published_scan(edit: dict[str, Any], lengths: tuple[int, ...] | None, regime: str) -> None:
    inputs = make_inputs(
        "mamba2", Sizes(1 if lengths else 2, 10, 2, 4, 3, 5), F64, lengths=lengths, regime=regime, initial_state=True, final_state=True,
        options=tuple(edit.items()),
    )  # fmt: skip
    y, state = call("mamba2", inputs)
    want_y, want_state = naive_ssd(inputs)
    close(y, want_y)
    close(state, want_state)


def test_a_skip_per_head_is_one_per_channel() -> None:
    """D [H] goes through the recurrence and D [H, P] beside it: the same values and gradients."""
    sizes = Sizes(2, 10, 2, 4, 3, 5)
    for gated in (False, True):
        inputs = make_inputs("mamba2", sizes, F64, initial_state=True, final_state=True, options=(("gated", gated),))
        leaves = {name: x.requires_grad_() for name, x in inputs.leaves().items()}
        found = []
        for D in (leaves["D"], leaves["D"][:, None].expand(4, 5)):
            y, state = call("mamba2", inputs.replaced({**leaves, "D": D}))
            found.append((y, state, *torch.autograd.grad((y * y).sum() + state.sum(), list(leaves.values()))))
        for one, other in zip(*found, strict=True):
            close(one, other)


def random_tensors(lengths: tuple[int, ...] | None, *, decay: str, beta: bool, states: bool, normalize: bool, regime: str) -> Tensors:
    sizes = Sizes(1 if lengths else 2, 10, 2, 4, 3, 5)
    options = (("normalize", True),) if normalize else ()
    q, k, v = make_inputs("linear_attn", sizes, F64, options=options).args
    g = make_inputs("simple_gla", sizes, F64, regime=regime).args[3]
    info = SeqInfo.from_lengths(list(lengths)) if lengths else None
    N = len(lengths) if lengths else 2
    return Tensors(
        q, k, v, g if decay == "token" else None, 0.1 + torch.rand(*v.shape[:3], dtype=F64) if beta else None,
        torch.linspace(-1, 2, 4, dtype=F64) if beta else None,
        torch.randn(N, 4, 3, 5, dtype=F64) if states else None, 0.5 + torch.rand(N, 4, 3, dtype=F64) if states and normalize else None,
        info.cu_seqlens if info else None, info.host if info else None, info.segments if info else None,
    )  # fmt: skip


def both_backwards(module: Any, t: Tensors, o: Options, used: tuple[bool, bool, bool]) -> tuple[Gradients, dict[str, torch.Tensor | None]]:
    """A module's backward, and autograd through the reference's forward; used: which outputs have a gradient."""
    leaves = {f: x.detach().requires_grad_() for f in Gradients._fields if (x := getattr(t, f)) is not None}
    out = reference.forward(None, t._replace(**leaves), o)
    grads = OutputGrads(*(torch.randn_like(x) if use and x.numel() else None for use, x in zip(used, out, strict=False)))
    chosen = [(x, d) for x, d in zip(out, grads, strict=False) if d is not None]
    found = torch.autograd.grad([x for x, _ in chosen], list(leaves.values()), [d for _, d in chosen], allow_unused=True)
    want = dict(zip(leaves, found, strict=True))
    detached = Outputs(*(x.detach() for x in out))
    wanted = tuple(getattr(t, f) is not None for f in Gradients._fields)
    return module.backward(MODULES[module], residuals(t, detached, o), grads, o, wanted), want


MODULES = {reference: None, chunk_torch: TorchConfig(4)}

#: decay, normalize, gates, and which of o, S and z have a gradient (z exists with normalize only).
BACKWARD_CALLS = [
    (decay, normalize, regime, used)
    for decay, normalize, regime in (
        ("none", False, "mild"), ("none", True, "mild"), ("retention", False, "mild"), ("lightning", False, "mild"),
        ("token", False, "mild"), ("token", False, "strong"), ("token", False, "reset"), ("token", False, "none"),
    )
    for used in ((True, True, True), (True, False, False), (False, True, True), (False, True, False), (False, False, True))
    if normalize or used != (False, False, True)
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(("decay", "normalize", "regime", "used"), BACKWARD_CALLS)
def test_backward_is_the_gradient(
    module: Any, lengths: tuple[int, ...] | None, states: bool, decay: str, normalize: bool, regime: str, used: tuple[bool, bool, bool]
) -> None:
    t = random_tensors(lengths, decay=decay, beta=not normalize, states=states, normalize=normalize, regime=regime)
    o = Options(0.7, decay, 0.75, normalize, True)
    found, want = both_backwards(module, t, o, used)
    for name, x in found._asdict().items():
        assert (x is not None) == (name in want), name
        if x is not None:
            expected = want[name] if want[name] is not None else torch.zeros_like(x)
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])
def test_only_wanted_gradients_are_given(module: Any) -> None:
    t = random_tensors(None, decay="token", beta=True, states=True, normalize=False, regime="mild")
    o = Options(0.7, "token", 0.0, False, True)
    out = module.forward(MODULES[module], t, o)
    grads = OutputGrads(torch.randn_like(out.o), None, None)
    for i in range(len(Gradients._fields)):
        wanted = tuple(j == i for j in range(len(Gradients._fields)))
        found = module.backward(MODULES[module], residuals(t, out, o), grads, o, wanted)
        assert [x is not None for x in found] == [j == i and getattr(t, f) is not None for j, f in enumerate(Gradients._fields)]


@pytest.mark.parametrize("regime", ["mild", "strong", "none", "reset"])
@pytest.mark.parametrize("C", [1, 4, 64])
@pytest.mark.parametrize("lengths", [None, (5, 0, 130, 1, 64)])
def test_chunks_equal_the_loop(C: int, lengths: tuple[int, ...] | None, regime: str) -> None:
    """The chunked form in float64 is the oracle of long inputs, so it must equal the loop to rounding."""
    sizes = Sizes(1, sum(lengths), 1, 2, 8, 8) if lengths else Sizes(2, 130, 1, 2, 8, 8)
    inputs = make_inputs("simple_gla", sizes, F64, lengths=lengths, regime=regime, initial_state=True, final_state=True)
    low = ops.simple_gla(*inputs.args, **inputs.kwargs)
    want = reference.forward(None, low.tensors, low.options)
    got = chunk_torch.forward(TorchConfig(C), low.tensors, low.options)
    close(got.o, want.o)
    close(got.state, want.state)
