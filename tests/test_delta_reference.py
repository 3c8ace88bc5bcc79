"""The delta room's oracle in float64: against loops written here from the papers, its backward against autograd, chunks against it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fla_dispatch.kernels.delta import chunk_torch, ops, reference
from fla_dispatch.kernels.delta.cases import GATED, OP_NAMES, Inputs, Sizes, make_inputs
from fla_dispatch.kernels.delta.configs import TorchConfig
from fla_dispatch.kernels.delta.recurrence import Gradients, Options, OutputGrads, Tensors, residuals
from fla_dispatch.sequences import SeqInfo

F64 = torch.float64
LENGTHS = (3, 0, 1, 6)
SIZES = Sizes(2, 10, 2, 4, 3, 5)
each_op = pytest.mark.parametrize("op", OP_NAMES)
packs = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def call(op: str, inputs: Inputs) -> Any:
    """The op through its contract and the reference."""
    low = getattr(ops, op)(*inputs.args, **inputs.kwargs)
    out = reference.forward(None, low.tensors if low.prepare is None else low.prepare(low.tensors), low.options)
    return low.finish(out) if low.finish is not None else (out.o, out.state)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).sum() + 1e-6).sqrt()


def published(op: str, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """One state at a time, transitions as matrices: S_t = (Diag(a) - beta k p^T ...) S + beta k v^T, with every transform as published."""
    x, n = dict(zip(inputs.names, inputs.args, strict=True)), inputs.kwargs.get("num_householder", 1)
    option = inputs.kwargs.get
    B, T, H, K = x["q"].shape
    HV, V = x["v"].shape[2:]
    info = option("cu_seqlens")
    spans = [(b, 0, T) for b in range(B)]
    if info is not None:
        spans = [(0, begin, end) for begin, end in itertools.pairwise(info.host.tolist())]
    o, states = torch.zeros(B, T, HV, V, dtype=F64), torch.zeros(len(spans), HV, K, V, dtype=F64)
    for (i, (b, begin, end)), j in itertools.product(enumerate(spans), range(HV)):
        h = j // (HV // H)
        S = torch.zeros(K, V, dtype=F64) if option("initial_state") is None else inputs.kwargs["initial_state"][i, j]
        for t in range(begin, end):
            decay = torch.ones(K, dtype=F64)
            if x.get("g") is not None:
                g = x["g"][b, t, j]
                if option("use_gate"):
                    g = g + (0 if option("dt_bias") is None else inputs.kwargs["dt_bias"][j])
                    rate = 1.0 if option("A_log") is None else inputs.kwargs["A_log"][j].exp()
                    bound = option("lower_bound")
                    g = -rate * torch.log1p(g.exp()) if bound is None else bound / (1 + torch.exp(-rate * g))
                decay = g.exp().expand(K)
            for s in range(t * n, t * n + n):
                k, v, beta = x["k"][b, s, h], x["v"][b, s, j], x["beta"][b, s, j]
                p = x["p"][b, s, h] if "p" in x else k
                if option("use_qk_l2norm"):
                    k, p = unit(k), unit(p)
                if option("use_beta_sigmoid"):
                    beta = (2 if option("allow_neg_eigval") else 1) / (1 + torch.exp(-beta))
                a = torch.diag(decay) if s == t * n else torch.eye(K, dtype=F64)
                removal = torch.outer(k, p)
                transition = a - beta * removal if op == "comba" else (torch.eye(K, dtype=F64) - beta * removal) @ a
                S = transition @ S + beta * torch.outer(k, v)
            q = unit(x["q"][b, t, h]) if option("use_qk_l2norm") else x["q"][b, t, h]
            o[b, t, j] = option("scale", K**-0.5) * (q @ S)
        states[i, j] = S
    return o, states


@packs
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"raw": True}, {"raw": True, "allow_neg_eigval": True}])
@each_op
def test_forward_is_the_published_recurrence(op: str, options: dict[str, Any], lengths: tuple[int, ...] | None) -> None:
    sizes = SIZES._replace(B=1) if lengths else SIZES
    inputs = make_inputs(op, sizes, F64, lengths=lengths, initial_state=True, final_state=True, options=tuple(options.items()))
    for x, want in zip(call(op, inputs), published(op, inputs), strict=True):
        close(x, want)


@pytest.mark.parametrize("edit", [{"lower_bound": -5.0}, {"lower_bound": -2.0, "A_log": None}, {"dt_bias": None}])
@pytest.mark.parametrize("op", GATED)
def test_gates_from_raw_input(op: str, edit: dict[str, Any]) -> None:
    inputs = make_inputs(op, SIZES, F64, final_state=True, options=(("raw", True), *edit.items()))
    for x, want in zip(call(op, inputs), published(op, inputs), strict=True):
        close(x, want)


def test_a_bias_per_channel_may_be_flat() -> None:
    inputs = make_inputs("kda", SIZES, F64, final_state=True, options=(("raw", True),))
    flat = inputs.replaced({"dt_bias": inputs.kwargs["dt_bias"].flatten()})
    assert torch.equal(call("kda", inputs)[0], call("kda", flat)[0])


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_delta_product_of_other_counts(updates: int) -> None:
    for options in ((), (("ungated", True),)):
        inputs = make_inputs(
            "delta_product", SIZES, F64, final_state=True, options=(("num_householder", updates), *options), initial_state=True
        )  # fmt: skip
        for x, want in zip(call("delta_product", inputs), published("delta_product", inputs), strict=True):
            close(x, want)


def test_ops_are_special_cases_of_each_other() -> None:
    """Equal channels are one gate; no decay is no gate; comba with p = k differs from gated_delta by when the state decays alone."""
    q, k, v, g, beta = make_inputs("gated_delta", SIZES, F64).args
    run = {op: lambda *args, op=op, **kwargs: call(op, Inputs(args, kwargs, ()))[0] for op in OP_NAMES}
    close(run["kda"](q, k, v, g[..., None].expand(*g.shape, 3).contiguous(), beta), run["gated_delta"](q, k, v, g, beta))
    close(run["gated_delta"](q, k, v, 0 * g, beta), run["delta"](q, k, v, beta))
    close(run["comba"](q, k, v, k, 0 * g, beta), run["delta"](q, k, v, beta))
    assert (run["comba"](q, k, v, k, g, beta) - run["gated_delta"](q, k, v, g, beta)).norm() > 1e-3
    close(run["delta_product"](q, k, v, g, beta, num_householder=1), run["gated_delta"](q, k, v, g, beta))


# -- gradients ---------------------------------------------------------------------------------------------------------------

MODULES = {reference: None, chunk_torch: TorchConfig(4)}
modules = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[-1])


def random_tensors(lengths: tuple[int, ...] | None, *, decay: str, own: bool, states: bool, regime: str) -> Tensors:
    sizes = SIZES._replace(B=1) if lengths else SIZES
    q, k, v, p, _, beta = make_inputs("comba", sizes, F64).args
    gates = {"token": "gated_delta", "channel": "kda"}
    g = make_inputs(gates[decay], sizes, F64, regime=regime).args[3] if decay != "none" else None
    info = SeqInfo.from_lengths(list(lengths)) if lengths else None
    h0 = torch.randn(len(lengths) if lengths else 2, 4, 3, 5, dtype=F64) if states else None
    packing = (info.cu_seqlens, info.host, info.segments) if info else (None, None, None)
    return Tensors(q, k, v, p if own else None, g, beta, h0, *packing)


@modules
@packs
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "o", "state"])
@pytest.mark.parametrize("own", [False, True], ids=["k", "p"])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize(
    ("decay", "regime"),
    [("none", "mild"), *itertools.product(("token", "channel"), ("mild", "strong", "reset", "none"))],
)
def test_backward_is_the_gradient(
    module: Any, lengths: tuple[int, ...] | None, states: bool, used: tuple[bool, bool], own: bool, early: bool, decay: str, regime: str
) -> None:
    t, o = random_tensors(lengths, decay=decay, own=own, states=states, regime=regime), Options(0.7, decay, early, True)
    leaves = {f: x.detach().requires_grad_() for f in Gradients._fields if (x := getattr(t, f)) is not None}
    out = reference.forward(None, t._replace(**leaves), o)
    grads = OutputGrads(*(torch.randn_like(x) if use else None for use, x in zip(used, out, strict=True)))
    chosen = [(x, d) for x, d in zip(out, grads, strict=True) if d is not None]
    want = torch.autograd.grad([x for x, _ in chosen], list(leaves.values()), [d for _, d in chosen], materialize_grads=True)
    wanted = tuple(getattr(t, f) is not None for f in Gradients._fields)
    found = module.backward(MODULES[module], residuals(t, out, o), grads, o, wanted)
    for name, x in found._asdict().items():
        assert (x is not None) == (name in leaves), name
    for name, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")


@modules
def test_only_wanted_gradients_are_given(module: Any) -> None:
    t, o = random_tensors(None, decay="token", own=True, states=True, regime="mild"), Options(0.7, "token", True, True)
    out = module.forward(MODULES[module], t, o)
    for i in range(len(Gradients._fields)):
        wanted = tuple(j == i for j in range(len(Gradients._fields)))
        found = module.backward(MODULES[module], residuals(t, out, o), OutputGrads(torch.randn_like(out.o), None), o, wanted)
        assert [x is not None for x in found] == list(wanted)


@pytest.mark.parametrize("regime", ["mild", "strong", "none", "reset"])
@pytest.mark.parametrize("C", [1, 4, 24, 64])
@pytest.mark.parametrize("lengths", [None, (5, 0, 130, 1, 64)])
@pytest.mark.parametrize("op", GATED)
def test_chunks_equal_the_loop(op: str, C: int, lengths: tuple[int, ...] | None, regime: str) -> None:
    """The chunked form in float64 is the oracle of long inputs, so it must equal the loop to rounding."""
    sizes = Sizes(1, sum(lengths), 1, 2, 8, 8) if lengths else Sizes(2, 130, 1, 2, 8, 8)
    inputs = make_inputs(op, sizes, F64, lengths=lengths, regime=regime, initial_state=True, final_state=True)
    low = getattr(ops, op)(*inputs.args, **inputs.kwargs)
    t = low.tensors if low.prepare is None else low.prepare(low.tensors)
    want, got = reference.forward(None, t, low.options), chunk_torch.forward(TorchConfig(C), t, low.options)
    close(got.o, want.o)
    close(got.state, want.state)


def test_normalisation_is_that_of_unit_vectors() -> None:
    inputs = make_inputs("delta", SIZES, F64, final_state=True)
    x = inputs.leaves()
    long = inputs.replaced({"q": 3 * x["q"], "k": 5 * x["k"]})
    normal = inputs.replaced({n: F.normalize(x[n], dim=-1) for n in ("q", "k")})
    for y, want in zip(call("delta", long._replace(kwargs={**long.kwargs, "use_qk_l2norm": True})), call("delta", normal), strict=True):
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)  # eps = 1e-6
