"""Ranks that agree on what they run: missing measurements are shared out, taken without any collective, and gathered.

    from fla_dispatch import distributed
    distributed.prepare(calls)          # after init_process_group, before the first step, on every rank

Each rank may ask for other calls, and may be on another kind of device. No collective is inside measuring, so a rank that
fails or takes another road leaves its records out and no rank waits for it in a kernel. Records merge by a rule that knows no
order, so all ranks of an environment end with the same ones, and digests of the decisions prove it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import registry
from .device import default_device, profile
from .dispatch import miss
from .dispatch.evidence import Hashes
from .dispatch.tiers import decide
from .dispatch.warm import missing
from .errors import FlaDispatchError
from .problem import Problem
from .tuning.keys import parse_key

if TYPE_CHECKING:
    from .tuning.records import Record
    from .tuning.warmup import Call


class DistributedError(FlaDispatchError, RuntimeError):
    """Ranks could not agree: one is gone, or they decide differently from equal records; the difference is in the message."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` did. digest: of this rank's decisions, equal on all ranks of its environment.

    keys: of all ranks of this environment; tuned: those that this rank measured; missing: those that nobody could measure, which
    stay estimates; failures: rank -> what went wrong there while measuring.
    """

    digest: str
    keys: int
    tuned: int
    missing: tuple[str, ...]
    failures: dict[int, str]


class _Ranks:
    """Gathers Python objects over the host, with a limit on waiting."""

    def __init__(self, group: dist.ProcessGroup | None, seconds: float) -> None:
        limit = datetime.timedelta(seconds=seconds)
        own = group is None or dist.get_backend(group) != "gloo"
        members = None if group is None else dist.get_process_group_ranks(group)
        local = members is not None  # only the ranks of the group are here
        try:
            self._made = dist.new_group(members, timeout=limit, backend="gloo", use_local_synchronization=local) if own else None
        except RuntimeError as error:
            raise _gone(dist.get_rank(), "meeting", error) from error
        self.group = self._made if own else group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def gather(self, value: Any, what: str) -> list[Any]:
        """The values of all ranks. Raises DistributedError when a rank is gone or silent for too long."""
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            raise _gone(self.rank, f"gathering {what}", error) from error
        return found

    def close(self) -> None:
        if self._made is not None:
            dist.destroy_process_group(self._made)


def _gone(rank: int, doing: str, error: RuntimeError) -> DistributedError:
    return DistributedError(
        f"rank {rank}: {doing} failed, since a rank is gone or silent: {error}. To fix: look at the other ranks' errors."
    )


def _decisions(keys: Iterable[Problem]) -> dict[str, str]:
    """What this process decides for each key: `key direction` -> variant, config and the hash of its code."""
    found = {}
    for key in keys:
        recurrence = registry.get_recurrence(key.recurrence)
        decision, hashes = decide(recurrence, key, None), Hashes(recurrence.variants)
        for direction, c in (("forward", decision.forward), ("backward", decision.backward)):
            if c is not None:
                config = None if c.config is None else c.config._asdict()
                found[f"{key.text()} {direction}"] = f"{c.variant.name} {json.dumps(config, sort_keys=True)} code {hashes.of(c.variant)}"
    return found


def _digest(decisions: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(decisions.items())).encode()).hexdigest()[:16]


def _known(env: Any, keys: Iterable[Problem]) -> list[Record]:
    """This rank's records of some keys."""
    from .tuning.records import record_key
    from .tuning.store import get_store

    store = get_store()
    hits = (
        store.lookup(env, key.recurrence, record_key(key), d)
        for key in keys
        for d in (("forward", "backward") if key.grad else ("forward",))
    )
    return [hit.record for hit in hits if hit is not None]


def _measure(share: list[Problem], device: torch.device, budget_seconds: float) -> str:
    """Measure this rank's share; what went wrong, or ''."""
    from .tuning.search import tune

    try:
        for name in dict.fromkeys(key.recurrence for key in share):
            tune(registry.get_recurrence(name), [k for k in share if k.recurrence == name], budget_seconds, device)
    except Exception as error:  # a rank that cannot measure is reported to all of them, and its keys stay estimates
        return f"{type(error).__name__}: {error}"
    return ""


def prepare(
    calls: Iterable[Call | Problem] | None = None,
    *,
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
    budget_seconds: float = 600.0,
    timeout_seconds: float | None = None,
) -> Prepared:
    """Measure what any rank misses, each key once per kind of device, and agree; call it on every rank of the group.

    calls: warmup.Calls or Keys of this rank; by default the keys that this process has met without a record. device: this
    rank's (default: its current accelerator). budget_seconds: of measuring, per rank. timeout_seconds: of waiting for a rank,
    by default two minutes over the budget. Raises DistributedError when a rank is gone or ranks decide differently.
    """
    from .tuning.choice import merge
    from .tuning.environment import current
    from .tuning.records import Record
    from .tuning.store import get_store

    device = device or default_device()
    here, env = profile(device), current(device)
    given = list(miss.missed) if calls is None else list(calls)
    wanted = [dataclasses.replace(c if isinstance(c, Problem) else c.key(here), device=here).key() for c in given]
    ranks = _Ranks(group, timeout_seconds if timeout_seconds is not None else budget_seconds + 120.0)
    try:
        asked = ranks.gather((env.directory, [key.text() for key in wanted]), "keys")
        texts = sorted({text for directory, found in asked if directory == env.directory for text in found})
        keys = [parse_key(text, here) for text in texts]
        known = [(directory, set(found)) for directory, found in ranks.gather((env.directory, _texts(keys, missing(keys))), "known keys")]
        absent = [key for key in keys if not any(directory == env.directory and key.text() in found for directory, found in known)]
        peers = [rank for rank, (directory, _) in enumerate(asked) if directory == env.directory]
        share = absent[peers.index(ranks.rank) :: len(peers)]
        failure = _measure(share, device, budget_seconds)
        gathered = ranks.gather((env.directory, failure, [r.to_json() for r in _known(env, keys)]), "records")
        merged: dict[tuple[str, str, str], Record] = {}
        for directory, _, lines in gathered:
            for record in map(Record.model_validate_json, lines if directory == env.directory else ()):
                name = record.recurrence, record.key, record.direction
                merged[name] = merge(merged[name], record) if name in merged else merge(record, record)
        store = get_store()
        for record in merged.values():
            own = store.lookup(env, record.recurrence, record.key, record.direction)
            if own is None or own.record != record:
                store.put(env, record)
        decisions = _decisions(keys)
        _agree(ranks.gather((env.directory, decisions), "decisions"), env.directory)
    finally:
        ranks.close()
    failures = {rank: text for rank, (_, text, _) in enumerate(gathered) if text}
    if failures and ranks.rank == 0:
        warnings.warn("ranks failed to measure: " + "; ".join(f"{r}: {t}" for r, t in failures.items()), stacklevel=2)
    still = tuple(key.text() for key in missing(keys))
    return Prepared(_digest(decisions), len(keys), sum(key.text() not in still for key in share), still, failures)


def _texts(keys: list[Problem], absent: list[Problem]) -> list[str]:
    """Texts of the keys that are not absent."""
    gone = set(absent)
    return [key.text() for key in keys if key not in gone]


def _agree(gathered: list[tuple[str, dict[str, str]]], directory: str) -> None:
    """Raise DistributedError unless all ranks of an environment decide alike."""
    own = {rank: found for rank, (where, found) in enumerate(gathered) if where == directory}
    if len({_digest(found) for found in own.values()}) <= 1:
        return
    lines = []
    for key in sorted({key for found in own.values() for key in found}):
        by_decision: dict[str, list[int]] = {}
        for rank, found in own.items():
            by_decision.setdefault(found.get(key, "nothing"), []).append(rank)
        if len(by_decision) > 1:
            lines.append(f"  {key}: " + "; ".join(f"ranks {ranks}: {text}" for text, ranks in by_decision.items()))
    raise DistributedError("ranks decide differently:\n" + "\n".join(lines) + "\nTo fix: install the same versions on all ranks.")
