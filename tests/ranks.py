"""One rank of test_distributed.py: `python ranks.py RANK SIZE FOLDER`; writes what it found to FOLDER/RANK.json."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
os.environ["FLA_DISPATCH_CACHE_DIR"] = str(folder / f"cache{rank}")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)

from fla_dispatch import distributed  # noqa: E402
from fla_dispatch.tuning import search  # noqa: E402
from fla_dispatch.tuning.warmup import model_calls  # noqa: E402

FAILING, DYING = 3, 2


def run() -> dict[str, Any]:
    """Different keys on every rank, one rank that cannot measure; then one that dies."""
    quick = functools.partial(search.tune, isolate=False, key_seconds=0.01)
    measured: list[str] = []

    def tune(recurrence: Any, keys: Any, *args: Any) -> Any:
        if rank == FAILING:
            raise RuntimeError("no measuring on this rank")
        measured.extend(key.text() for key in keys)
        return quick(recurrence, keys, *args)

    search.tune = tune
    small = {"dtype": "float32", "heads": 2, "head_dim": 16, "batch": (1,)}
    calls = model_calls("retention", "train", lengths=(16 << rank, 256), **small)  # 256 is asked for by all
    calls += model_calls("simple_gla", "train", lengths=(64,), **small) if rank == 0 else []
    first = distributed.prepare(calls, budget_seconds=30)
    at_first = list(measured)
    again = distributed.prepare(calls, budget_seconds=30)
    found = {"first": first.digest, "keys": first.keys, "missing": first.missing, "failures": first.failures, "measured": at_first}
    found |= {"again": again.digest, "tuned": first.tuned, "still": again.missing}
    if rank == DYING:
        (folder / f"{rank}.json").write_text(json.dumps(found))
        os._exit(7)
    try:
        distributed.prepare(calls, timeout_seconds=5)
    except distributed.DistributedError as error:
        found["gone"] = str(error)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    (folder / f"{rank}.json").write_text(json.dumps(run()))
    os._exit(0)  # a group with a dead member does not end in order
