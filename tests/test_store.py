"""The store under concurrent writers, killed writers, bad files and full disks; its tiers, neighbours and siblings."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stored import HERE, key, record

from fla_dispatch import settings, tuning
from fla_dispatch.tuning import packs
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.store import Store, StoreWarning, get_store, key_distance, split_key

#: A child process: makes a store of argv[1] and `record(i)`; it loads neither torch nor triton.
CHILD = """
import os, signal, sys
from fla_dispatch.tuning.choice import make_record
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.records import Outcome
from fla_dispatch.tuning.store import Store

env = Environment("h200-sm90-132u-144g", "3.6.0", "ptxas12.8.93")
store = Store(sys.argv[1])

def record(key, detail=""):
    outcome = Outcome(variant="a", kernel_hash="h", status="crash", detail=detail)
    return make_record("scalar_decay", key, "forward", [outcome], default="a", order=["a"])
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD + code, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path) -> Iterator[None]:
    with settings.override(cache_dir=str(tmp_path / "cache"), cache_path=()):
        yield


@pytest.fixture
def silent() -> Iterator[None]:
    """Any warning of a store fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        yield


# ---- writers ----


def test_concurrent_writers_lose_nothing(tmp_path: Path, silent: None) -> None:
    """Eight processes of 200 records each, half of the keys written by all of them."""
    code = """
for i in range(200):
    assert store.put(env, record(f"shared {i}" if i % 2 else f"{sys.argv[2]} {i}"))
"""
    writers = [child(code, tmp_path, n) for n in range(8)]
    for writer in writers:
        assert writer.wait(timeout=100) == 0, writer.communicate()[1]
    keys = {hit.record.key for hit in Store(tmp_path).records(HERE)}
    assert keys == {f"shared {i}" for i in range(1, 200, 2)} | {f"{n} {i}" for n in range(8) for i in range(0, 200, 2)}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "death",
    [
        pytest.param("os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", id="before_replace"),
        pytest.param(
            "import pathlib\n"
            "def half(path, content, encoding):\n"
            "    with open(path, 'w') as file:\n"
            "        file.write(content[:len(content) // 2]); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            "pathlib.Path.write_text = half",
            id="half_written",
        ),
    ],
)
def test_a_killed_writer_leaves_the_record_before_it(tmp_path: Path, silent: None, death: str) -> None:
    writer = child(f'\nstore.put(env, record("k", "before"))\n{death}\nstore.put(env, record("k", "after"))', tmp_path)
    assert writer.wait(timeout=60) == -signal.SIGKILL
    (hit,) = Store(tmp_path).records(HERE)
    assert hit.record.outcomes[0].detail == "before"
    (part,) = tmp_path.rglob("*.tmp")
    assert not packs.garbage(Store(tmp_path)), "it might be that of a living writer"
    os.utime(part, (0, 0))
    assert [path for path, _ in packs.garbage(Store(tmp_path))] == [part]


def test_a_writer_killed_at_any_moment(tmp_path: Path, silent: None) -> None:
    """Four writers that replace two large records without end, killed while they do: what is readable is whole."""
    code = """
print("started", file=sys.stderr, flush=True)
for i in range(10**9):
    store.put(env, record(f"k{i % 2}", f"{i} " * 200_000 + "end"))
"""
    writers = [child(code, tmp_path) for _ in range(4)]
    for n, writer in enumerate(writers):
        assert writer.stderr is not None and writer.stderr.readline() == "started\n"
        threading.Event().wait(0.15 + 0.07 * n)
        writer.kill()
        writer.wait(timeout=60)
    found = Store(tmp_path).records(HERE)
    assert found and all(hit.record.outcomes[0].detail.endswith("end") for hit in found)


# ---- bad files ----


def damaged(text: str) -> dict[str, str]:
    """What may stand in a record's place, by name."""
    return {
        "empty": "",
        "truncated": text[: len(text) // 2],
        "no JSON": "\x00\x01 binary",
        "other JSON": "[1, 2]",
        "newer": text.replace('"schema_version":1', '"schema_version":2'),
        "another key": text.replace("T=1024", "T=2048"),
        "missing field": text.replace('"status"', '"stature"'),
    }


@pytest.mark.parametrize("name", damaged(""))
@pytest.mark.parametrize("packed", [False, True], ids=["file", "pack"])
def test_what_is_no_record_is_a_miss_with_one_warning(tmp_path: Path, name: str, packed: bool) -> None:
    good = record(key(512))
    Store(tmp_path).put(HERE, good)
    Store(tmp_path).put(HERE, record())
    path = next(p for p in tmp_path.rglob("*.json") if "T=1024" in p.read_text())
    bad = damaged(path.read_text())[name]
    if packed:
        path.unlink()
        if name == "another key":
            bad = bad.replace("T=2048", "T=1024").replace('"forward"', '"sideways"')
        path.parent.with_suffix(".jsonl").write_text(bad + "\n")
    else:
        path.write_text(bad)
    store = Store(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert store.lookup(HERE, "scalar_decay", key(), "forward") is None
            assert [hit.record for hit in store.records(HERE)] == [good]
            store.nearest(HERE, "scalar_decay", key(), "forward")
            store.reload()
    expected = 0 if packed and name == "empty" else 1  # an empty pack is a pack without records
    assert len(caught) == expected and all(w.category is StoreWarning for w in caught)
    assert len({u.source for u in store.unreadable}) == expected
    assert store.put(HERE, record()), "and it is replaced like any other"
    assert Store(tmp_path).lookup(HERE, "scalar_decay", key(), "forward") is not None


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    Store(tmp_path).put(HERE, record())
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.warns(StoreWarning):
        assert Store(tmp_path).lookup(HERE, "scalar_decay", key(), "forward") is None


def test_foreign_files_and_directories_are_left_alone(tmp_path: Path, silent: None) -> None:
    store = Store(tmp_path)
    store.put(HERE, record())
    folder = tmp_path / HERE.directory
    (tmp_path / "README").write_text("x")
    (tmp_path / "other" / "thing").mkdir(parents=True)
    (folder / "notes.txt").write_text("x")
    (folder / "scalar_decay" / "notes.txt").write_text("x")
    assert len(Store(tmp_path).records()) == 1 and Store(tmp_path).environments() == [HERE]
    assert not packs.garbage(Store(tmp_path))


def test_fields_in_another_order_serve_too(tmp_path: Path, silent: None) -> None:
    pack = tmp_path / HERE.directory / "scalar_decay.jsonl"
    pack.parent.mkdir(parents=True)
    fields = record().model_dump(mode="json")
    pack.write_text(json.dumps(dict(reversed(fields.items()))) + "\n" + record(key(2048)).to_json() + "\n\n")
    assert {hit.record.key for hit in Store(None, [tmp_path]).records()} == {key(), key(2048)}


# ---- disks that do not take records ----


def refuses(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def check_memory(store: Store, files: Path) -> None:
    """Records are kept, with one warning in all, and no part stays behind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for T in (512, 1024):
            assert store.put(HERE, record(key(T))) is False
    assert [w.category for w in caught] == [StoreWarning]
    store.reload()
    assert {hit.record.key for hit in store.records(HERE)} == {key(512), key(1024)}
    found = store.lookup(HERE, "scalar_decay", key(), "forward")
    assert found is not None and (found.tier, found.source) == ("user", "memory")
    assert store.nearest(HERE, "scalar_decay", key(2048), "forward") and not (files.is_dir() and list(files.rglob("*.tmp")))


@pytest.mark.parametrize("code", ["EROFS", "ENOSPC", "EBUSY", "EACCES", "ENOENT"])
def test_a_directory_that_refuses_degrades_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(os, "replace", refuses(getattr(errno, code)))
    check_memory(Store(tmp_path), tmp_path)


def test_a_path_below_a_file_degrades_to_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_memory(Store(tmp_path / "file" / "below"), tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A real short write: the process may write files of 4 KiB, the second record is larger."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
assert store.put(env, record("k", "small")) is True
assert store.put(env, record("k", "x" * 100_000)) is False
assert len(store.lookup(env, "scalar_decay", "k", "forward").record.outcomes[0].detail) == 100_000
"""
    writer = child(code, tmp_path)
    _, text = writer.communicate(timeout=60)
    assert writer.returncode == 0 and text.count("StoreWarning") == 1, text
    (hit,) = Store(tmp_path).records(HERE)
    assert hit.record.outcomes[0].detail == "small" and not list(tmp_path.rglob("*.tmp"))


def test_without_a_directory_records_stay_in_memory(silent: None) -> None:
    store = Store(None)
    assert store.put(HERE, record()) is False and len(store.records()) == 1


# ---- finding ----


def test_tiers_in_order(tmp_path: Path, silent: None) -> None:
    roots = [tmp_path / name for name in ("user", "site1", "site2", "shipped")]
    for n, root in enumerate(roots):
        Store(root).put(HERE, record(median=float(n)))
    store = Store(roots[0], roots[1:3], roots[3])
    for n, tier in enumerate(["user", "site", "site", "shipped"]):
        hit = store.lookup(HERE, "scalar_decay", key(), "forward")
        assert hit is not None and hit.tier == tier and hit.record.outcomes[0].timing.median_us == n
        assert len(store.records()) == 1 and len(store.records(tier=tier)) == (2 if n == 1 else 1)
        Path(hit.source).unlink()
        store.reload()
    assert store.lookup(HERE, "scalar_decay", key(), "forward") is None


def test_directions_recurrences_and_environments_are_apart(tmp_path: Path, silent: None) -> None:
    store = Store(tmp_path)
    store.put(HERE, record(direction="backward"))
    for name in (("scalar_decay", key(), "forward"), ("delta", key(), "backward"), ("scalar_decay", key(64), "backward")):
        assert store.lookup(HERE, *name) is None
    for other in (
        Environment("h200-sm90-132u-144g", "3.6.0", "ptxas12.8.93", "graph"),
        Environment("h100-sm90-132u-80g", "3.6.0", "ptxas12.8.93"),
    ):
        assert store.lookup(other, "scalar_decay", key(), "backward") is None
    assert store.lookup(HERE, "scalar_decay", key(), "backward") is not None


def test_epochs_and_reload(tmp_path: Path, silent: None) -> None:
    """Hits and misses are remembered until something changes, and whoever keeps plans can see that it did."""
    store, other = Store(tmp_path), Store(tmp_path)
    assert store.lookup(HERE, "scalar_decay", key(), "forward") is None
    before, whole = store.epoch, tuning.epoch
    other.put(HERE, record())
    assert store.epoch == before and tuning.epoch == whole + 1
    assert store.lookup(HERE, "scalar_decay", key(), "forward") is None
    store.reload()
    assert store.epoch == before + 1 and store.lookup(HERE, "scalar_decay", key(), "forward") is not None
    store.put(HERE, record(median=1.0))
    assert store.epoch == before + 2
    assert store.lookup(HERE, "scalar_decay", key(), "forward").record.outcomes[0].timing.median_us == 1.0  # type: ignore[union-attr]


def test_nearest(tmp_path: Path, silent: None) -> None:
    store = Store(tmp_path)
    near = [key(2048), key(512), key(1024, BH=24), key(2048, BH=64)]
    far = [key(4096), key(1024, BH=80), key(K=64), key(1024, BH=32) + "&grad", key(128)]
    for k in [*near, *far, key()]:
        store.put(HERE, record(k))
    store.put(HERE, record(key(2048), direction="backward"))
    found = store.nearest(HERE, "scalar_decay", key(), "forward", limit=10)
    assert {n.found.record.key for n in found} == set(near) and found[0].found.record.key == key(1024, BH=24)
    assert [n.distance for n in found] == sorted(n.distance for n in found) and found[0].distance == pytest.approx(0.415, abs=1e-3)
    assert len(store.nearest(HERE, "scalar_decay", key(), "forward", limit=2)) == 2
    assert not store.nearest(HERE, "scalar_decay", key(1), "forward")


def test_distance_of_keys() -> None:
    assert split_key(key()) == (key().replace("&BH=32&T=1024&N=1&mean=1024", ""), (32, 1024, 1, 1024))
    assert key_distance(key(), key()) == 0 and key_distance(key(), key(2048)) == key_distance(key(2048), key()) == 2
    assert key_distance(key(0), key(1)) == 2 and key_distance("free text", "free text") == 0
    assert key_distance(key(), key(4096)) == key_distance(key(), key(V=64)) == key_distance("a", key()) == float("inf")


def test_sibling(tmp_path: Path, silent: None) -> None:
    """The most similar environment of the same architecture, in the documented order."""
    order = [
        Environment(HERE.slug, HERE.triton, HERE.compiler, "graph"),
        Environment(HERE.slug, "3.6.1", HERE.compiler),
        Environment(HERE.slug, "3.5.0", HERE.compiler),
        Environment("h100-sm90-132u-80g", HERE.triton, HERE.compiler),
    ]
    for env in (Environment("b200-sm100-148u-176g", HERE.triton, HERE.compiler), *order):
        Store(tmp_path).put(env, record())
    for expected in order:
        hit = Store(tmp_path).sibling(HERE, "scalar_decay", key(), "forward")
        assert hit is not None and hit.environment == expected and hit.environment.differences(HERE)
        Path(hit.source).unlink()
    assert Store(tmp_path).sibling(HERE, "scalar_decay", key(), "forward") is None


def test_get_store_follows_the_settings(tmp_path: Path) -> None:
    own = get_store()
    assert own is get_store() and own.user_dir == tmp_path / "cache" / "v1"
    site = tmp_path / "site"
    Store(site / "v1").put(HERE, record())
    with settings.override(cache_path=(str(site),)):
        assert get_store() is not own and [p.tier for p in get_store().places] == ["user", "site", "shipped"]
        assert get_store().lookup(HERE, "scalar_decay", key(), "forward").tier == "site"  # type: ignore[union-attr]
    assert get_store() is own


def test_threads_share_a_store(tmp_path: Path, silent: None) -> None:
    store, failures = Store(tmp_path), []

    def work(n: int) -> None:
        for i in range(40):
            store.put(HERE, record(key(BH=i + 1), median=float(n + 1)))
            found = store.lookup(HERE, "scalar_decay", key(BH=i + 1), "forward")
            if found is None or not store.nearest(HERE, "scalar_decay", key(2048, BH=i + 1), "forward"):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(store.records()) == 40


def test_the_hot_path_imports_no_pydantic(tmp_path: Path) -> None:
    """Importing the store and missing in an empty one, which is what every plan without records does, loads neither."""
    code = 'assert store.lookup(env, "scalar_decay", "k", "forward") is None and not store.nearest(env, "scalar_decay", "k", "forward")\n'
    code += "assert not {'pydantic', 'torch', 'triton'} & set(sys.modules)"
    head = "import sys\nfrom fla_dispatch.tuning.environment import Environment\nfrom fla_dispatch.tuning.store import Store\n"
    head += 'env, store = Environment("a-b-1u-1g", "1", "c"), Store(sys.argv[1])\n'
    subprocess.run([sys.executable, "-c", head + code, str(tmp_path)], check=True, timeout=60)
