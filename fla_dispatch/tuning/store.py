"""The store: records by environment, recurrence, key and direction, in the user's, the site's and the shipped directories.

No locks: a record is one file that is replaced whole, so writers cannot lose each other's records and readers never see
a part. Reading never raises: what is no record of this version is a miss, with one warning per store. Writing never raises
either: a directory that is read-only, full or gone leaves the record in memory, with one warning.
"""

from __future__ import annotations

import functools
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import settings, tuning
from .environment import Environment
from .shelf import Name, Shelf, Text, Unreadable

if TYPE_CHECKING:
    from .records import Record

#: Tiers in the order in which they are asked.
TIERS = ("user", "site", "shipped")

#: Two keys are neighbours when no bucketed size differs by more than this factor, as a power of two.
NEIGHBOURHOOD = 1.0

SHIPPED = Path(__file__).parent / "data"


class StoreWarning(UserWarning):
    """Records that could not be read or kept."""


class Found(NamedTuple):
    """A record, the tier and file it came from, and the environment it was measured in."""

    record: Record
    tier: str
    environment: Environment
    source: str


class Neighbour(NamedTuple):
    """A record of a nearby key; distance: sum over bucketed sizes of the difference of their logarithms to base two."""

    found: Found
    distance: float


class _Place(NamedTuple):
    tier: str
    root: Path


_SIZES = re.compile(r"(.*&group=\d+)&BH=(\d+)&T=(\d+)&N=(\d+)&mean=(\d+)(&.*)")


@functools.lru_cache(maxsize=65536)
def split_key(key: str) -> tuple[str, tuple[int, ...]]:
    """The exact fields of a key's text, and its bucketed sizes (BH, T, N, mean)."""
    found = _SIZES.fullmatch(key)
    if found is None:
        return key, ()
    before, *sizes, after = found.groups()
    return before + after, tuple(map(int, sizes))


def key_distance(a: str, b: str) -> float:
    """How far apart the bucketed sizes of two keys are; infinite unless all other fields are equal and each size is near."""
    (exact, ours), (other, theirs) = split_key(a), split_key(b)  # remembered: a miss compares with every record's key
    if exact != other:
        return math.inf
    steps = [abs(math.log2(max(m, 0.5)) - math.log2(max(n, 0.5))) for m, n in zip(ours, theirs, strict=True)]
    return math.inf if any(s > NEIGHBOURHOOD + 1e-9 for s in steps) else sum(steps)


class Store:
    """Directories of records, read lazily and remembered until `reload`. Each root holds `<slug>/<toolchain>/...`, see shelf.py.

    user_dir: read and written, None keeps records in memory only; site_dirs: read before shipped_dir, in order; none need exist.
    """

    def __init__(self, user_dir: Path | str | None, site_dirs: Sequence[Path | str] = (), shipped_dir: Path | str | None = None) -> None:
        self.user_dir = None if user_dir is None else Path(user_dir)
        places = [("user", user_dir), *(("site", d) for d in site_dirs), ("shipped", shipped_dir)]
        self.places = tuple(_Place(tier, Path(d)) for tier, d in places if d is not None)
        self._lock = threading.RLock()
        self._memory: dict[tuple[str, Name], Found] = {}
        self._warned: set[str] = set()
        self._found: dict[tuple[str, Name], Found | None] = {}
        self._shelves: dict[tuple[_Place, str, str], Shelf] = {}
        self._listed: dict[tuple[str, str], list[Name]] = {}
        self._loaded: set[tuple[str, str]] = set()
        self.unreadable: list[Unreadable] = []
        self.epoch = 0

    def lookup(self, env: Environment, recurrence: str, key: str, direction: str) -> Found | None:
        """The record of a key, of the first tier that has a readable one. Hits and misses are remembered until `reload`."""
        return self._lookup(env, Name(recurrence, key, direction))

    def _lookup(self, env: Environment, name: Name) -> Found | None:
        at = env.directory, name
        with self._lock:
            if at not in self._found:
                self._found[at] = self._memory.get(at) or self._search(env, name)
            return self._found[at]

    def _search(self, env: Environment, name: Name) -> Found | None:
        for place in self.places:
            shelf = self._shelf(place, env.directory, name.recurrence)
            text = shelf.get(name)
            self._complain(shelf)
            record = None if text is None else self._parse(text, name)
            if text is not None and record is not None:
                return Found(record, place.tier, env, text.source)
        return None

    def hits(self, env: Environment, recurrence: str, key: str, direction: str) -> Iterator[Found]:
        """The record of a key of each tier that has one, in order: where the first does not serve, the next may."""
        name = Name(recurrence, key, direction)
        first = self._lookup(env, name)
        if first is None:
            return
        yield first
        order = [place for place in self.places if TIERS.index(place.tier) >= TIERS.index(first.tier)]
        for place in order:
            shelf = self._shelf(place, env.directory, recurrence)
            text = shelf.get(name)
            record = None if text is None or text.source == first.source else self._parse(text, name)
            if text is not None and record is not None:
                yield Found(record, place.tier, env, text.source)

    def nearest(self, env: Environment, recurrence: str, key: str, direction: str, limit: int = 5) -> list[Neighbour]:
        """Records of neighbouring keys in the same environment, nearest first; that of the key itself is not among them."""
        near = sorted(
            (distance, name)
            for name in self._names(env.directory, recurrence)
            if name.direction == direction and name.key != key and (distance := key_distance(key, name.key)) < math.inf
        )
        found: list[Neighbour] = []
        for distance, name in near:
            hit = self._lookup(env, name) if len(found) < limit else None
            if hit is not None:
                found.append(Neighbour(hit, distance))
        return found

    def keys(self, env: Environment, recurrence: str, direction: str) -> list[str]:
        """Keys that have a record in an environment; nothing is parsed."""
        return [name.key for name in self._names(env.directory, recurrence) if name.direction == direction]

    def sibling(self, env: Environment, recurrence: str, key: str, direction: str) -> Found | None:
        """The record of the key in the most similar other environment of the same architecture.

        In this order: the same device and compiler in another timing regime; the same device under another Triton or assembler
        (the nearest version first); another device. `found.environment.differences(env)` says what is not the same.
        """

        def unlike(other: Environment) -> tuple[object, ...]:
            return (
                other.slug != env.slug, (other.triton, other.compiler) != (env.triton, env.compiler),
                _version_distance(other.triton, env.triton), other.regime != env.regime, other.directory,
            )  # fmt: skip

        others = [e for e in self.environments() if e.arch == env.arch and e != env]
        hits = (self._lookup(e, Name(recurrence, key, direction)) for e in sorted(others, key=unlike))
        return next((hit for hit in hits if hit is not None), None)

    def put(self, env: Environment, record: Record) -> bool:
        """Keep a record in place of the one of the same key. False when it is in this process's memory alone."""
        name = Name(record.recurrence, record.key, record.direction)
        at = env.directory, name
        source, kept = "memory", False
        with self._lock:
            if self.user_dir is not None:
                shelf = self._shelf(_Place("user", self.user_dir), env.directory, record.recurrence)
                try:
                    source, kept = str(shelf.put(name, record.to_json())), True
                except OSError as error:
                    self._warn("write", f"records cannot be kept in {shelf.folder} ({error}); they last as long as this process")
            found = Found(record, "user", env, source)
            self._found[at] = found
            if kept:
                self._memory.pop(at, None)
            else:
                self._memory[at] = found
            self._listed.pop((env.directory, record.recurrence), None)
            self._changed()
        return kept

    def reload(self) -> None:
        """Forget what was read, so that records of other processes are seen; records that only memory holds stay."""
        with self._lock:
            self._found.clear()
            self._shelves.clear()
            self._listed.clear()
            self._loaded.clear()
            self._changed()

    def environments(self) -> list[Environment]:
        """Environments that any tier has a directory of."""
        names = {at[0] for at in self._memory}
        for place in self.places:
            try:
                names |= {p.relative_to(place.root).as_posix() for p in place.root.glob("*/*") if p.is_dir()}
            except OSError as error:
                self._bad(Unreadable(str(place.root), str(error)))
        return [e for e in map(Environment.parse, sorted(names)) if e is not None]

    def recurrences(self, env: Environment) -> list[str]:
        """Recurrences that any tier has records of in an environment."""
        found = {name.recurrence for directory, name in self._memory if directory == env.directory}
        for place in self.places:
            folder = place.root / env.directory
            found |= {p.name.removesuffix(".jsonl") for p in folder.glob("*") if p.is_dir() or p.suffix == ".jsonl"}
        return sorted(found)

    def records(self, env: Environment | None = None, recurrence: str | None = None, tier: str | None = None) -> list[Found]:
        """All readable records; of an environment, a recurrence, a tier. Without a tier each key's first hit, as `lookup` finds it."""
        return list(self._records(env, recurrence, tier))

    def _records(self, env: Environment | None, recurrence: str | None, tier: str | None) -> Iterator[Found]:
        for e in self.environments() if env is None else [env]:
            for r in self.recurrences(e) if recurrence is None else [recurrence]:
                if tier is None:
                    self._load(e, r)
                    hits = (self._lookup(e, name) for name in self._names(e.directory, r))
                    yield from (hit for hit in hits if hit is not None)
                    continue
                for place in (p for p in self.places if p.tier == tier):
                    for name, text in self._entries(place, e.directory, r):
                        record = self._parse(text, name)
                        if record is not None:
                            yield Found(record, tier, e, text.source)

    def _load(self, env: Environment, recurrence: str) -> None:
        """Read and parse all records of an environment that are not remembered yet: each file once, where `_lookup` tries every tier."""
        at = env.directory, recurrence
        with self._lock:
            for place in self.places if at not in self._loaded else ():
                for name, text in self._entries(place, *at):
                    known = env.directory, name
                    record = None if known in self._found or known in self._memory else self._parse(text, name)
                    if record is not None:
                        self._found[known] = Found(record, place.tier, env, text.source)
            self._loaded.add(at)

    def _names(self, directory: str, recurrence: str) -> list[Name]:
        """Names of all records of an environment, read from the beginnings of their texts."""
        at = directory, recurrence
        with self._lock:
            if at not in self._listed:
                names = {n for d, n in self._memory if (d, n.recurrence) == at}
                for place in self.places:
                    shelf = self._shelf(place, directory, recurrence)
                    names |= shelf.names()
                    self._complain(shelf)
                self._listed[at] = sorted(names)
            return self._listed[at]

    def _entries(self, place: _Place, directory: str, recurrence: str) -> list[tuple[Name, Text]]:
        shelf = self._shelf(place, directory, recurrence)
        entries = list(shelf.entries())
        self._complain(shelf)
        return entries

    def _shelf(self, place: _Place, directory: str, recurrence: str) -> Shelf:
        at = place, directory, recurrence
        if at not in self._shelves:
            self._shelves[at] = Shelf(place.root / directory, recurrence)
        return self._shelves[at]

    def _parse(self, text: Text, name: Name) -> Record | None:
        from pydantic import ValidationError

        from .records import Record

        try:
            record = Record.model_validate_json(text.content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            self._bad(Unreadable(text.source, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")))
            return None
        if (record.recurrence, record.key, record.direction) != name:
            self._bad(Unreadable(text.source, f"a record of another key, {record.key} {record.direction}"))
            return None
        return record

    def _complain(self, shelf: Shelf) -> None:
        for unreadable in shelf.unreadable:
            self._bad(unreadable)

    def _bad(self, unreadable: Unreadable) -> None:
        if unreadable not in self.unreadable:
            self.unreadable.append(unreadable)
            self._warn("read", f"{unreadable.source} is passed over: {unreadable.reason}; `fla-dispatch cache gc` removes such files")

    def _warn(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(text, StoreWarning, stacklevel=4)

    def _changed(self) -> None:
        self.epoch += 1
        tuning.epoch += 1


def _version_distance(a: str, b: str) -> tuple[int, ...]:
    """How far apart two versions are, by components."""
    left, right = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (a, b))
    return tuple(abs(m - n) for m, n in zip(left + [0] * (3 - len(left)), right + [0] * (3 - len(right)), strict=True))


def user_root() -> Path:
    """Where this process keeps records: `v1` of the setting `cache_dir`, or of the user's cache directory."""
    if settings.current.cache_dir:
        return Path(settings.current.cache_dir).expanduser() / "v1"
    import platformdirs

    return Path(platformdirs.user_cache_dir("fla_dispatch", appauthor=False)) / "v1"


def site_roots() -> tuple[Path, ...]:
    """The setting `cache_path`: each entry is a root of records, or a cache directory whose `v1` is one."""
    paths = [Path(p).expanduser() for p in settings.current.cache_path]
    return tuple(p / "v1" if (p / "v1").is_dir() else p for p in paths)


_stores: dict[tuple[str | None, tuple[str, ...]], Store] = {}
_making = threading.Lock()


def get_store() -> Store:
    """This process's store: one per setting of `cache_dir` and `cache_path`."""
    at = settings.current.cache_dir, settings.current.cache_path
    found = _stores.get(at)
    if found is None:
        with _making:
            found = _stores.setdefault(at, Store(user_root(), site_roots(), SHIPPED))
    return found
