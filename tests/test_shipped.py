"""The shipped records: each is readable, was made by the code that is here, names configs that exist, and is found."""

from __future__ import annotations

from pathlib import Path

import pytest

import fla_dispatch as fd
from benchmarks.regret import regrets, summary
from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.keys import parse_key

DATA = Path(stores.__file__).parent / "data"
H200 = "h200-sm90-132u-144g/triton3.6.0-ptxas12.8.93-eager"


@pytest.fixture(scope="module")
def shipped() -> stores.Store:
    return stores.Store(None, (), DATA)


def test_every_record_is_readable_and_made_by_this_code(shipped: stores.Store) -> None:
    table = registry.get_recurrence("scalar_decay")
    hashes = {v.name: kernel_hash(v) for v in table.variants}
    records = [found.record for found in shipped.records(Environment.parse(H200), "scalar_decay", "shipped")]
    assert len(records) >= 1900
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
    """Where its choice was timed: at most a quarter slower than the best. The rest was estimated too slow to be timed, then refitted."""
    found = summary(regrets(DATA))
    assert found["records"] >= 1900 and found["untimed"] <= 0.15 * found["records"]
    assert found["worst"] <= 1.25 and found["geometric_mean"] <= 1.02


@pytest.mark.parametrize("rows", [1, 4])
def test_a_call_finds_them(monkeypatch: pytest.MonkeyPatch, shipped: stores.Store, rows: int) -> None:
    monkeypatch.setattr(stores, "get_store", lambda: shipped)
    monkeypatch.setattr(stores, "_stores", {})
    monkeypatch.setattr(stores, "SHIPPED", DATA)
    why = fd.explain("simple_gla", device="sm90", B=rows, H=64 // rows, T=4096, K=128, V=128, grad=True)
    assert why.tier in ("shipped", "sibling")  # sibling where another Triton is installed
    assert "2026" in why.reason
