"""The rule that makes a choice of outcomes, and the merge of records that follows from it.

The rule: candidates within max(2 %, 3 standard errors) of the fastest median form a band, inside which timings cannot be told
apart; the error is that of a median of so many rounds, from their median absolute deviation. Of the band the incumbent wins, then
what is declared first, among those that beat the default by 2 %; if none does, the default stays. So the choice depends neither
on the order of measuring nor on noise below the band.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .records import Choice, DirectionName, Origin, Outcome, Record, now

#: A candidate must be this much faster than the default, and is this close to the fastest when it is in the band.
BAND = 0.02
#: Standard errors of the fastest candidate's median that widen the band; one is so many median absolute deviations over the root of
#: the rounds (of normal samples: 1.4826 for their deviation, sqrt(pi / 2) for their median's).
ERRORS, DEVIATIONS = 3.0, 1.858

#: What is kept when two outcomes of one candidate and code disagree, first wins: a wrong, racy or crashing kernel stays so
#: however often it also passed; running out of time or memory is the fault of a moment, which a later success mends.
_VERDICTS = ("wrong", "racy", "crash", "ok", "compile_error", "timeout", "oom")


def _preference(o: Outcome) -> tuple[object, ...]:
    """Total order of outcomes of one candidate and code: the verdict, then the quieter timing, then its text.

    A timing of fewer than three samples says nothing of its noise, so it comes after those that do.
    """
    t = o.timing
    noise = (2, 0.0, 0, 0.0) if t is None else (int(t.rounds < 3), t.mad_us / t.median_us if t.median_us else 0.0, -t.rounds, t.median_us)
    return (_VERDICTS.index(o.status), *noise, o.canonical)


def choose(
    outcomes: Iterable[Outcome], default_fingerprint: str, declared_order: Sequence[str], incumbent: str | None = None
) -> Choice | None:
    """The choice among outcomes, or None if no candidate is ok.

    default_fingerprint: the candidate that stays unless it is beaten (no guard if it is not among the ok outcomes);
    declared_order: fingerprints as the variants and their configs are declared, unlisted ones come after them.
    """
    best_of: dict[str, Outcome] = {}
    for o in outcomes:
        known = best_of.get(o.fingerprint)
        if known is None or _preference(o) < _preference(known):
            best_of[o.fingerprint] = o
    times = {name: o.timing for name, o in best_of.items() if o.status == "ok" and o.timing is not None}
    if not times:
        return None
    position = {name: i for i, name in reversed(list(enumerate(declared_order)))}

    def declared(name: str) -> tuple[int, str]:
        return position.get(name, len(position)), name

    fastest = min(times, key=lambda name: (times[name].median_us, *declared(name)))
    best = times[fastest]
    limit = best.median_us + max(BAND * best.median_us, ERRORS * DEVIATIONS * best.mad_us / best.rounds**0.5)
    band = sorted((name for name in times if times[name].median_us <= limit), key=declared)
    default = times.get(default_fingerprint)
    able = [n for n in band if default is None or n == default_fingerprint or times[n].median_us * (1 + BAND) <= default.median_us]
    able = able or [default_fingerprint]  # rounding alone may leave the fastest no 2 % ahead of a default outside the band
    unguarded = incumbent if incumbent in band else band[0]
    chosen = incumbent if incumbent is not None and incumbent in able else able[0]
    guarded = chosen == default_fingerprint and chosen != unguarded
    rule = "fastest" if chosen == fastest else "default_guard" if guarded else "band"
    others = [times[name].median_us for name in times if name != chosen]
    own = times[chosen].median_us
    margin = min(others) / own if others and own else 1.0
    winner = best_of[chosen]
    return Choice.model_validate({"variant": winner.variant, "config": winner.config, "rule": rule, "margin": margin, "band": tuple(band)})


def settle(record: Record) -> Record:
    """The record with its outcomes in canonical order and its choice as the rule makes it."""
    kept: dict[tuple[str, str], Outcome] = {}
    for o in record.outcomes:
        known = kept.get((o.fingerprint, o.kernel_hash))
        if known is None or _preference(o) < _preference(known):
            kept[o.fingerprint, o.kernel_hash] = o
    outcomes = tuple(kept[name] for name in sorted(kept))
    current = [o for o in outcomes if record.kernels.get(o.variant, o.kernel_hash) == o.kernel_hash]
    choice = choose(current, record.default, record.order, record.incumbent)
    return record.model_copy(update={"outcomes": outcomes, "choice": choice})


def make_record(
    recurrence: str,
    key: str,
    direction: DirectionName,
    outcomes: Iterable[Outcome],
    *,
    default: str,
    order: Sequence[str],
    incumbent: str | None = None,
    kernels: Mapping[str, str] | None = None,
    origin: Origin = "measured",
    versions: Mapping[str, str] | None = None,
    created: str | None = None,
) -> Record:
    """A settled record. kernels: variant -> current hash; by default that of the outcomes, each variant's being one.

    Raises ValueError when kernels is not given and a variant has outcomes of two hashes.
    """
    outcomes = tuple(outcomes)
    if kernels is None:
        kernels = {o.variant: o.kernel_hash for o in outcomes}
        mixed = sorted({o.variant for o in outcomes if kernels[o.variant] != o.kernel_hash})
        if mixed:
            raise ValueError(f"outcomes of {', '.join(mixed)} have several kernel hashes; pass `kernels` to say which is current")
    return settle(
        Record(
            recurrence=recurrence,
            key=key,
            direction=direction,
            outcomes=outcomes,
            default=default,
            order=tuple(order),
            incumbent=incumbent,
            kernels=dict(kernels),
            origin=origin,
            versions=dict(versions or {}),
            created=created or now(),
        )
    )


def _header(record: Record) -> tuple[str, str]:
    """Total order of headers: the newest, then its text without what is derived from outcomes."""
    return record.created, record.model_copy(update={"choice": None, "outcomes": ()}).canonical


def merge(a: Record, b: Record) -> Record:
    """Both records in one: the union of outcomes under the newer header, with the choice made anew.

    Commutative, associative, and idempotent on settled records. Raises ValueError for records of two keys or directions.
    """
    if (a.recurrence, a.key, a.direction) != (b.recurrence, b.key, b.direction):
        raise ValueError(f"records of different keys do not merge: {a.key} {a.direction}, {b.key} {b.direction}")
    newer = a if _header(a) >= _header(b) else b
    return settle(newer.model_copy(update={"outcomes": a.outcomes + b.outcomes}))
