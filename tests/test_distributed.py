"""Four ranks with different keys agree, whatever one of them cannot do; a rank that dies stops the others with an error, not a hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fla_dispatch import distributed

SIZE = 4


def test_ranks(tmp_path: Path) -> None:
    began = time.monotonic()
    script = Path(__file__).parent / "ranks.py"
    commands = [[sys.executable, str(script), str(rank), str(SIZE), str(tmp_path)] for rank in range(SIZE)]
    processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        errors = [p.communicate(timeout=60)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0, 7, 0], errors
    assert time.monotonic() - began < 60
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SIZE)]
    assert len({f["first"] for f in found}) == 1, "ranks must decide alike"
    # lengths 16, 32, 64, 128 of four ranks, 256 of all, and one key of another op
    assert {f["keys"] for f in found} == {6}
    measured = [text for f in found for text in f["measured"]]
    missing = found[0]["missing"]
    assert len(measured) == len(set(measured)) == 6 - len(missing) and len(missing) >= 1, "each key is measured once"
    assert all(f["missing"] == missing for f in found) and not set(missing) & set(measured)
    assert all(f["failures"] == {"3": "RuntimeError: no measuring on this rank"} for f in found)
    assert sum(f["tuned"] for f in found) == len(measured)
    # what rank 3 could not measure fell to rank 0 the second time
    assert len({f["again"] for f in found}) == 1 and all(f["still"] == [] for f in found)
    assert all("is gone" in f["gone"] for rank, f in enumerate(found) if rank != 2)


def test_disagreement_is_an_error() -> None:
    same = {"k forward": "a", "l forward": "b"}
    distributed._agree([("here", same), ("there", {"k forward": "c"}), ("here", dict(same))], "here")
    with pytest.raises(distributed.DistributedError, match=r"k forward: ranks \[0\]: a; ranks \[1\]: c"):
        distributed._agree([("here", same), ("here", {**same, "k forward": "c"})], "here")
