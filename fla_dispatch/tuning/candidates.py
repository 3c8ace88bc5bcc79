"""What may be chosen for a Key in one direction: variants with their configs, the default among them, what is worth measuring."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .. import registry
from ..problem import Problem
from ..registry import BACKWARD, FORWARD, Recurrence, Variant
from ..requirements import Refusal
from .advisories import screen
from .hashing import kernel_hash
from .records import Outcome, Record, fingerprint, record_key

#: A candidate whose estimate is this many times the best one's is not even compiled.
FAR = 8.0


class Candidate(NamedTuple):
    """A variant with a config, what it is called in records, and its estimated seconds."""

    variant: Variant
    config: Any
    fingerprint: str
    kernel_hash: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Field:
    """The candidates of one Key and direction.

    order: fingerprints of all of them as declared; default: the one that runs until something is measured, the cheapest by
    estimate; worthy: those that deserve a measurement, the default first, then by estimate.
    """

    key: Problem
    backward: bool
    order: tuple[str, ...]
    default: str
    worthy: tuple[Candidate, ...]

    def find(self, fingerprint: str | None) -> Candidate | None:
        return next((c for c in self.worthy if c.fingerprint == fingerprint), None)


def plain(key: Problem) -> Problem:
    """The Key of a measurement: nobody named a variant, nothing is interpreted, the regime belongs to the environment."""
    return dataclasses.replace(key.key(), forced=False, interpret=False, capture=False)


def able(recurrence: Recurrence, key: Problem) -> list[Variant]:
    """Variants that may run a Key; the reference only where there is no other."""
    found = [v for v in recurrence.variants if not v.static_refusals(key) and not isinstance(v.load(), Refusal)]
    return [v for v in found if v.name != "reference"] or found


def field(
    recurrence: Recurrence, key: Problem, *, backward: bool, most: int, capture: bool = False, chosen: str | None = None
) -> Field | None:
    """The candidates of a Key; None where nothing may run. Worthy are at most `most`, and what was chosen before, whatever its estimate.
    capture: they must suit a graph."""
    direction = BACKWARD if backward else FORWARD
    every: list[Candidate] = []
    for v in able(recurrence, dataclasses.replace(key, capture=capture)):
        allowed = screen(v, key, v.configs(key)).configs  # what is known to be bad is not measured
        every += [Candidate(v, c, fingerprint(v.name, c), kernel_hash(v), v.cost(key, c, direction)) for c in allowed]
    if not every:
        return None
    default = min(every, key=lambda c: c.seconds)
    rest = sorted((c for c in every if c is not default and c.seconds <= FAR * default.seconds), key=lambda c: c.seconds)
    kept = [c for c in every if c.fingerprint == chosen and c is not default and c not in rest[: most - 1]]
    return Field(key, backward, tuple(c.fingerprint for c in every), default.fingerprint, (default, *rest[: most - 1], *kept))


def recurrence_of(name: str) -> Recurrence:
    """A recurrence by its own name or by that of an op."""
    if name in registry.recurrence_names():
        return registry.get_recurrence(name)
    return registry.get_recurrence(registry.get_op(name).recurrence)


@dataclasses.dataclass
class Bench:
    """Keys that are timed together: one, or two that differ in `grad`."""

    key: Problem
    fields: list[Field]
    priors: dict[tuple[str, bool], Record]

    @property
    def keys(self) -> int:
        """How many Keys are timed together."""
        return sum(not f.backward for f in self.fields)

    def tried(self, f: Field) -> dict[tuple[str, str], Outcome]:
        prior = self.priors.get((record_key(f.key), f.backward))
        return {} if prior is None else prior.tried

    def incumbent(self, f: Field) -> str | None:
        prior = self.priors.get((record_key(f.key), f.backward))
        return None if prior is None or prior.choice is None else prior.choice.fingerprint

    def untried(self, *, backward: bool) -> dict[str, Candidate]:
        found = {}
        for f in self.fields:
            if f.backward == backward:
                tried = self.tried(f)
                found.update({c.fingerprint: c for c in f.worthy if (c.fingerprint, c.kernel_hash) not in tried})
        return found

    def companions(self, *, backward: bool) -> dict[str, Candidate]:
        """What is timed again beside something new: the default and the choice so far, proven earlier."""
        found = {}
        for f in self.fields:
            if f.backward == backward:
                tried = self.tried(f)
                for c in filter(None, (f.find(f.default), f.find(self.incumbent(f)))):
                    known = tried.get((c.fingerprint, c.kernel_hash))
                    if known is not None and known.status == "ok":
                        found[c.fingerprint] = c
        return found


class Group(NamedTuple):
    """Benches that share their proofs."""

    proof_key: Problem
    benches: list[Bench]
