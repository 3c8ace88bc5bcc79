"""The cost estimate: defined for every Key, device and config, never lower for more work, and read from one table."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dispatch import device, registry
from fla_dispatch.kernels.scalar_decay import costs
from fla_dispatch.kernels.scalar_decay.configs import RecurrentConfig, SegmentConfig, SweepConfig
from fla_dispatch.kernels.scalar_decay.costs import Constants, Shape, Step
from fla_dispatch.problem import Problem
from fla_dispatch.registry import BACKWARD, FORWARD, Variant

QUICK = settings(max_examples=100, deadline=None)
VARIANTS = registry.get_recurrence("scalar_decay").variants
STRANGE: dict[str, Any] = {
    "sweep_triton": SweepConfig(128, 16, 1, 7, True),
    "chunk_triton": SegmentConfig(64, 8, 128, 16, 0),
    "recurrent_triton": RecurrentConfig(8, 32),
}


@st.composite
def keys(draw: st.DrawFn) -> Problem:
    packed, N = draw(st.booleans()), draw(st.integers(1, 600))
    T = draw(st.one_of(st.integers(0, 300), st.integers(0, 1 << 24)))
    decay, beta = draw(st.sampled_from(["none", "head", "token"])), draw(st.booleans())
    dtypes = [("qkv", draw(st.sampled_from(["bfloat16", "float16", "float32", "float64"])))]
    dtypes += [("g", "float32")] * (decay == "token") + [("beta", "float32")] * beta
    group = draw(st.sampled_from([1, 4]))
    return Problem(
        recurrence="scalar_decay",
        device=device.hypothetical(draw(st.sampled_from(device.known_archs()))),
        dtypes=tuple(dtypes),
        K=draw(st.integers(1, 300)),
        V=draw(st.integers(1, 520)),
        group=group,
        BH=N * group * draw(st.sampled_from([1, 2, 16])),
        T=T,
        N=N,
        mean_length=-(-T // N) if packed else T,
        packed=packed,
        flags=(("decay", decay), ("normalize", draw(st.sampled_from(["true", "false"])))),
        **{name: draw(st.booleans()) for name in ("initial_state", "final_state", "grad")},
    ).key()


def candidates(key: Problem) -> list[tuple[Variant, Any]]:
    """Every variant with its configs, and with one that no fit has seen."""
    found = [(v, c) for v in VARIANTS for c in v.configs(key)]
    return found + [(v, STRANGE[v.name]) for v in VARIANTS if v.name in STRANGE]


@QUICK
@given(keys())
def test_costs_are_finite_and_positive(key: Problem) -> None:
    for (variant, config), direction in itertools.product(candidates(key), (FORWARD, BACKWARD)):
        cost = variant.cost(key, config, direction)
        assert type(cost) is float and math.isfinite(cost) and cost > 0, (variant.name, config)


@QUICK
@given(keys(), st.integers(1, 10))
def test_longer_calls_and_longer_packs_never_cost_less(key: Problem, doublings: int) -> None:
    longer = dataclasses.replace(key, T=max(1, key.T) << doublings, mean_length=max(1, key.mean_length) << doublings)
    for (variant, config), direction in itertools.product(candidates(key), (FORWARD, BACKWARD)):
        short, long = (variant.cost(p, config, direction) for p in (key, longer))
        assert short <= long * (1 + 1e-9), (variant.name, config)


def sized(BH: int, T: int, **changes: Any) -> Problem:
    """bfloat16, D = 128, a decay per head, on an H200."""
    base = Problem(
        "scalar_decay", device.hypothetical("sm90"), (("qkv", "bfloat16"),), 128, 128, 1, BH, T, 1, T, False, False, False, False,
        (("decay", "head"), ("normalize", "false")),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def cheapest(key: Problem) -> str:
    found = [(v.cost(key, c, FORWARD), v.name) for v in VARIANTS if not v.static_refusals(key) for c in v.configs(key)]
    return min(found)[1]


def test_the_shipped_table_ranks_what_differs_by_much() -> None:
    """Few long sequences want segments, many of them whole sweeps; segments are no longer than the sequences of a pack."""
    assert cheapest(sized(4, 32768)) == "chunk_triton"
    assert cheapest(sized(512, 4096)) == "sweep_triton"
    assert cheapest(sized(1024, 32768, N=256, mean_length=128, packed=True)) == "sweep_triton"


def test_the_table_is_read_once_and_written_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_installed", [])
    found = costs.constants()
    assert costs.constants() is found and found.steps
    assert Constants.read(found.text({"device": "sm90"})) == found
    assert all(Shape.parse(s.name) == s for s in found.steps)


BASE = Shape(128, "plain", False, False, 64, 64, 4, 3, False, False)


def table(*rows: tuple[Shape, Step]) -> Constants:
    return dataclasses.replace(costs.constants(), steps=dict(rows))


def test_an_unknown_config_is_its_nearest_relative_slower_than_that() -> None:
    known, other = Step(1.0, 0.5, 2), Step(9.0, 9.0, 1)
    found = table((BASE, known), (BASE._replace(wide=256, warps=8), other))
    assert found.step(BASE) is known
    assert found.step(BASE._replace(tma=True)) == Step(costs.UNTRIED, 0.5 * costs.UNTRIED, 2)
    assert found.step(BASE._replace(warps=2)).resident == 4


def test_an_unknown_class_is_scaled_by_formula() -> None:
    found = table((BASE, Step(1.0, 0.5, 2)))
    gated = BASE._replace(kind="gated")
    assert found.step(gated).alone == pytest.approx(gated.rough() / BASE.rough())
    assert found.step(gated).alone < found.step(gated._replace(backward=True)).alone
    assert table().step(BASE).alone == BASE.rough()
