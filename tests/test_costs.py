"""The cost estimates: defined for every Key, device and config, never lower for more work, read from one table, and fitted to outcomes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fit, regret
from fla_dispatch import device, registry
from fla_dispatch.kernels._shared import fitted
from fla_dispatch.kernels._shared.fitted import Constants, Model, Shape, Step
from fla_dispatch.kernels.delta.configs import ChunkConfig
from fla_dispatch.kernels.delta.configs import RecurrentConfig as DeltaRecurrentConfig
from fla_dispatch.kernels.scalar_decay.configs import RecurrentConfig, SegmentConfig, SweepConfig
from fla_dispatch.problem import Problem
from fla_dispatch.registry import BACKWARD, FORWARD, Variant
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.candidates import field
from fla_dispatch.tuning.choice import make_record
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.records import Outcome, Timing, config_dict, record_key

QUICK = settings(max_examples=100, deadline=None)
SCALAR, DELTA = fit.MODELS["scalar_decay"], fit.MODELS["delta"]
STRANGE: dict[tuple[str, str], Any] = {
    ("scalar_decay", "sweep_triton"): SweepConfig(128, 16, 1, 7, True),
    ("scalar_decay", "chunk_triton"): SegmentConfig(64, 8, 128, 16, 0),
    ("scalar_decay", "recurrent_triton"): RecurrentConfig(8, 32),
    ("delta", "chunk_triton"): ChunkConfig(128, 16, 1, 7, True, False, 1, True, 256),
    ("delta", "chunk_gluon"): ChunkConfig(16, 128, 2, 4),
    ("delta", "recurrent_triton"): DeltaRecurrentConfig(8, 32),
}


@st.composite
def keys(draw: st.DrawFn) -> Problem:
    packed, N = draw(st.booleans()), draw(st.integers(1, 600))
    T = draw(st.one_of(st.integers(0, 300), st.integers(0, 1 << 24)))
    recurrence = draw(st.sampled_from(sorted(fit.MODELS)))
    scalar = recurrence == "scalar_decay"
    decay, beta = draw(st.sampled_from(["none", "token", "head" if scalar else "channel"])), not scalar or draw(st.booleans())
    if scalar:
        flags = {"decay": decay, "normalize": draw(st.sampled_from(["true", "false"]))}
    else:
        removal = draw(st.sampled_from(["k", "p"]))
        flags = {"decay": decay, "early": str(removal == "p").lower(), "removal": removal}
    dtypes = [("qkv", draw(st.sampled_from(["bfloat16", "float16", "float32", "float64"])))]
    dtypes += [("g", "float32")] * (decay in ("token", "channel")) + [("beta", "float32")] * beta
    group = draw(st.sampled_from([1, 4]))
    return Problem(
        recurrence=recurrence,
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
        flags=tuple(flags.items()),
        **{name: draw(st.booleans()) for name in ("initial_state", "final_state", "grad")},
    ).key()


def candidates(key: Problem) -> list[tuple[Variant, Any]]:
    """Every variant with its configs, and with one that no fit has seen."""
    variants = registry.get_recurrence(key.recurrence).variants
    found = [(v, c) for v in variants for c in v.configs(key)]
    return found + [(v, STRANGE[key.recurrence, v.name]) for v in variants if (key.recurrence, v.name) in STRANGE]


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
    variants = registry.get_recurrence(key.recurrence).variants
    found = [(v.cost(key, c, FORWARD), v.name) for v in variants if not v.static_refusals(key) for c in v.configs(key)]
    return min(found)[1]


def test_the_shipped_table_ranks_what_differs_by_much() -> None:
    """Few long sequences want segments, many of them whole sweeps; segments are no longer than the sequences of a pack."""
    assert cheapest(sized(4, 32768)) == "chunk_triton"
    assert cheapest(sized(512, 4096)) == "sweep_gluon"
    assert cheapest(sized(1024, 32768, N=256, mean_length=128, packed=True)) in ("sweep_triton", "sweep_gluon")


@pytest.mark.parametrize("model", fit.MODELS.values(), ids=list(fit.MODELS))
def test_the_table_is_read_once_and_written_as_it_is_read(model: Model) -> None:
    fresh = dataclasses.replace(model, installed=[])
    found = fresh.constants()
    assert fresh.constants() is found and fresh.installed == [found]
    step = Step(1.5, 0.5, 2, 3.25)
    for known in (
        found,
        dataclasses.replace(found, steps={**found.steps, BASE: step, BASE._replace(full=True, flags=("a=3", "tma")): step}),
    ):
        assert model.read(known.text({"device": "sm90"})) == known
        assert all(Shape.parse(s.name) == s for s in known.steps)
    assert SCALAR.constants().steps and set(model.configs) <= {v.name for v in registry.get_recurrence(model.recurrence).variants}


BASE = Shape(128, "plain", False, False, 64, 64, 4, 3)


def table(model: Model, *rows: tuple[Shape, Step]) -> Constants:
    return dataclasses.replace(model.constants(), steps=dict(rows))


def test_an_unknown_config_is_its_nearest_relative_slower_than_that() -> None:
    known, other = Step(1.0, 0.5, 2, 3.0), Step(9.0, 9.0, 1)
    found = table(DELTA, (BASE, known), (BASE._replace(BE=256, warps=8), other))
    assert found.step(BASE) is known
    assert found.step(BASE._replace(flags=("tma",))) == pytest.approx((fitted.UNTRIED, 0.5 * fitted.UNTRIED, 2, 3 * fitted.UNTRIED))
    assert found.step(BASE._replace(warps=2)).resident == 4


@pytest.mark.parametrize("model", fit.MODELS.values(), ids=list(fit.MODELS))
def test_an_unknown_class_is_scaled_by_formula(model: Model) -> None:
    found = table(model, (BASE, Step(1.0, 0.5, 2)))
    gated = BASE._replace(kind="gated")
    assert found.step(gated).alone == pytest.approx(model.rough(gated).alone / model.rough(BASE).alone)
    assert found.step(gated).alone < found.step(gated._replace(backward=True)).alone
    assert table(model).step(BASE) == model.rough(BASE)


# -- fitting -----------------------------------------------------------------------------------------------------------------


def true_constants(model: Model) -> Constants:
    """What a device might be: every step by formula, times what its name alone decides."""

    def true(s: Shape) -> Step:
        factor = [1 + int.from_bytes(hashlib.sha256(f"{part} {s.name}".encode()).digest()[:2]) / 2**16 for part in "ab"]
        rough = model.rough(s)
        return Step(factor[0] * rough.alone, 0.6 * factor[0] * rough.alone, 2, factor[1] * rough.local)

    found = Constants(
        model, {}, {}, {"lead": 6.0, "scan": 2.5, "start": 1.0, "start_token": 1.0, "memory": 0.8, "host": 70.0, "passing": 0.8}, {}
    )
    found._like = true  # type: ignore[method-assign]
    return found


def planted(model: Model, op: str, to: Path) -> stores.Store:
    """A store in which every candidate of some keys has the time that `true_constants` says."""
    recurrence, truth, store = registry.get_recurrence(model.recurrence), true_constants(model), stores.Store(to)
    environment = Environment("h200-sm90-132u-144g", "3.6.0", "ptxas12.8.93")
    for T, H, D in itertools.product((64, 512, 4096, 32768), (4, 64), (64, 128)):
        key = key_of(op, {"B": 1, "T": T, "H": H, "D": D}, device.hypothetical("sm90"), grad=True)
        for backward in (False, True):
            known = field(recurrence, key, backward=backward, most=100)
            assert known is not None
            outcomes = []
            for c in known.worthy:
                us = truth.micros(c.variant.name, key, c.config, backward) if c.variant.name in model.configs else 1e6
                timing = Timing(median_us=us, min_us=us, mad_us=0.0, rounds=5)
                outcomes.append(
                    Outcome(
                        variant=c.variant.name, config=config_dict(c.config), kernel_hash=kernel_hash(c.variant), status="ok", timing=timing
                    )
                )
            direction: Any = "backward" if backward else "forward"
            store.put(
                environment, make_record(model.recurrence, record_key(key), direction, outcomes, default=known.default, order=known.order)
            )
    return store


@pytest.mark.parametrize(("name", "op"), [("delta", "gated_delta"), ("scalar_decay", "retention")])
def test_a_fit_finds_what_was_planted(name: str, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted anew from a store, estimates are near the planted times and choose well; before, they do not."""
    model, root = fit.MODELS[name], tmp_path / "store"
    planted(model, op, root)
    monkeypatch.setattr("sys.argv", ["fit", "--root", str(root), "--out", str(tmp_path), "--rounds", "100", "--worst", "0"])
    given, before = fit.samples(model, root, "sm90", "eager"), model.constants()
    try:
        fit.main()
        found = model.read((tmp_path / f"{name}.json").read_text())
        assert found == model.constants() and set(found.steps) == {s.shape for s in given}
        s = given[0]
        cost = registry.get_recurrence(name).variant(s.variant).cost(s.key, s.config, BACKWARD if s.shape.backward else FORWARD)
        assert cost == 1e-6 * found.micros(s.variant, s.key, s.config, s.shape.backward)
        assert len(regret.regrets(root, recurrence=name)) == 32
    finally:
        model.install(before)
    rows = [fit.judged(given, constants) for constants in (before, found)]
    apart = [statistics.fmean(abs(e) for r in every for e in r.errors) for every in rows]
    assert len(rows[1]) == 32 and apart[1] < 0.06 and apart[1] < 0.3 * apart[0], apart
    assert max(r.regret for r in rows[1]) < 1.1 < max(r.regret for r in rows[0])
    assert {s.kind for s in found.steps} == {"gated" if name == "delta" else "plain"}
    in_any_order = {s for s in found.steps if (name == "delta" and s.BT) or {"states", "parallel"} & {*s.flags}}
    assert in_any_order == {s for s, step in found.steps.items() if step.local}
    assert list(tmp_path.glob("*.json")) == [tmp_path / f"{name}.json"], "the other room has no records and keeps its constants"
