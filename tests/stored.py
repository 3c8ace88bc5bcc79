"""Records of nothing in particular, for tests of the store and of what is built on it."""

from __future__ import annotations

from typing import Any

from fla_dispatch.tuning.choice import make_record
from fla_dispatch.tuning.environment import Environment
from fla_dispatch.tuning.records import Outcome, Record, Timing

HERE = Environment("h200-sm90-132u-144g", "3.6.0", "ptxas12.8.93")


def key(T: int = 1024, BH: int = 32, **other: object) -> str:
    fields = {"K": 128, "V": 128, "group": 1, "BH": BH, "T": T, "N": 1, "mean": T} | other
    return "scalar_decay@sm90?qkv=bfloat16&" + "&".join(f"{n}={v}" for n, v in fields.items()) + "&decay=head,normalize=false"


def record(key: str = key(), median: float = 10.0, direction: Any = "forward", created: str = "2026-01-01", variant: str = "a") -> Record:
    timing = Timing(median_us=median, min_us=median, mad_us=0.0, rounds=5)
    found = [Outcome(variant=variant, config={"BT": 64}, kernel_hash="h", status="ok", timing=timing)]
    return make_record("scalar_decay", key, direction, found, default=variant, order=[], created=created)
