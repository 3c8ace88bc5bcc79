"""Tiers of choice: their order against a model, what may never win, provenance, and the policy on a miss."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from planting import qkv
from tiering import SHIFTS, Shelves, outcome, problem, record, shelves, table

import fla_dispatch as fd
from fla_dispatch import registry, settings
from fla_dispatch.dispatch import miss
from fla_dispatch.dispatch.tiers import Decision, decide
from fla_dispatch.errors import MissError, RefusedError
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.requirements import RefusalCode
from fla_dispatch.tuning import advisories, lock, search
from fla_dispatch.tuning.advisories import Advisory
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.records import record_key

NAMES = tuple(SHIFTS)
RECORDS = ("user", "site", "shipped", "neighbour", "sibling")


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelves]:
    with shelves(tmp_path) as found:
        yield found


def deny(*variants: str, action: str = "deny", config: dict[str, Any] | None = None) -> tuple[Advisory, ...]:
    row = {
        "id": "T-1",
        "recurrence": "scalar_decay",
        "variants": list(variants),
        "action": action,
        "reason": "a test",
        "config": config or {},
    }
    return (Advisory.parse(row, "test"),)


def chosen(d: Decision) -> tuple[str, str | None, int | None]:
    return d.tier, d.forward and d.forward.variant.name, d.forward and getattr(d.forward.config, "C", None)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    held = {tier: (draw(st.sampled_from(NAMES)), draw(st.booleans())) for tier in RECORDS if draw(st.booleans())}
    return {
        "records": held,  # tier -> (variant, whether its code has changed since)
        "denied": draw(st.sets(st.sampled_from(NAMES), max_size=4)),
        "choice": draw(st.one_of(st.none(), st.sampled_from([*NAMES, "reference"]))),
        "locked": draw(st.one_of(st.none(), st.sampled_from(NAMES))),
        "order": tuple(draw(st.permutations(NAMES))),
    }


def model(world: dict[str, Any]) -> tuple[str, str | None]:
    """(tier, variant) as the order of the tiers says it; a variant of None is a refusal."""
    allowed = [n for n in NAMES if n not in world["denied"]]
    if world["choice"] is not None:
        return "forced", world["choice"] if world["choice"] in (*allowed, "reference") else None
    if world["locked"] is not None:
        return "lock", world["locked"] if world["locked"] in allowed else None
    for tier in RECORDS:
        if tier in world["records"]:
            variant, stale = world["records"][tier]
            if variant in allowed and not stale:
                return tier, variant
    return ("estimate", min(allowed, key=SHIFTS.__getitem__)) if allowed else ("reference", "reference")


@hypothesis_settings(max_examples=60, deadline=None)
@given(worlds())
def test_order_of_tiers(world: dict[str, Any]) -> None:
    here, near = problem(256), problem(512)
    with tempfile.TemporaryDirectory() as root, shelves(Path(root)) as shelf, pytest.MonkeyPatch.context() as patch:
        for tier, (variant, stale) in world["records"].items():
            one = outcome(variant, TorchConfig(32), code="0" * 24 if stale else None)
            place = tier if tier in shelf.roots else "user"
            shelf.put(place, record(near if tier == "neighbour" else here, one), shelf.elsewhere if tier == "sibling" else None)
        patch.setattr(advisories, "known", lambda: deny(*world["denied"]) if world["denied"] else ())
        path = Path(root) / "lock.json"
        if world["locked"]:
            code = kernel_hash(registry.get_recurrence("scalar_decay").variant("chunk_torch"))
            entry = (shelf.environment.directory, "scalar_decay", record_key(here), "forward", world["locked"], '{"C": 16}', code)
            lock.write(path, [lock.Entry(*entry)])
        with settings.override(lock=str(path) if world["locked"] else None):
            found = decide(table(world["order"]), here, world["choice"])
            again = decide(table(NAMES), here, world["choice"])
    tier, variant = model(world)
    assert (found.tier, found.forward and found.forward.variant.name) == (tier, variant)
    assert chosen(again) == chosen(found)  # whatever the order of registration
    if variant in NAMES and tier != "forced":
        wanted = 32 if tier in RECORDS else 16 if tier == "lock" else 64
        assert chosen(found)[2] == wanted
    if variant is None:
        codes = {r.code for v in found.considered for r in v.refusals}
        assert found.blocked if tier == "lock" else codes == {RefusalCode.ADVISORY}


def test_a_named_variant_takes_its_measured_config(shelf: Shelves) -> None:
    """Naming chooses the variant; among its configs the record decides as it would otherwise."""
    p = problem()
    shelf.put("user", record(p, outcome("one_torch", us=5), outcome("two_torch", us=20), outcome("two_torch", TorchConfig(16), us=9)))
    found = decide(table(), p, "two_torch")
    assert chosen(found) == ("forced", "two_torch", 16) and "user record" in found.reason
    assert chosen(decide(table(), p, "four_torch")) == ("forced", "four_torch", 64)


def test_directions_choose_each_for_itself(shelf: Shelves) -> None:
    p = problem(grad=True)
    shelf.put("user", record(p, outcome("one_torch"), direction="backward"))
    found = decide(table(), p, None)
    assert found.backward is not None and found.backward.variant.name == "one_torch" and found.source("backward").tier == "user"
    assert chosen(found) == ("estimate", "three_torch", 64) and found.missed
    shelf.put("user", record(p, outcome("two_torch")))
    assert chosen(decide(table(), p, None)) == ("user", "two_torch", 64) and not decide(table(), p, None).missed


def test_next_best_of_a_record_whose_best_may_not_run(shelf: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    shelf.put("user", record(p, outcome("one_torch", us=5), outcome("two_torch", us=7), outcome("four_torch", us=9)))
    assert chosen(decide(table(), p, None))[:2] == ("user", "one_torch")
    monkeypatch.setattr(advisories, "known", lambda: deny("one_torch"))
    assert chosen(decide(table(), p, None))[:2] == ("user", "two_torch")
    monkeypatch.setattr(advisories, "known", lambda: deny("one_torch", config={"C": {"max": 32}}))
    assert chosen(decide(table(), p, None))[:2] == ("user", "one_torch")


def test_configs_of_a_record(shelf: Shelves) -> None:
    """A config of the variant's type is taken though it is not declared; one of other fields or types is not."""
    p = problem()
    shelf.put("user", record(p, outcome("one_torch", TorchConfig(128))))
    assert chosen(decide(table(), p, None)) == ("user", "one_torch", 128)
    for config in ({"D": 64}, {"C": "64"}, {"C": True}, {"C": 64, "D": 1}):
        bad = outcome("one_torch").model_copy(update={"config": config})
        shelf.put("user", record(p, bad))
        found = decide(table(), p, None)
        assert found.tier == "estimate" and any("may run here" in note for note in found.sources[0].notes)


def test_failed_proofs_are_refusals(shelf: Shelves) -> None:
    """What was wrong here runs no more, not even named; also at neighbouring lengths; another default config takes its place."""
    p = problem()
    shelf.put("user", record(p, *(outcome("three_torch", TorchConfig(c), status="wrong") for c in (64, 32))))
    for q in (p, problem(512)):
        assert chosen(decide(table(), q, "three_torch")) == ("forced", "three_torch", 16)
        assert chosen(decide(table(), q, None)) == ("estimate", "three_torch", 16)
    shelf.put(
        "user", record(p, *(outcome("three_torch", TorchConfig(c), status=s) for c, s in ((64, "wrong"), (32, "racy"), (16, "crash"))))
    )
    found = decide(table(), p, "three_torch")
    assert found.forward is None and {r.code for v in found.considered for r in v.refusals} == {RefusalCode.PROOF}
    assert chosen(decide(table(), p, None)) == ("estimate", "two_torch", 64)
    shelf.put("user", record(p, *(outcome("three_torch", TorchConfig(c), status="wrong", code="0" * 24) for c in (64, 32, 16))))
    assert chosen(decide(table(), p, None)) == ("estimate", "three_torch", 64)  # that code is gone


def test_demoted_variants_give_way(shelf: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    monkeypatch.setattr(advisories, "known", lambda: deny("three_torch", "two_torch", action="demote"))
    assert chosen(decide(table(), p, None))[:2] == ("estimate", "one_torch")
    monkeypatch.setattr(advisories, "known", lambda: deny(*NAMES, action="demote"))
    assert chosen(decide(table(), p, None))[:2] == ("estimate", "three_torch")
    shelf.put("user", record(p, outcome("two_torch")))
    assert chosen(decide(table(), p, None))[:2] == ("user", "two_torch")  # measured here, and proven


def test_the_estimate_weighs_every_config() -> None:
    """Whatever the cost function likes best; the first declared of those that it likes equally."""
    base = table()
    variants = tuple(
        v if v.name == "reference" else dataclasses.replace(v, cost=lambda p, c, d: float(c.C)) for v in base.variants
    )  # fmt: skip
    found = decide(dataclasses.replace(base, variants=variants), problem(), None)
    assert found.forward is not None and found.forward.config.C == 16
    same = tuple(v if v.name == "reference" else dataclasses.replace(v, cost=lambda p, c, d: 1.0) for v in base.variants)
    found = decide(dataclasses.replace(base, variants=same), problem(), None)
    assert found.forward is not None and found.forward.config.C == 64


# -- through handles ---------------------------------------------------------------------------------------------------------


def key_of(handle: Any, args: Any) -> Any:
    _, tensors, options, _, _ = handle.contract(*args)
    return registry.get_recurrence("scalar_decay").problem(tensors, options, False).key()


def test_a_call_follows_new_records(shelf: Shelves) -> None:
    """A record that is put changes the next call's plan, and explain says where it comes from."""
    handle, args = fd.op("retention"), qkv()
    before = handle.bridge.plans.lookup(*handle.contract(*args)[1:3], False, None)
    assert before.decision.tier == "estimate" and before.forward_config == TorchConfig(32)
    from fla_dispatch.tuning.store import get_store

    get_store().put(shelf.environment, record(key_of(handle, args), outcome("chunk_torch", TorchConfig(16))))
    after = handle.bridge.plans.lookup(*handle.contract(*args)[1:3], False, None)
    assert after.decision.tier == "user" and after.forward_config == TorchConfig(16)
    torch.testing.assert_close(handle(*args)[0], fd.op("retention", mode="reference")(*args)[0], rtol=1e-4, atol=1e-4)
    explained = handle.explain(*args)
    assert explained.tier == "user" and "measured" in explained.reason and explained.provenance[0]["record"]["origin"] == "measured"
    assert "10" in explained.to_text() and explained.to_dict()["provenance"][0]["path"]
    row = next(r for r in explained.rows if r.name == "chunk_torch")
    assert row.measured == {"forward": pytest.approx(1e-5)}


def test_nearest_records_are_shown_on_a_miss(shelf: Shelves) -> None:
    handle, args = fd.op("retention"), qkv()
    far = dataclasses.replace(key_of(handle, args), T=4096, mean_length=4096, K=32)
    shelf.put("user", record(far, outcome("chunk_torch")))
    text = handle.explain(*args).to_text()
    assert "nearest record" in text and "K: here 16, there 32" in text and "T: here 32, there 4096" in text


def test_miss_policy(shelf: Shelves) -> None:
    handle, args = fd.op("retention"), qkv(33)
    miss.missed.clear()
    handle(*args)
    assert key_of(handle, args) in miss.missed
    with settings.override(miss="error"):
        with pytest.raises(MissError, match="warmup"):
            handle(*args)
        fd.op("retention", mode="reference")(*args)  # a person decided
        assert "raises MissError" in handle.explain(*args).reason
        shelf.put("user", record(key_of(handle, args), outcome("chunk_torch", TorchConfig(32))))
        handle(*args)
    with settings.override(miss="error", cache_dir=settings.current.cache_dir), pytest.raises(MissError):
        handle(*qkv(100))


def test_tuning_on_a_miss(shelf: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    """miss=tune measures in the call; not under torch.distributed, where ranks would choose each for itself."""
    monkeypatch.setattr(search, "tune", functools.partial(search.tune, isolate=False, key_seconds=0.01))
    handle, args = fd.op("retention"), qkv(35)
    with settings.override(miss="tune"):
        monkeypatch.setattr(miss, "_why_not_now", lambda problem: "there are ranks")
        monkeypatch.setattr(miss, "_told", False)
        with pytest.warns(UserWarning, match="not tuned, since there are ranks"):
            handle(*args)
    monkeypatch.undo()
    monkeypatch.setattr(search, "tune", functools.partial(search.tune, isolate=False, key_seconds=0.01))
    assert handle.explain(*args).tier == "estimate"
    with settings.override(miss="tune"):
        assert "measures it first" in handle.explain(*args).reason
        handle(*args)
    assert handle.explain(*args).tier == "user"


def test_when_a_miss_is_not_tuned() -> None:
    assert miss._why_not_now(problem()) == ""
    assert "captured" in miss._why_not_now(dataclasses.replace(problem(), capture=True))


def test_refusals_of_a_forced_variant_name_the_advisory(monkeypatch: pytest.MonkeyPatch) -> None:
    with settings.override():
        monkeypatch.setattr(advisories, "known", lambda: deny("chunk_torch"))
        with pytest.raises(RefusedError, match=r"advisory\.denied: T-1"):
            fd.op("retention", mode="chunk_torch")(*qkv(21))
        assert fd.op("retention").explain(*qkv(21)).tier == "reference"
    monkeypatch.undo()
    with settings.override():
        assert fd.op("retention").explain(*qkv(21)).tier == "estimate"


def test_every_permutation_decides_alike() -> None:
    found = {chosen(decide(table(order), problem(grad=True), None)) for order in itertools.permutations(NAMES)}
    assert found == {("estimate", "three_torch", 64)}


def test_pydantic_waits_for_the_first_plan(tmp_path: Path) -> None:
    code = """
import sys, torch
import fla_dispatch as fd
handle = fd.op("retention")
assert "pydantic" not in sys.modules and "platformdirs" not in sys.modules
x = torch.randn(1, 20, 2, 16)
handle(x, x, x)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
