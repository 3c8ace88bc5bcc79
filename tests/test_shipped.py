"""The shipped records: each is readable, was made by the code that is here, names configs that exist, and is found; and their keys."""

from __future__ import annotations

import itertools
import math
import tomllib
from pathlib import Path

import pytest

import fla_dispatch as fd
from benchmarks import peers
from benchmarks.regret import regrets, summary
from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.keys import expand, key_of, parse_key

DATA = Path(stores.__file__).parent / "data"
H200 = "h200-sm90-132u-144g/triton3.6.0-ptxas12.8.93-eager"
KEYS = Path(__file__).parents[1] / "benchmarks" / "shipped.toml"

#: Records of a recurrence that are shipped at the least, both directions counted.
LEAST = {"scalar_decay": 2700, "scalar_step": 160, "delta": 580, "delta_step": 90}


@pytest.fixture(scope="module")
def shipped() -> stores.Store:
    return stores.Store(None, (), DATA)


def test_what_is_shipped() -> None:
    """A recurrence that is shipped for the first time is named in LEAST."""
    assert {path.stem for path in (DATA / H200).glob("*.jsonl")} == LEAST.keys()


@pytest.mark.parametrize("recurrence", LEAST)
def test_every_record_is_readable_and_made_by_this_code(shipped: stores.Store, recurrence: str) -> None:
    table = registry.get_recurrence(recurrence)
    hashes = {v.name: kernel_hash(v) for v in table.variants}
    records = [found.record for found in shipped.records(Environment.parse(H200), recurrence, "shipped")]
    assert len(records) >= LEAST[recurrence]
    assert not shipped.unreadable
    for record in records:
        assert record.choice is not None and record.origin == "shipped"
        outcome = record.outcome()
        assert outcome is not None and outcome.status == "ok" and outcome.certificate is not None and outcome.timing is not None
        assert outcome.kernel_hash == hashes[outcome.variant], f"{record.key}: made by other kernels; tune again, or drop it"
        key = parse_key(record.key, hypothetical("sm90"))
        variant = table.variant(outcome.variant)
        assert outcome.config in [c._asdict() for c in variant.configs(key)], record.key
        for name, error in outcome.certificate.errors.items():
            assert error <= outcome.certificate.tolerances[name], (record.key, name)


def test_the_estimate_is_close_to_what_was_measured(shipped: stores.Store) -> None:
    """Where its choice was timed: 1 % slower than the best on average, more than a quarter in one record of 200, never 1.7 times as slow.
    The rest was estimated too slow to be timed, then refitted."""
    found = summary(regrets(DATA))
    assert found["records"] >= sum(LEAST.values()) and found["untimed"] <= 0.25 * found["records"]
    assert found["worst"] <= 1.7 and found["geometric_mean"] <= 1.015 and found["above_1.25"] <= 0.005 * found["records"]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_call_finds_them(monkeypatch: pytest.MonkeyPatch, shipped: stores.Store, rows: int) -> None:
    monkeypatch.setattr(stores, "get_store", lambda: shipped)
    monkeypatch.setattr(stores, "_stores", {})
    monkeypatch.setattr(stores, "SHIPPED", DATA)
    why = fd.explain("simple_gla", device="sm90", B=rows, H=64 // rows, T=4096, K=128, V=128, grad=True)
    assert why.tier in ("shipped", "sibling")  # sibling where another Triton is installed
    assert "2026" in why.reason


def test_the_keys_to_ship_hold_the_calls_of_the_benchmarks() -> None:
    """Of the delta rules each exactly, and whatever lies between the keys beside one of them."""
    h200 = hypothetical("sm90")
    rows = [row for row in tomllib.loads(KEYS.read_text())["keys"] if "gated_delta" in str(row["op"]) or "kda" in str(row["op"])]
    keys = {key.text() for row in rows for _, key in expand(row, h200)}
    assert 400 <= len(keys) <= 700
    for case in peers.DELTA:
        B, T, H, D = case.shape
        states = {"initial_state": case.decode, "final_state": case.decode}
        assert key_of(case.op, {"B": B, "T": T, "H": H, "D": D}, h200, grad=not case.decode, **states).text() in keys, case
        if case.decode:
            step = key_of(f"{case.op}_step", {"B": B, "H": H, "D": D}, h200, options={"pool": "slots"})
            assert any(stores.key_distance(step.text(), key) < math.inf for key in keys), case
    for T, H, grad in itertools.product((33, 64, 100, 700, 3000, 20000), (2, 6, 24, 50, 100), (False, True)):
        for op in ("delta", "gated_delta", "kda", "comba"):
            text = key_of(op, {"B": 1, "T": T, "H": H, "D": 128}, h200, grad=grad).text()
            assert any(stores.key_distance(text, key) < math.inf for key in keys), text


def test_updates_of_a_product_need_no_keys_of_their_own() -> None:
    h200 = hypothetical("sm90")
    for options, n, like in (
        ({}, 2, "gated_delta"),
        ({"raw": True}, 2, "gated_delta"),
        ({"num_householder": 3, "ungated": True}, 3, "delta"),
    ):
        product = key_of("delta_product", {"B": 1, "T": 512, "H": 16, "D": 128}, h200, grad=True, options=options)
        assert product == key_of(like, {"B": 1, "T": 512 * n, "H": 16, "D": 128}, h200, grad=True)
