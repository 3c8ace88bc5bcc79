"""The tiers of choice, first hit wins, each direction for itself:

    forced      a person named a variant or family (the call's mode, then `fd.use`, then FLA_DISPATCH_USE)
    lock        the lock file in force decides, or refuses
    user, site, shipped      a measured and proven record of this Key in this environment
    neighbour   a record of a Key whose bucketed sizes are one step away
    sibling     a record of this Key on another device, compiler or timing regime of the architecture
    estimate    the variant and config with the lowest estimated time
    reference   everything else is refused

Requirements, advisories and failed proofs filter before any tier. Naming wins over measurements, never over correctness;
among the configs of what was named the records decide as they do otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import settings
from ..errors import LockError, RegistrationError, UnknownNameError, nearest
from ..problem import Problem
from ..registry import BACKWARD, FORWARD, Recurrence, Variant
from ..requirements import Refusal, RefusalCode
from .evidence import WRONG, Able, Evidence, Hashes, Taken, age, key_differences, rebuild

if TYPE_CHECKING:
    from ..tuning.records import Outcome, Record

DIRECTIONS = (("forward", FORWARD), ("backward", BACKWARD))


class Candidate(NamedTuple):
    """A variant with a config for one direction of a Key, and its seconds: measured where a record chose it, else estimated."""

    variant: Variant
    config: Any
    seconds: float


class Verdict(NamedTuple):
    """What is known of a variant for a Key: why not, or its default config's estimate.

    partial: reasons against one direction alone; demoted: an advisory prefers anything else.
    """

    variant: Variant
    refusals: tuple[Refusal, ...]
    forward: Candidate | None
    backward: Candidate | None
    configs: tuple[Any, ...] = ()
    partial: tuple[Refusal, ...] = ()
    demoted: bool = False

    def candidate(self, direction: str) -> Candidate | None:
        return self.forward if direction == "forward" else self.backward


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the choice of one direction comes from.

    record: what was measured, None below the tiers of records; outcome: the chosen candidate's; differences: between the
    record's environment or key and here; notes: records that were passed over, and why.
    """

    direction: str
    tier: str
    reason: str
    record: Record | None = None
    outcome: Outcome | None = None
    path: str = ""
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether a record of exactly this Key in this environment made the choice."""
        return self.record is not None and not self.differences


@dataclasses.dataclass(frozen=True)
class Decision:
    """The outcome of the tiers. forward is None when everything that may be chosen is refused, or a lock file refuses (`blocked`)."""

    key: Problem
    tier: str  # of the forward
    reason: str
    forward: Candidate | None
    backward: Candidate | None
    considered: tuple[Verdict, ...]
    sources: tuple[Source, ...] = ()
    blocked: str = ""

    def source(self, direction: str) -> Source | None:
        return next((s for s in self.sources if s.direction == direction), None)

    @property
    def missed(self) -> bool:
        """Whether a direction was decided without a record of this Key or a lock."""
        return any(s.tier != "lock" and not s.measured for s in self.sources)


def seconds_text(seconds: float) -> str:
    """`1.2 ms`, `340 us`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


class _Known:
    """Evidence for both directions of a Key, looked up once."""

    def __init__(self, recurrence: Recurrence, key: Problem) -> None:
        self.hashes = Hashes(recurrence.variants)
        names = [name for name, d in DIRECTIONS if key.grad or d is FORWARD]
        self.evidence = {name: Evidence(key, name) for name in names}
        self.failures = {name: e.failures(self.hashes) for name, e in self.evidence.items()}


def _failed(variant: Variant, configs: tuple[Any, ...], failures: dict[str, Outcome], named: bool) -> dict[Any, Outcome]:
    """Configs that failed where they were measured. A person who names a variant may try again what was slow or too large."""
    if not failures:
        return {}
    from ..tuning.records import fingerprint

    found = {c: failures.get(fingerprint(variant.name, c)) for c in configs}
    return {c: o for c, o in found.items() if o is not None and not (named and o.status not in WRONG)}


def _proof_refusal(variant: Variant, direction: str, failed: dict[Any, Outcome]) -> Refusal:
    first = next(iter(failed.values()))
    return Refusal(
        RefusalCode.PROOF, direction, f"{first.status} ({first.detail or first.fingerprint})", "a config that passed its proof here",
        "use another variant, or mend it and tune again",
    )  # fmt: skip


def weigh(variant: Variant, key: Problem, failures: dict[str, dict[str, Outcome]] | None = None) -> Verdict:
    """The verdict on a variant; its module is imported when its requirements do not refuse."""
    from ..tuning.advisories import screen

    refused = variant.static_refusals(key)
    if refused:
        return Verdict(variant, refused, None, None)
    module = variant.load()
    if isinstance(module, Refusal):
        return Verdict(variant, (module,), None, None)
    configs = variant.configs(key)
    if not configs:
        raise RegistrationError(f"variant {variant.name}: configs() is empty for {key.text()}, which no requirement refuses")
    screened = screen(variant, key, configs)
    if not screened.configs:
        return Verdict(variant, screened.denied, None, None)
    candidates: dict[str, Candidate] = {}
    partial = []
    for name, direction in DIRECTIONS[: 2 if key.grad else 1]:
        failed = _failed(variant, screened.configs, (failures or {}).get(name, {}), key.forced)
        left = [Candidate(variant, c, variant.cost(key, c, direction)) for c in screened.configs if c not in failed]
        if left:
            candidates[name] = min(left, key=lambda c: c.seconds)
        else:
            partial.append(_proof_refusal(variant, name, failed))
    if not candidates:
        return Verdict(variant, tuple(partial), None, None)
    forward, backward = candidates.get("forward"), candidates.get("backward")
    return Verdict(variant, (), forward, backward, screened.configs, tuple(partial), screened.demoted)


def check_choice(recurrence: Recurrence, choice: str, where: str) -> None:
    """Raise UnknownNameError unless `choice` is auto, a variant or a family of the recurrence."""
    known = {"auto", *(v.name for v in recurrence.variants), *(v.family for v in recurrence.variants)}
    if choice not in known:
        raise UnknownNameError(
            f"{where}: no mode, family or variant named {choice!r} in {recurrence.name}; {nearest(str(choice), list(known))}."
        )


def _forced(recurrence: Recurrence, key: Problem, choice: str, weighed: Callable[[Variant, Problem], Verdict]) -> tuple[list[Verdict], str]:
    named = dataclasses.replace(key, forced=True)
    exact = [v for v in recurrence.variants if v.name == choice]
    if exact:
        return [weighed(v, named) for v in exact], f"the variant {choice!r} was named"
    family = [v for v in recurrence.variants if v.family == choice]
    reason = f"the family {choice!r} was named"
    verdicts = [weighed(v, key) for v in family]
    if all(v.refusals for v in verdicts):  # naming a family admits what only a name admits, where nothing else is left
        verdicts = [weighed(v, named) for v in family]
    return verdicts, reason


def _estimated(verdicts: list[Verdict], direction: str) -> tuple[Candidate, str]:
    """The variant that is estimated fastest, demoted ones last; ties go by name."""
    found = [(v.demoted, c.seconds, c.variant.name, c) for v in verdicts if (c := v.candidate(direction)) is not None]
    found.sort(key=lambda item: item[:3])
    chosen = found[0][3]
    if len(found) == 1:
        return chosen, "the only variant besides the reference that no requirement refuses"
    following = found[1][3]
    text = f"lowest estimated time: {direction} {chosen.variant.name} {seconds_text(chosen.seconds)}, "
    return chosen, text + f"next {following.variant.name} {seconds_text(following.seconds)}"


def _why_taken(taken: Taken, created: str, origin: str) -> str:
    text = f"{origin} {age(created)}, {taken.outcome.timing.median_us:.4g} us" if taken.outcome.timing else f"{origin} {age(created)}"
    text += f", {taken.margin:.2f}x to the next" + (f", {taken.band} within the noise" if taken.band > 1 else "")
    proof = taken.outcome.certificate
    if proof is not None and proof.errors:
        worst = max(proof.errors, key=lambda name: proof.errors[name] / (proof.tolerances.get(name) or 1.0))
        text += (
            f"; proven against {proof.oracle} in {proof.dtype}: {worst} {proof.errors[worst]:.1e} of {proof.tolerances[worst]:.1e} allowed"
        )
    return text


def _from_records(evidence: Evidence, verdicts: list[Verdict], hashes: Hashes, direction: str) -> tuple[Candidate, Source] | None:
    """The first record that makes a choice among what may run: of this Key, of a neighbour, of a sibling."""
    able = [Able(v.variant, v.configs) for v in verdicts if v.candidate(direction) is not None]

    def built(taken: Taken, tier: str, path: str, differences: tuple[str, ...]) -> tuple[Candidate, Source]:
        timing = taken.outcome.timing
        exact = timing is not None and not differences
        seconds = (
            timing.median_us * 1e-6 if exact and timing else taken.variant.cost(evidence.key, taken.config, dict(DIRECTIONS)[direction])
        )
        reason = _why_taken(taken, taken.record.created, taken.record.origin) + (f"; {'; '.join(differences)}" if differences else "")
        source = Source(direction, tier, reason, taken.record, taken.outcome, path, differences, tuple(evidence.notes))
        return Candidate(taken.variant, taken.config, seconds), source

    for hit in evidence.hits:
        taken = evidence.take(hit, able, hashes)
        if taken is not None:
            return built(taken, hit.tier, hit.source, ())
    for hit, _ in evidence.near():
        taken = evidence.take(hit, able, hashes)
        if taken is not None:
            return built(taken, "neighbour", hit.source, tuple(key_differences(evidence.text, hit.record.key)))
    sibling = evidence.sibling()
    taken = None if sibling is None else evidence.take(sibling, able, hashes, declared=True)
    if sibling is not None and taken is not None:
        pairs = evidence.environment.differences(sibling.environment).items()
        return built(taken, "sibling", sibling.source, tuple(f"{name}: here {here}, there {there}" for name, (here, there) in pairs))
    return None


def _locked(path: str, evidence: Evidence, recurrence: Recurrence, hashes: Hashes, verdicts: list[Verdict]) -> tuple[Candidate, Source]:
    """The decision of the lock file. Raises LockError with the difference where it cannot be made again."""
    from ..tuning.lock import load

    lock, direction = load(path), evidence.direction
    entry = lock.find(evidence.environment, recurrence.name, evidence.text, direction)
    where = f"{path} (digest {lock.digest}): {direction} of {evidence.text} was locked to {entry.variant} {entry.config}"
    verdict = next((v for v in verdicts if v.variant.name == entry.variant), None)
    if verdict is None:
        raise LockError(f"{where}, which is no variant here. To fix: install what registers it, or lock again.")
    have = hashes.of(verdict.variant)
    if have != entry.kernel_hash:
        raise LockError(
            f"{where}; its code differs: locked {entry.kernel_hash}, here {have}. To fix: use the version that was locked, or lock again."
        )
    reasons = verdict.refusals or verdict.partial
    if verdict.candidate(direction) is None:
        raise LockError(f"{where}; here it is refused: " + "; ".join(r.text() for r in reasons) + ". To fix: lock again.")
    config = rebuild(verdict.configs, entry.fields(), declared=False)
    if not config:
        raise LockError(f"{where}, which is no config of it here: {verdict.configs}. To fix: lock again.")
    seconds = verdict.variant.cost(evidence.key, config[0], dict(DIRECTIONS)[direction])
    source = Source(direction, "lock", f"locked by {path} (digest {lock.digest})", path=path)
    return Candidate(verdict.variant, config[0], seconds), source


def decide(recurrence: Recurrence, problem: Problem, choice: str | None, *, records: bool = True, lock: bool = True) -> Decision:
    """Run the tiers. With a gradient, forward and backward are chosen each for itself: every backward fits every forward.

    records, lock: whether these tiers are asked (not for the torch variants that torch.func runs).
    """
    key = problem.key()
    known = _Known(recurrence, key) if records else None
    failures = known.failures if known else {}

    def weighed(variant: Variant, p: Problem) -> Verdict:
        return weigh(variant, p, failures)

    if choice is not None:
        check_choice(recurrence, choice, f"mode {choice!r}")
        verdicts, reason = _forced(recurrence, key, choice, weighed)
    else:
        verdicts, reason = [weighed(v, key) for v in recurrence.variants if v.name != "reference"], ""
    path = settings.current.lock if lock and known and choice is None else None
    found: dict[str, tuple[Candidate, Source]] = {}
    for direction, _ in DIRECTIONS[: 2 if key.grad else 1]:
        pool = [v for v in verdicts if v.candidate(direction) is not None]
        try:
            if path and known:
                reference = [] if any(v.variant.name == "reference" for v in verdicts) else [weighed(recurrence.variant("reference"), key)]
                found[direction] = _locked(path, known.evidence[direction], recurrence, known.hashes, verdicts + reference)
                continue
        except LockError as error:
            return Decision(key, "lock", str(error), None, None, tuple(verdicts), blocked=str(error))
        measured = _from_records(known.evidence[direction], pool, known.hashes, direction) if known and pool else None
        if measured is not None:
            found[direction] = measured
        elif pool:
            candidate, why = _estimated(pool, direction)
            notes = tuple(known.evidence[direction].notes) if known else ()
            found[direction] = candidate, Source(direction, "estimate", why, notes=notes)
        elif choice is None:
            last = next((v for v in verdicts if v.variant.name == "reference"), None) or weighed(recurrence.variant("reference"), key)
            verdicts = verdicts if last in verdicts else [*verdicts, last]
            if last.candidate(direction) is not None:
                found[direction] = last.candidate(direction), Source(direction, "reference", "every other variant is refused")  # type: ignore[assignment]
    if len(found) < (2 if key.grad else 1):
        return Decision(
            key, "forced" if choice is not None else "reference", reason or "every variant is refused", None, None, tuple(verdicts)
        )
    if choice is not None:
        found = {name: (c, _named(s, reason)) for name, (c, s) in found.items()}
    sources = tuple(source for _, source in found.values())
    text = sources[0].reason if len(sources) == 1 or sources[0].reason == sources[1].reason else _both(sources)
    backward = found["backward"][0] if key.grad else None
    return Decision(key, sources[0].tier, text, found["forward"][0], backward, tuple(verdicts), sources)


def _named(source: Source, reason: str) -> Source:
    """The source of a choice among what a person named."""
    if source.tier in ("estimate", "reference"):
        return dataclasses.replace(source, tier="forced", reason=reason)
    return dataclasses.replace(source, tier="forced", reason=f"{reason}; its config: {source.tier} record, {source.reason}")


def _both(sources: tuple[Source, ...]) -> str:
    first, second = sources
    if first.tier == second.tier:
        return f"{first.reason}; {second.reason}"
    return f"{first.reason}; backward by {second.tier}: {second.reason}"
