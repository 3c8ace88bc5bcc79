"""Lock files: the same decisions elsewhere, or a refusal that says what differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planting import qkv
from test_cli import run  # noqa: F401  the command line as a fixture
from tiering import CPU, Shelves, outcome, problem, record, shelves

import fla_dispatch as fd
from fla_dispatch import registry, settings
from fla_dispatch.dispatch import locking
from fla_dispatch.errors import LockError
from fla_dispatch.kernels.scalar_decay.configs import TorchConfig
from fla_dispatch.tuning import lock
from fla_dispatch.tuning.lock import Entry


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelves]:
    with shelves(tmp_path) as found:
        yield found


def call_key(T: int = 20) -> Any:
    handle = fd.op("retention")
    _, tensors, options, _, _ = handle.contract(*qkv(T))
    return registry.get_recurrence("scalar_decay").problem(tensors, options, False).key()


def ran(T: int = 20) -> Any:
    handle = fd.op("retention")
    return handle.bridge.plans.lookup(*handle.contract(*qkv(T))[1:3], False, None).decision


def test_locked_decisions_outlive_records(shelf: Shelves, tmp_path: Path) -> None:
    """Whatever is measured later, the lock decides; a person's naming wins over it."""
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(16))))
    path = tmp_path / "decisions.lock"
    digest = lock.write(path, locking.entries(CPU))
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(64), us=1)))
    with settings.override(lock=str(path)):
        found = ran()
        assert found.tier == "lock" and found.forward.config == TorchConfig(16) and digest in found.reason
        fd.op("retention")(*qkv(20))
        assert fd.op("retention", mode="reference").explain(*qkv(20)).tier == "forced"
        assert digest in fd.op("retention").explain(*qkv(20)).to_text()
    assert ran().tier == "user" and ran().forward.config == TorchConfig(64)


def test_a_key_that_is_not_locked(shelf: Shelves, tmp_path: Path) -> None:
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(16))))
    path = tmp_path / "decisions.lock"
    lock.write(path, locking.entries(CPU))
    with settings.override(lock=str(path)):
        with pytest.raises(LockError, match=r"(?s)T=64.*nearest locked key: .*T=32"):
            fd.op("retention")(*qkv(50))
        explained = fd.op("retention").explain(*qkv(50))
        assert explained.tier == "refused" and "LockError" in explained.reason
    lock.write(path, locking.entries(CPU, [call_key(50)]))  # an estimate is locked as well as a measurement
    with settings.override(lock=str(path)):
        assert ran(50).tier == "lock"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"kernel_hash": "0" * 24}, "its code differs: locked 000000"),
        ({"variant": "sweep_triton"}, "here it is refused: device.kind"),
        ({"variant": "gone_torch"}, "no variant here"),
        ({"config": '{"C": "x"}'}, "no config of it"),
        ({"environment": "h200-sm90-132u-144g/triton3.6.0-ptxas12.8.93-eager"}, r"slug: here cpu.*locked h200"),
    ],
)
def test_differences_refuse(shelf: Shelves, tmp_path: Path, change: dict[str, str], says: str) -> None:
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(16))))
    entries = [dataclasses.replace(e, **change) for e in locking.entries(CPU)]
    if "variant" in change and change["variant"] in [v.name for v in registry.get_recurrence("scalar_decay").variants]:
        from fla_dispatch.tuning.hashing import kernel_hash

        code = kernel_hash(registry.get_recurrence("scalar_decay").variant(change["variant"]))
        entries = [dataclasses.replace(e, kernel_hash=code) for e in entries]
    path = tmp_path / "decisions.lock"
    lock.write(path, entries)
    with settings.override(lock=str(path)), pytest.raises(LockError, match=says):
        fd.op("retention")(*qkv(20))


def test_other_regime_serves(shelf: Shelves, tmp_path: Path) -> None:
    """A capture takes the decision of eager calls where the file has none of its own, so that both stay the same."""
    graph = dataclasses.replace(shelf.environment, regime="graph")
    entry = Entry(shelf.environment.directory, "scalar_decay", "k", "forward", "v", "null", "h")
    own = dataclasses.replace(entry, environment=graph.directory, variant="w")
    assert lock.Lock("x", "", (entry,)).find(graph, "scalar_decay", "k", "forward") is entry
    assert lock.Lock("x", "", (entry, own)).find(graph, "scalar_decay", "k", "forward") is own


def test_files(tmp_path: Path) -> None:
    entry = Entry("e", "r", "k", "forward", "v", '{"A": 1}', "h")
    other = dataclasses.replace(entry, key="l", config="null")
    path = tmp_path / "x.lock"
    digest = lock.write(path, [other, entry])
    assert lock.read(path).entries == (entry, other) and digest == lock.digest([entry, other]) == lock.read(path).digest
    assert lock.digest([entry]) != lock.digest([dataclasses.replace(entry, config='{"A": 2}')])
    with pytest.raises(LockError, match="two decisions"):
        lock.write(path, [entry, dataclasses.replace(entry, variant="w")])
    path.write_text(path.read_text().replace('"v"', '"w"', 1))
    with pytest.raises(LockError, match="edited"):
        lock.read(path)
    for text in ("", "[]", "{}", '{"lock_version": 1, "digest": "", "entries": [1]}', '{"lock_version": 9, "digest": "", "entries": []}'):
        path.write_text(text)
        with pytest.raises(LockError, match="lock"):
            lock.read(path)
    with settings.override(lock=str(tmp_path / "none.lock")), pytest.raises(LockError, match="unset FLA_DISPATCH_LOCK"):
        fd.op("retention")(*qkv(20))


def test_differences() -> None:
    a = Entry("e", "r", "k", "forward", "v", '{"A": 1}', "h")
    b = dataclasses.replace(a, variant="w")
    assert lock.differences([a], [a]) == []
    assert lock.differences([a], [b]) == ['r k forward in e: locked v {"A": 1} code h, now w {"A": 1} code h']
    assert "now nothing" in lock.differences([a], [])[0] and "locked nothing" in lock.differences([], [a])[0]


def test_nothing_to_lock(shelf: Shelves, tmp_path: Path, run: Any) -> None:  # noqa: F811  the fixture
    path = tmp_path / "decisions.lock"
    code, _, err = run("lock", str(path), "--device", "cpu")
    assert code == 2 and "warmup" in err and not path.exists()


def test_command(shelf: Shelves, tmp_path: Path, run: Any) -> None:  # noqa: F811  the fixture
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(16))))
    path = str(tmp_path / "decisions.lock")
    code, out, _ = run("lock", path, "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["entries"] == 1 and len(lock.read(Path(path)).entries) == 1
    assert run("lock", path, "--device", "cpu", "--check")[0] == 0
    shelf.put("user", record(call_key(), outcome("chunk_torch", TorchConfig(64), us=1)))
    code, out, _ = run("lock", path, "--device", "cpu", "--check", "--json")
    assert code == 1 and '{"C": 16}' in json.loads(out)["differences"][0]
    sizes = ["--op", "retention", "--heads", "2", "--head-dim", "16", "--dtype", "float32", "--batch", "2", "--length", "100"]
    code, out, _ = run("lock", path, "--device", "cpu", *sizes, "--json")
    assert code == 0 and json.loads(out)["entries"] == 3  # the record's, and two directions of a training call
    assert problem().key().text()
