"""`fla-dispatch lock`: write down what this device decides, add another device's decisions, or compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..device import profile
from ..dispatch import locking
from ..errors import CallError
from . import output
from .tune import device_of

if TYPE_CHECKING:
    from ..problem import Problem
    from ..tuning.lock import Entry
    from ..tuning.warmup import Call


def run(path: Path, calls: list[Call], device: str | None, add: bool, check: bool, as_json: bool) -> int:
    """Lock; with check 1 when a decision differs from the file's."""
    from ..tuning import lock

    where = device_of(device)
    keys = [call.key(profile(where)) for call in calls]
    if check:
        file = lock.read(path)
        here = [e for e in file.entries if e.environment == _environment(where)]
        now = locking.entries(where, [*keys, *_keys_of(here, where)])
        lines = lock.differences(here, [e for e in now if e.place in {old.place for old in here}])
        document = {"path": str(path), "digest": file.digest, "entries": len(here), "differences": lines}
    else:
        made = locking.entries(where, keys)
        kept = [e for e in lock.read(path).entries if e.environment != _environment(where)] if add and path.exists() else []
        if not made and not kept:
            raise CallError(
                f"{path}: expected decisions to lock, got no record and no call of this device. To fix: run `fla-dispatch warmup`, or name "
                "the calls (--op, --workload)."
            )
        document = {"path": str(path), "digest": lock.write(path, [*kept, *made]), "entries": len(made) + len(kept), "differences": []}
        lines = []
    if as_json:
        output.print_json(document)
    else:
        print(f"{path}: {document['entries']} decisions, digest {document['digest']}")
        print("\n".join(lines) if lines else "the decisions of this process are those of the file")
    return 1 if lines else 0


def _environment(device: torch.device) -> str:
    from ..tuning.environment import current

    return current(device).directory


def _keys_of(entries: list[Entry], device: torch.device) -> list[Problem]:
    from ..tuning.keys import parse_key

    return [parse_key(e.key, profile(device)) for e in entries]
