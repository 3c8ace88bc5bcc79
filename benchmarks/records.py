"""What records cost: the first answer of a new process, loading 1,000 records, and one lookup. Needs no GPU.

    python -m benchmarks.records --out results

1,000 shipped records as files of their own, as one pack, and 1,000 of each kind (`both`, other keys in each). Rows of `start` are
measured in new processes after the imports (a row apart): what a process pays until the answer is there. A store is loaded when
it can answer anything, which takes an index of all keys: a hit in a pack reads the pack, a miss compares with every key there
is. Records are validated one by one when they are asked for; two rows do it for all of them, as `cache list` does.
Files are in the page cache. Medians and minima, because other programs share the machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

COUNT = 1000
SHIPPED = "h200-sm90-132u-144g/triton3.6.0-ptxas12.8.93-eager"

# each in a process of its own: (store, what is timed)
START = {
    "hit, file": ("files", lambda store, env, hit, miss: store.lookup(env, *hit)),
    "hit, pack": ("pack", lambda store, env, hit, miss: store.lookup(env, *hit)),
    "miss and neighbours, files": ("files", lambda store, env, hit, miss: answer(store, env, miss)),
    "miss and neighbours, pack": ("pack", lambda store, env, hit, miss: answer(store, env, miss)),
    "miss and neighbours, both": ("both", lambda store, env, hit, miss: answer(store, env, miss)),
    "index, files": ("files", lambda store, env, hit, miss: store.keys(env, "scalar_decay", "forward")),
    "index, pack": ("pack", lambda store, env, hit, miss: store.keys(env, "scalar_decay", "forward")),
    "index, both": ("both", lambda store, env, hit, miss: store.keys(env, "scalar_decay", "forward")),
    "index and validate, files": ("files", lambda store, env, hit, miss: store.records(env)),
    "index and validate, pack": ("pack", lambda store, env, hit, miss: store.records(env)),
}


def answer(store: Any, env: Any, name: tuple[str, str, str]) -> Any:
    """All that a decision asks of the store about a key that has no record."""
    return store.lookup(env, *name), store.nearest(env, *name), store.sibling(env, *name)


def make(root: pathlib.Path) -> None:
    """The stores `files`, `pack` and `both` below a directory, of records that are shipped; a pack is of the site."""
    from fla_dispatch.tuning.environment import Environment
    from fla_dispatch.tuning.store import SHIPPED as DATA
    from fla_dispatch.tuning.store import Store

    env = Environment.parse(SHIPPED)
    assert env is not None
    found = [hit.record for hit in Store(None, (), DATA).records(env)][:COUNT]
    assert len(found) == COUNT
    others = [r.model_copy(update={"key": r.key.replace("&K=", "&K=1")}) for r in found]
    for name, files, packed in (("files", found, []), ("pack", [], found), ("both", found, others)):
        user = Store(root / name / "user")
        kept = [user.put(env, record) for record in files]
        assert all(kept)
        pack = root / name / "site" / env.directory / "scalar_decay.jsonl"
        pack.parent.mkdir(parents=True)
        pack.write_text("".join(record.to_json() + "\n" for record in packed))


def opened(root: pathlib.Path, name: str) -> tuple[Any, Any, tuple[str, str, str], tuple[str, str, str]]:
    """A store that has read nothing, its environment, a name that it has and one that it has neighbours of."""
    from fla_dispatch.tuning.environment import Environment
    from fla_dispatch.tuning.store import Store

    key = "scalar_decay@sm90?qkv=bfloat16&K=128&V=128&group=1&BH={}&T=1024&N=1&mean=1024&decay=head,normalize=false"
    hit, miss = (("scalar_decay", key.format(BH), "forward") for BH in (64, 48))
    return Store(root / name / "user", [root / name / "site"]), Environment.parse(SHIPPED), hit, miss


def start(root: pathlib.Path, row: str) -> dict[str, float]:
    """In a new process: milliseconds of the imports, and of a row of START after them."""
    begin = time.perf_counter()
    import torch  # noqa: F401  what runs a call has it

    import fla_dispatch.tuning.records  # noqa: F401  pydantic

    imported = time.perf_counter()
    name, call = START[row]
    store, env, hit, miss = opened(root, name)
    ready = time.perf_counter()
    result = call(store, env, hit, miss)
    end = time.perf_counter()
    if row.startswith("hit"):
        assert result is not None
    elif row.startswith("miss"):
        assert result[0] is None and result[1]
    elif "validate" in row:
        assert len(result) == COUNT
    assert not store.unreadable
    return {"imports": (imported - begin) * 1e3, "ms": (end - ready) * 1e3}


def microseconds(call: Callable[[], object], rounds: int = 200, calls: int = 100) -> dict[str, float]:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append((time.perf_counter_ns() - begin) / calls / 1e3)
    return {"median_us": statistics.median(times), "min_us": min(times)}


def lookups(root: pathlib.Path) -> dict[str, dict[str, float]]:
    """One lookup of a key that was asked for before, of the store and of a handle's plans."""
    import torch

    import fla_dispatch as fd

    store, env, hit, miss = opened(root, "both")
    found = {
        "hit": microseconds(lambda: store.lookup(env, *hit)),
        "miss": microseconds(lambda: store.lookup(env, *miss)),
        "neighbours of a miss": microseconds(lambda: store.nearest(env, *miss), rounds=20, calls=5),
    }
    handle = fd.op("retention")
    q = torch.randn(1, 64, 2, 64)
    _, tensors, options, _, _ = handle.contract(q, q, q)
    found["plan of a call"] = microseconds(lambda: handle.bridge.plans.lookup(tensors, options, False, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--row", nargs=2, metavar=("ROOT", "ROW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(start(pathlib.Path(given.row[0]), given.row[1])))
        return
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        make(root)
        times: dict[str, list[float]] = {"imports": []}
        for _ in range(given.processes):
            for row in START:
                command = [sys.executable, "-m", "benchmarks.records", "--row", str(root), row]
                one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                times["imports"].append(one["imports"])
                times.setdefault(row, []).append(one["ms"])
        warm = lookups(root)
    rows = {row: {"median_ms": statistics.median(found), "min_ms": min(found)} for row, found in times.items()}
    for row, ms in rows.items():
        print(f"{row:28s} {ms['median_ms']:7.2f} ms  (min {ms['min_ms']:.2f})")
    for row, us in warm.items():
        print(f"{row:28s} {us['median_us']:7.2f} us  (min {us['min_us']:.2f})")
    setup = {
        "date": datetime.date.today().isoformat(),
        "records": COUNT,
        "processes": given.processes,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pydantic": importlib.metadata.version("pydantic"),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "records.json").write_text(json.dumps({"setup": setup, "start": rows, "lookup": warm}, indent=1) + "\n")


if __name__ == "__main__":
    main()
