"""Lock files: decisions written down, to be made again elsewhere or refused with the difference.

A file holds for each environment, key and direction the variant, its config and the hash of its code, and a digest over all
of them. Under a lock (the setting `lock`) a process takes these decisions and no others: a key that is not in the file, another
device or compiler, other code or a refusal raises with the difference. Naming a variant still wins.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LockError
from .environment import Environment
from .store import key_distance

VERSION = 1


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
    """One decision. environment: `Environment.directory`; config: JSON text, so that entries are values."""

    environment: str
    recurrence: str
    key: str
    direction: str
    variant: str
    config: str
    kernel_hash: str

    def fields(self) -> dict[str, Any] | None:
        """The config as a dict, None for a variant without any."""
        found: dict[str, Any] | None = json.loads(self.config)
        return found

    @property
    def decision(self) -> str:
        return f"{self.variant} {'' if self.config == 'null' else self.config} code {self.kernel_hash}"

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.environment, self.recurrence, self.key, self.direction


def config_text(config: Any) -> str:
    """Canonical text of a config (a NamedTuple or None)."""
    return json.dumps(None if config is None else config._asdict(), sort_keys=True)


def digest(entries: Iterable[Entry]) -> str:
    """16 hexadecimal digits over the decisions, whatever their order: equal digests mean equal decisions."""
    text = json.dumps([dataclasses.astuple(e) for e in sorted(entries)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Lock:
    """The entries of a file by recurrence, key and direction."""

    path: str
    digest: str
    entries: tuple[Entry, ...]

    @functools.cached_property
    def by_key(self) -> dict[tuple[str, str, str], list[Entry]]:
        found: dict[tuple[str, str, str], list[Entry]] = {}
        for e in self.entries:
            found.setdefault((e.recurrence, e.key, e.direction), []).append(e)
        return found

    def find(self, env: Environment, recurrence: str, key: str, direction: str) -> Entry:
        """The entry for a key; that of the other timing regime where this one has none. Raises LockError with the difference."""
        entries = self.by_key.get((recurrence, key, direction), [])
        for wanted in (env, *(dataclasses.replace(env, regime=r) for r in ("eager", "graph"))):
            for e in entries:
                if e.environment == wanted.directory:
                    return e
        if not entries:
            near = sorted((key_distance(key, e.key), e.key) for e in self.entries if (e.recurrence, e.direction) == (recurrence, direction))
            shown = "".join(f"\n  nearest locked key: {text}" for _, text in near[:1])
            raise LockError(
                f"{self.path} (digest {self.digest}) has no {direction} decision for {key}{shown}\n"
                "To fix: lock again with this call among those that are locked, or take the lock away."
            )
        raise LockError(
            f"{self.path} (digest {self.digest}): the {direction} decision for {key} was locked in another environment\n"
            + "\n".join(_environment_lines(env, e) for e in entries)
            + "\nTo fix: lock again here; a file may hold the decisions of several environments (`fla-dispatch lock --add`)."
        )


def _environment_lines(env: Environment, entry: Entry) -> str:
    there = Environment.parse(entry.environment)
    if there is None:
        return f"  locked in {entry.environment}"
    return "\n".join(f"  {name}: here {here}, locked {locked}" for name, (here, locked) in env.differences(there).items())


def write(path: Path, entries: Iterable[Entry]) -> str:
    """Write a lock file and return its digest. Raises LockError where the file cannot be written, or one key has two decisions."""
    from .shelf import write_atomically

    kept = sorted(set(entries))
    places = [e.place for e in kept]
    if len(set(places)) != len(places):
        twice = next(p for p in places if places.count(p) > 1)
        raise LockError(f"{path}: two decisions for {' '.join(twice)}")
    found = digest(kept)
    rows = [{**dataclasses.asdict(e), "config": e.fields()} for e in kept]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    try:
        write_atomically(path, f'{{"lock_version": {VERSION}, "digest": "{found}", "entries": [\n{lines}\n]}}\n')
    except OSError as error:
        raise LockError(f"{path}: {error}. To fix: name a file that can be written.") from error
    return found


def read(path: Path) -> Lock:
    """A lock file. Raises LockError for anything else, and for one whose digest is not that of its entries."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["lock_version"] != VERSION:
            raise LockError(f"{path}: lock_version {document['lock_version']}, this version reads {VERSION}. To fix: lock again.")
        names = [f.name for f in dataclasses.fields(Entry)]
        entries = tuple(
            Entry(**{**{n: str(row[n]) for n in names if n != "config"}, "config": json.dumps(row["config"], sort_keys=True)})
            for row in document["entries"]
        )
        claimed = document["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LockError(
            f"{path}: not a lock file ({type(error).__name__}: {error}). To fix: write one with `fla-dispatch lock`."
        ) from error
    if digest(entries) != claimed:
        raise LockError(f"{path}: its digest is {claimed}, that of its entries {digest(entries)}: it was edited. To fix: lock again.")
    return Lock(str(path), claimed, entries)


@functools.lru_cache(maxsize=8)
def _read_once(path: str, changed: int, size: int) -> Lock:
    return read(Path(path))


def load(path: str) -> Lock:
    """A lock file, parsed once per content. Raises LockError."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise LockError(f"{path}: {error}. To fix: name a lock file that is there, or unset FLA_DISPATCH_LOCK.") from error
    return _read_once(path, status.st_mtime_ns, status.st_size)


def differences(old: Iterable[Entry], new: Iterable[Entry]) -> list[str]:
    """Lines that say which decisions are gone, new or other; nothing when both are the same."""
    before, after = ({e.place: e for e in entries} for entries in (old, new))
    lines = []
    for place in sorted(before.keys() | after.keys()):
        a, b = before.get(place), after.get(place)
        if a != b:
            shown = " ".join(place[1:]) + f" in {place[0]}"
            lines.append(f"{shown}: locked {a.decision if a else 'nothing'}, now {b.decision if b else 'nothing'}")
    return lines
