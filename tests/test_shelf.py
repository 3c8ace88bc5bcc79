"""How records are read: each file once, and no further than an answer needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored import HERE, key, record

from fla_dispatch.tuning.shelf import Name, Shelf
from fla_dispatch.tuning.store import Store, StoreWarning


@pytest.fixture
def silent() -> Iterator[None]:
    """Any warning of a store fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        yield


def test_a_thousand_records_are_found_without_parsing_them(tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a pack tells its lines apart; only the record that is asked for is parsed."""
    pack = tmp_path / HERE.directory / "scalar_decay.jsonl"
    pack.parent.mkdir(parents=True)
    pack.write_text("".join(record(key(BH=n)).to_json() + "\n" for n in range(1000)))
    parsed = []
    monkeypatch.setattr(
        Store, "_parse", lambda self, text, name, original=Store._parse: (parsed.append(name), original(self, text, name))[1]
    )
    store = Store(None, (), tmp_path)
    assert (
        store.lookup(HERE, "scalar_decay", key(BH=7), "forward") is not None and store.lookup(HERE, "scalar_decay", "no", "forward") is None
    )
    assert parsed == [Name("scalar_decay", key(BH=7), "forward")]


def test_files_are_told_apart_by_how_they_begin(tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing keys reads no record to its end, and all records are read once."""
    for T in (512, 1024, 2048):
        Store(tmp_path).put(HERE, record(key(T)))
    read = []
    monkeypatch.setattr(Shelf, "_read", lambda self, path, original=Shelf._read: (read.append(Path(path)), original(self, path))[1])
    store = Store(tmp_path)
    assert set(store.keys(HERE, "scalar_decay", "forward")) == {key(T) for T in (512, 1024, 2048)}
    assert not [path for path in read if path.suffix == ".json"]
    assert len(store.records(HERE)) == len(store.records(HERE)) == 3
    assert len([path for path in read if path.suffix == ".json"]) == 3


def test_all_records_are_those_that_lookup_finds(tmp_path: Path) -> None:
    """A file that is no record hides the pack beside it and not the next tier; what memory holds comes first."""
    roots = [tmp_path / name for name in ("user", "site")]
    for n, root in enumerate(roots):
        for T in (512, 1024):
            Store(root).put(HERE, record(key(T), median=float(n)))
    folder = roots[0] / HERE.directory / "scalar_decay"
    folder.with_suffix(".jsonl").write_text("".join(path.read_text() + "\n" for path in folder.glob("*.json")))
    bad = folder / Name("scalar_decay", key(), "forward").filename
    for text in ("", record(key(64)).to_json(), bad.read_text()[:300]):
        bad.write_text(text)
        store, alone = Store(roots[0], roots[1:]), Store(roots[0], roots[1:])
        with pytest.warns(StoreWarning):
            found = {hit.record.key: (hit.tier, hit.source) for hit in store.records(HERE)}
            for T in (512, 1024):
                hit = alone.lookup(HERE, "scalar_decay", key(T), "forward")
                assert hit is not None and found[key(T)] == (hit.tier, hit.source)
                assert hit.tier == ("user" if T == 512 else "site")
    memory = Store(None, roots[1:])
    memory.put(HERE, record(median=7.0))
    memory.reload()
    assert {hit.tier for hit in memory.records(HERE)} == {"user", "site"}


def test_a_line_that_is_no_text_hides_no_other(tmp_path: Path) -> None:
    pack = tmp_path / HERE.directory / "scalar_decay.jsonl"
    pack.parent.mkdir(parents=True)
    lines = [record(key(T)).to_json().encode() for T in (512, 1024, 2048)]
    pack.write_bytes(b"\r\n".join([lines[0], lines[1][:-2] + b"\xff" + lines[1][-2:], b"", b"\xff", lines[2]]))
    store = Store(None, [tmp_path])
    with pytest.warns(StoreWarning) as caught:
        assert store.lookup(HERE, "scalar_decay", key(), "forward") is None
        found = {hit.record.key: hit.source for hit in store.records(HERE)}
    assert found == {key(512): f"{pack}:1", key(2048): f"{pack}:5"} and len(caught) == 1
    assert {u.source for u in store.unreadable} == {f"{pack}:2", f"{pack}:4"}
