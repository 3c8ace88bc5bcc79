"""The `fla-dispatch cache` commands: what they print, write and remove."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import HERE, key, record

from fla_dispatch import cli, settings
from fla_dispatch.tuning.store import StoreWarning, get_store


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path) -> Iterator[None]:
    with settings.override(cache_dir=str(tmp_path / "cache"), cache_path=()):
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run("list") -> (exit code, stdout, stderr) of `fla-dispatch cache list`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fla-dispatch", "cache", *map(str, arguments)])
        get_store().reload()
        with pytest.raises(SystemExit) as leave:
            cli.main()
        captured = capsys.readouterr()
        return int(leave.value.code or 0), captured.out, captured.err

    return call


def test_cache_list_and_show(run: Any, tmp_path: Path) -> None:
    assert run("list")[:2] == (0, "no records; `fla-dispatch cache path` says where they are looked for\n")
    get_store().put(HERE, record())
    _, out, _ = run("list", "--json")
    (row,) = json.loads(out)["records"]
    assert row["key"] == key() and row["choice"] == 'a{"BT":64}' and row["median_us"] == 10.0 and row["tier"] == "user"
    assert key() in run("list")[1] and "10 us" in run("list")[1]
    for part in ("T=1024", Path(row["source"]).name[:8]):
        code, out, _ = run("show", part)
        assert code == 0 and 'a{"BT":64}' in out and HERE.directory in out
        assert json.loads(run("show", part, "--json")[1])[0]["record"]["key"] == key()
    code, _, err = run("show", "T=7")
    assert code == 2 and "T=7" in err
    code, _, err = run("list", "--tier", "mine")
    assert code == 2 and "user, site, shipped" in err


def test_cache_path(run: Any, tmp_path: Path) -> None:
    assert [row["tier"] for row in json.loads(run("path", "--json")[1])] == ["user", "shipped"]
    assert str(tmp_path / "cache" / "v1") in run("path")[1]


def test_cache_pack_is_deterministic_and_read_again(run: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for T in (2048, 512):
        get_store().put(HERE, record(key(T)))
    code, out, _ = run("pack", "--out", site, "--shipped", "--json")
    assert code == 0 and json.loads(out)["records"] == 2
    pack = site / HERE.directory / "scalar_decay.jsonl"
    text = pack.read_text()
    assert run("pack", "--out", site, "--shipped")[0] == 0 and pack.read_text() == text
    with settings.override(cache_dir=str(tmp_path / "other"), cache_path=(str(site),)):
        hit = get_store().lookup(HERE, "scalar_decay", key(512), "forward")
        assert hit is not None and hit.tier == "site" and hit.record.origin == "shipped"
    get_store().put(HERE, record(key(64)))
    run("pack", "--out", site)
    assert len(pack.read_text().splitlines()) == 3


def test_cache_export_import_merge(run: Any, tmp_path: Path) -> None:
    get_store().put(HERE, record(median=5.0, variant="b"))
    file = tmp_path / "records.jsonl"
    assert run("export", file)[0] == 0
    theirs = str(tmp_path / "theirs")
    with settings.override(cache_dir=theirs):
        get_store().put(HERE, record(median=9.0))
        get_store().put(HERE, record(key(64)))
        assert json.loads(run("import", file, "--json")[1]) == {"new": 0, "changed": 1, "same": 0, "unkept": 0}
        assert json.loads(run("import", file, "--json")[1])["same"] == 1
        hit = get_store().lookup(HERE, "scalar_decay", key(), "forward")
        assert hit is not None and {o.variant for o in hit.record.outcomes} == {"a", "b"} and hit.record.choice.variant == "b"  # type: ignore[union-attr]
    assert json.loads(run("merge", theirs, "--json")[1]) == {"new": 1, "changed": 1, "same": 0, "unkept": 0}
    assert json.loads(run("merge", theirs, "--json")[1])["same"] == 2
    file.write_text(file.read_text() + "{}\n")
    code, _, err = run("import", file)
    assert code == 2 and f"{file}:2" in err
    assert run("merge", tmp_path / "nowhere")[0] == 2 and run("export", tmp_path / "records.jsonl" / "x")[0] == 2


def test_cache_import_says_when_nothing_persists(run: Any, tmp_path: Path) -> None:
    get_store().put(HERE, record())
    file = tmp_path / "records.jsonl"
    run("export", file)
    with settings.override(cache_dir=str(file)), pytest.warns(StoreWarning):
        code, out, _ = run("import", file)
    assert code == 1 and "unkept: 1" in out


def test_cache_gc(run: Any) -> None:
    store = get_store()
    store.put(HERE, record(created="2020-01-01T00:00:00+00:00"))
    store.put(HERE, record(key(64)))
    bad = next(Path(store.user_dir or "").rglob("*.json")).with_name("bad.json")
    bad.write_text("{")
    with pytest.warns(StoreWarning):
        assert str(bad) in run("gc", "--dry-run")[1] and bad.exists()
    with pytest.warns(StoreWarning):
        run("gc")
    assert not bad.exists() and json.loads(run("gc", "--json")[1]) == {"removed": []}
    run("gc", "--older-than", "1000")
    get_store().reload()
    assert [hit.record.key for hit in get_store().records()] == [key(64)]
    assert "its code is gone" in run("gc", "--stale")[1]
    get_store().reload()
    assert not get_store().records()
