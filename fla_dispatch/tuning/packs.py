"""Moving records: packs for shipping and sites, one file for mail, merging into the user's store, and clearing it up.

A pack is deterministic text: records of one environment and recurrence, one a line, sorted by key, so that a repacked file
differs where measurements do.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ..errors import FlaDispatchError
from .choice import merge
from .environment import Environment
from .records import Origin, Record
from .shelf import Name, write_atomically
from .store import Found, Store


class PackError(FlaDispatchError):
    """A file of records that cannot be read or written as one."""


class Merged(NamedTuple):
    """How many records were new, how many changed what was there, how many added nothing, and how many did not persist."""

    new: int
    changed: int
    same: int
    unkept: int


def merge_into(store: Store, records: Iterable[tuple[Environment, Record]]) -> Merged:
    """Merge records into the user's own."""
    counts = dict.fromkeys(Merged._fields, 0)
    for env, record in records:
        own = store.lookup(env, record.recurrence, record.key, record.direction)
        own = own if own is not None and own.tier == "user" else None
        merged = merge(record, record) if own is None else merge(own.record, record)
        if own is not None and merged == own.record:
            counts["same"] += 1
            continue
        kept = store.put(env, merged)
        counts["new" if own is None else "changed"] += 1
        counts["unkept"] += not kept
    return Merged(**counts)


def write_packs(root: Path, found: Iterable[Found], origin: Origin | None = None) -> list[Path]:
    """Write `<root>/<environment>/<recurrence>.jsonl`, merged with the packs that are there; returns the files written."""
    groups: dict[tuple[Environment, str], dict[Name, Record]] = {}
    for hit in found:
        record = hit.record if origin is None else hit.record.model_copy(update={"origin": origin})
        group = groups.setdefault((hit.environment, record.recurrence), {})
        _add(group, record)
    there = Store(root)
    written = []
    for (env, recurrence), group in sorted(groups.items(), key=lambda item: (item[0][0].directory, item[0][1])):
        for hit in there.records(env, recurrence):
            _add(group, hit.record)
        path = root / env.directory / f"{recurrence}.jsonl"
        try:
            write_atomically(path, "".join(group[name].to_json() + "\n" for name in sorted(group)))
        except OSError as error:
            raise PackError(f"{path}: {error}. To fix: name a directory that can be written.") from error
        written.append(path)
    return written


def _add(group: dict[Name, Record], record: Record) -> None:
    name = Name(record.recurrence, record.key, record.direction)
    group[name] = merge(group[name], record) if name in group else record


def write_export(path: Path, found: Iterable[Found]) -> int:
    """Write one file with the environments of the records in it; returns how many records."""
    lines = sorted(f'{{"environment":{json.dumps(hit.environment.directory)},"record":{hit.record.to_json()}}}' for hit in found)
    try:
        write_atomically(path, "".join(line + "\n" for line in lines))
    except OSError as error:
        raise PackError(f"{path}: {error}. To fix: name a file that can be written.") from error
    return len(lines)


def read_export(path: Path) -> list[tuple[Environment, Record]]:
    """The records of an exported file, as imported ones. Raises PackError for anything else."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"{path}: {error}. To fix: name a file that `cache export` wrote.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            env = Environment.parse(fields["environment"])
            record = Record.model_validate(fields["record"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            reason = str(error).split("\n")[0]
            raise PackError(
                f"{path}:{number}: not an exported record ({reason}). To fix: name a file that `cache export` wrote."
            ) from error
        if env is None:
            raise PackError(f"{path}:{number}: unknown form of an environment, {fields['environment']!r}.")
        found.append((env, record.model_copy(update={"origin": "imported"})))
    return found


#: Age in seconds from which a temporary file belongs to a writer that is gone.
ABANDONED = 3600.0


def garbage(store: Store, *, older_than_days: float | None = None, stale: Callable[[Record], bool] | None = None) -> list[tuple[Path, str]]:
    """Files of the user's store that serve nobody, with the reason: parts of dead writers, what is no record, and records that
    are older than asked for or that `stale` says no code matches."""
    root = store.user_dir
    if root is None or not root.is_dir():
        return []
    found = [(p, "left by a writer that was killed") for p in sorted(root.glob("*/*/**/.*.tmp")) if _age(p) > ABANDONED]
    fresh = Store(root)
    good: dict[Path, Record] = {Path(hit.source): hit.record for hit in fresh.records(tier="user")}
    for path in sorted(root.glob("*/*/*/*.json")):
        record = good.get(path)
        if record is None:
            found.append((path, next((u.reason for u in fresh.unreadable if u.source == str(path)), "in no environment's directory")))
        elif older_than_days is not None and _days(record) > older_than_days:
            found.append((path, f"measured {record.created}"))
        elif stale is not None and stale(record):
            found.append((path, "its code is gone"))
    return found


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _days(record: Record) -> float:
    try:
        then = datetime.datetime.fromisoformat(record.created)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds() / 86400
