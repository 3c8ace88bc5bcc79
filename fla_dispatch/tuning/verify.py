"""Proving records again on the device that is here: a driver, a compiler or a kernel may have changed since."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .. import registry
from ..device import profile
from ..errors import UnknownNameError
from . import environment
from .hashing import kernel_hash
from .jobs import Entry
from .keys import parse_key
from .proof import Verdict
from .records import Record, fingerprint
from .store import Store, get_store
from .worker import JobError, Lost, Worker


class Verified(NamedTuple):
    """A record's choice, proven again. status: a Verdict's, or `stale` (its code has changed) or `gone` (no such variant or config)."""

    record: Record
    status: str
    detail: str
    verdict: Verdict | None


class _Claim(NamedTuple):
    """A choice that records make, by what its proof depends on."""

    proof_key: object
    fingerprint: str
    backward: bool


def verify(
    *,
    device: torch.device,
    store: Store | None = None,
    regime: str = "eager",
    recurrence: str | None = None,
    plugins: Sequence[str] = (),
    limit_seconds: float = 60.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Verified]:
    """Prove the choice of every record of this device's environment, once for all records that share a proof."""
    store, say = store or get_store(), progress or (lambda done, total, text: None)
    records = [found.record for found in store.records(environment.current(device, regime), recurrence) if found.record.choice]
    claims: dict[_Claim, tuple[Entry, list[Record]]] = {}
    results: list[Verified] = []
    for record in records:
        found = _claim(record, device)
        if isinstance(found, Verified):
            results.append(found)
        else:
            claims.setdefault(found[0], (found[1], []))[1].append(record)
    worker = Worker(plugins)
    try:
        for n, (claim, (entry, members)) in enumerate(claims.items()):
            say(n, len(claims), claim.fingerprint)
            arguments = {"recurrence": members[0].recurrence, "device": device, "proof_key": claim.proof_key, "entries": [entry]}
            try:
                events = list(worker.run("prove", arguments, limit_seconds))
                verdict: Verdict = next(e[2] for e in events if e[0] == "end")
            except (Lost, JobError) as error:
                verdict = Verdict(error.status, error.detail)
            results += [Verified(r, verdict.status, verdict.detail, verdict) for r in members]
    finally:
        worker.close()
    return results


def _claim(record: Record, device: torch.device) -> tuple[_Claim, Entry] | Verified:
    choice = record.choice
    assert choice is not None
    r = registry.get_recurrence(record.recurrence)
    assert r.workload is not None
    try:
        key = parse_key(record.key, profile(device))
        variant = r.variant(choice.variant)
    except (ValueError, UnknownNameError) as error:
        return Verified(record, "gone", str(error), None)
    configs = {fingerprint(variant.name, c): c for c in variant.configs(key)}
    if choice.fingerprint not in configs:
        return Verified(record, "gone", f"{choice.fingerprint} is no longer a config of {variant.name}", None)
    if record.kernels.get(variant.name) != kernel_hash(variant):
        return Verified(record, "stale", f"the code of {variant.name} has changed since {record.created}", None)
    backward = record.direction == "backward"
    proof_key = r.workload.proof_key(dataclasses.replace(key, device=profile(device)))
    return _Claim(proof_key, choice.fingerprint, backward), Entry(0, variant.name, configs[choice.fingerprint], backward)
