"""How far the cost estimate's choices are from the measured best, over the shipped records; needs no GPU.

    python -m benchmarks.regret [--worst 12] [--root DIR]

Regret of a record: median of what the estimate chooses over the least median of what passed. A choice without a timing is
counted apart ("untimed"): the tuner times the candidates that are estimated best.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import NamedTuple

from fla_dispatch import registry
from fla_dispatch.device import DeviceProfile, hypothetical
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.candidates import field
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.keys import parse_key
from fla_dispatch.tuning.records import Outcome, Record


class Regret(NamedTuple):
    """One record: ratio of the estimate's choice to the best (None: that choice has no timing), and both as fingerprints."""

    ratio: float | None
    direction: str
    key: str
    chosen: str
    best: str
    best_us: float


def current(record: Record) -> tuple[Outcome, ...]:
    """The outcomes of the kernels as they are now; a record keeps those of earlier code as history."""
    variants = {v.name: v for v in registry.get_recurrence(record.recurrence).variants}
    return tuple(o for o in record.outcomes if o.variant in variants and o.kernel_hash == kernel_hash(variants[o.variant]))


#: Samples that make a timing: contenders that leave the race earlier have fewer, and one stall of the host spoils them.
ENOUGH = 3


def measured(o: Outcome, rounds: int = ENOUGH) -> bool:
    """Whether there is a timing of so many samples."""
    return o.status == "ok" and o.timing is not None and o.timing.rounds >= rounds


def regret(record: Record, device: DeviceProfile) -> Regret | None:
    """None for a record in which nothing passed."""
    timed = {o.fingerprint: o.timing.median_us for o in current(record) if measured(o)}
    if not timed:
        return None
    recurrence = registry.get_recurrence(record.recurrence)
    found = field(recurrence, parse_key(record.key, device), backward=record.direction == "backward", most=1)
    assert found is not None, record.key
    best = min(timed, key=lambda name: timed[name])
    ratio = timed[found.default] / timed[best] if found.default in timed else None
    return Regret(ratio, record.direction, record.key, found.default, best, timed[best])


def regrets(root: pathlib.Path | None = None, device: str = "sm90", regime: str = "eager", recurrence: str | None = None) -> list[Regret]:
    """Of all records below a directory (default: the shipped ones) that are of an architecture and regime, and of a recurrence or any."""
    store = stores.Store(None, (), root or stores.SHIPPED)
    here = hypothetical(device)
    found = [
        regret(hit.record, here)
        for hit in store.records(recurrence=recurrence)
        if hit.environment.regime == regime and f"@{device}?" in hit.record.key
    ]
    return [r for r in found if r is not None]


def summary(rows: list[Regret]) -> dict[str, float]:
    timed = [r.ratio for r in rows if r.ratio is not None]
    return {
        "records": len(rows),
        "untimed": len(rows) - len(timed),
        "geometric_mean": math.exp(sum(map(math.log, timed)) / max(1, len(timed))),
        "worst": max(timed, default=1.0),
        "above_1.25": sum(x > 1.25 for x in timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worst", type=int, default=12)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--regime", default="eager")
    given = parser.parse_args()
    rows = regrets(given.root, regime=given.regime)
    for name in sorted({r.key.partition("@")[0] for r in rows}):
        print(name, summary([r for r in rows if r.key.startswith(f"{name}@")]))
    for r in sorted(rows, key=lambda r: -(r.ratio or 0))[: given.worst]:
        ratio = "untimed" if r.ratio is None else f"{r.ratio:.2f}"
        print(f"{ratio} {r.direction:8} {r.best_us:8.1f} us {r.key.split('?')[1]}\n     chose {r.chosen}\n     best  {r.best}")


if __name__ == "__main__":
    main()
