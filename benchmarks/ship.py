"""Makes the shipped data from a store that `fla-dispatch tune` filled on the device; needs no GPU.

    python -m benchmarks.ship ROOT [ROOT ...] [--out DIR]

ROOT is what FLA_DISPATCH_CACHE_DIR named, or data that was shipped before; records of one key are merged, so that of a kernel which two
runs have timed the quieter timing counts. A record is shipped when its choice was made by this code and is a config of today, be it
new or shipped already. Of its outcomes stay the choice, the three fastest, and what the estimate chooses.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
from collections.abc import Iterator

from fla_dispatch import registry
from fla_dispatch.device import hypothetical
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.candidates import Field, field
from fla_dispatch.tuning.choice import merge
from fla_dispatch.tuning.hashing import kernel_hash
from fla_dispatch.tuning.keys import parse_key
from fla_dispatch.tuning.packs import write_packs
from fla_dispatch.tuning.records import Record

from .regret import current

FASTEST = 3


def trimmed(record: Record, known: Field) -> Record:
    outcomes = current(record)
    timed = sorted((o for o in outcomes if o.timing is not None), key=lambda o: o.timing.median_us if o.timing else 0.0)
    keep = {o.fingerprint for o in timed[:FASTEST]} | {known.default, record.default}
    keep |= {record.choice.fingerprint} if record.choice is not None else set()
    return record.model_copy(update={"outcomes": tuple(o for o in outcomes if o.fingerprint in keep), "origin": "shipped"})


def merged(places: list[stores.Store]) -> Iterator[stores.Found]:
    """The records of all stores, those of one key as one."""
    found: dict[tuple[str, str, str, str], stores.Found] = {}
    for store in places:
        for hit in store.records():
            name = (hit.environment.directory, hit.record.recurrence, hit.record.key, hit.record.direction)
            known = found.get(name)
            found[name] = hit if known is None else hit._replace(record=merge(hit.record, known.record))
    return iter(found.values())


def shippable(hits: Iterator[stores.Found], left_out: collections.Counter[str]) -> Iterator[stores.Found]:
    """Records with the reason of each that stays behind counted."""
    for hit in hits:
        record = hit.record
        recurrence = registry.get_recurrence(record.recurrence)
        key = parse_key(record.key, hypothetical(record.key.split("@")[1].split("?")[0]))
        known = field(recurrence, key, backward=record.direction == "backward", most=1)
        chosen = record.outcome()
        if chosen is None or known is None:
            left_out["nothing passed"] += 1
        elif chosen.fingerprint not in known.order:
            left_out[f"{chosen.fingerprint} is no config any more"] += 1
        elif chosen.kernel_hash != kernel_hash(recurrence.variant(chosen.variant)):
            left_out[f"{chosen.variant} has changed"] += 1
        else:
            yield hit._replace(record=trimmed(record, known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=stores.SHIPPED)
    given = parser.parse_args()
    left_out: collections.Counter[str] = collections.Counter()
    found = list(shippable(merged([stores.Store(root, (), given.out) for root in given.roots]), left_out))
    print(f"{len(found)} records; left out: {dict(left_out)}")
    for path in given.out.glob("*/*/*.jsonl"):
        path.unlink()
    for path in write_packs(given.out, found):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
