"""What the records say about a Key in one direction: choices that may be taken, candidates that failed, and what was passed over.

A record serves only as far as its outcomes hold here: the variant exists and may run, its code has the hash that was
measured, and the config is one that it takes. The choice is made anew among those outcomes, by the rule of the records.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..problem import Problem
from ..registry import Variant

if TYPE_CHECKING:
    from ..tuning.records import Outcome, Record
    from ..tuning.store import Found

#: Verdicts on the code of a variant, which hold for every length: such a candidate never runs where it was measured.
WRONG = ("wrong", "racy", "crash")


class Able(NamedTuple):
    """A variant that may run a Key, and the configs that are declared for it and not denied, the default first."""

    variant: Variant
    configs: tuple[Any, ...]


class Taken(NamedTuple):
    """A choice that a record makes among what may run."""

    variant: Variant
    config: Any
    outcome: Outcome
    record: Record
    margin: float
    rule: str
    band: int


def rebuild(configs: tuple[Any, ...], fields: Mapping[str, Any] | None, *, declared: bool) -> tuple[Any, ...]:
    """(config,) for the fields of a record, () if they are none of this variant's.

    declared: it must be one of `configs`; else it must have their type, fields and types of fields.
    """
    for config in configs:
        if (None if config is None else config._asdict()) == fields:
            return (config,)
    like = configs[0]
    if declared or like is None or fields is None or set(fields) != set(like._fields):
        return ()
    if any(type(fields[name]) is not type(getattr(like, name)) for name in like._fields):
        return ()
    return (type(like)(**fields),)


class Evidence:
    """The records about one direction of a Key, asked for one after the other."""

    def __init__(self, key: Problem, direction: str) -> None:
        from ..tuning.environment import current, regime_of
        from ..tuning.records import record_key
        from ..tuning.store import get_store

        self.key, self.direction = key, direction
        self.text = record_key(key)
        self.environment = current(key.device, regime_of(key))
        self._store = get_store()
        self.hits = list(self._store.hits(self.environment, key.recurrence, self.text, direction))
        self.notes: list[str] = []

    @property
    def measured(self) -> bool:
        """Whether there is a record of exactly this Key."""
        return bool(self.hits)

    def near(self) -> Iterator[tuple[Found, float]]:
        """Records of neighbouring keys, nearest first, with their distance."""
        yield from self._store.nearest(self.environment, self.key.recurrence, self.text, self.direction)

    def sibling(self) -> Found | None:
        """The record of this key from the most similar other environment of the architecture."""
        return self._store.sibling(self.environment, self.key.recurrence, self.text, self.direction)

    def failures(self, hashes: Hashes) -> dict[str, Outcome]:
        """Candidates that failed here, by fingerprint: all statuses of this Key's records, and what is wrong at neighbours too."""
        found: dict[str, Outcome] = {}
        sources = [(hit.record, True) for hit in self.hits] or [(hit.record, False) for hit, _ in self.near()]
        for record, exact in sources:
            for o in record.outcomes:
                if (o.status in WRONG or (exact and o.status != "ok")) and hashes.current(o):
                    found.setdefault(o.fingerprint, o)
        return found

    def take(self, found: Found, able: Iterable[Able], hashes: Hashes, *, declared: bool = False) -> Taken | None:
        """The choice that a record makes among what may run, or None and a note.

        declared: only configs that are declared for this Key (records of other devices).
        """
        from ..tuning.advisories import denies

        record = found.record
        variants = {a.variant.name: a for a in able}
        stale: dict[str, None] = {}
        configs: dict[str, Any] = {}

        def holds(o: Outcome) -> bool:
            a = variants.get(o.variant)
            if o.status != "ok" or a is None:
                return False
            if not hashes.current(o):
                stale[o.variant] = None
                return False
            config = rebuild(a.configs, o.config, declared=declared)
            if not config or (config[0] not in a.configs and denies(a.variant, self.key, config[0])):
                return False
            configs[o.fingerprint] = config[0]
            return True

        choice = record.choose_among(holds)
        if stale:
            self.notes.append(f"{found.tier} record: stale for {', '.join(stale)}, whose code has changed since ({found.source})")
        if choice is None:
            if not stale:
                self.notes.append(f"{found.tier} record: none of its candidates may run here ({found.source})")
            return None
        outcome = next(o for o in record.outcomes if o.fingerprint == choice.fingerprint and o.status == "ok" and hashes.current(o))
        variant = variants[choice.variant].variant
        return Taken(variant, configs[choice.fingerprint], outcome, record, choice.margin, choice.rule, len(choice.band))

    def nearest_lines(self, limit: int = 3) -> list[str]:
        """The nearest records field by field, for a Key that has none."""
        every = self._store.keys(self.environment, self.key.recurrence, self.direction)
        ranked = sorted((len(d := key_differences(self.text, other)), other, d) for other in every if other != self.text)
        return [f"{other}: {', '.join(d)}" for _, other, d in ranked[:limit]]


class Hashes:
    """Hashes of the code of a table's variants, computed when a record asks for them."""

    def __init__(self, variants: Iterable[Variant]) -> None:
        self._variants = {v.name: v for v in variants}

    def of(self, variant: Variant) -> str:
        from ..tuning.hashing import kernel_hash

        return kernel_hash(variant)

    def current(self, o: Outcome) -> bool:
        """Whether an outcome is of a variant's code as it is now."""
        variant = self._variants.get(o.variant)
        return variant is not None and self.of(variant) == o.kernel_hash


def key_differences(here: str, there: str) -> list[str]:
    """Fields in which two keys' texts differ: `T: here 4096, there 2048`."""
    ours, theirs = (_fields(text) for text in (here, there))
    lines = []
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) != theirs.get(name):
            lines.append(f"{name}: here {ours.get(name, 'absent')}, there {theirs.get(name, 'absent')}")
    return lines


def _fields(text: str) -> dict[str, str]:
    head, _, rest = text.partition("?")
    fields = {"recurrence": head.split("@")[0], "arch": head.partition("@")[2]}
    for i, part in enumerate(rest.split("&")):
        for item in part.split(","):
            name, sep, value = item.partition("=")
            if name:
                fields[f"dtype of {name}" if i == 0 else name] = value if sep else "yes"
    return fields


def age(created: str) -> str:
    """`2026-11-20, 3 days ago` of a record's time."""
    try:
        then = datetime.datetime.fromisoformat(created)
    except ValueError:
        return created or "at an unknown time"
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    days = (datetime.datetime.now(datetime.UTC) - then).days
    return f"{created[:10]}, {'today' if days <= 0 else f'{days} day' + ('s' if days > 1 else '') + ' ago'}"
