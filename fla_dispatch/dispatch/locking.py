"""What a lock file is made of: the decisions of this process for the keys of its records and of calls that are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .. import registry, settings
from ..device import profile
from ..errors import LockError
from ..problem import Problem
from .evidence import Hashes
from .tiers import DIRECTIONS, decide

if TYPE_CHECKING:
    from ..tuning.lock import Entry


def recorded_keys(device: torch.device) -> list[Problem]:
    """Keys that the store has records of in this device's environment, in order of their text."""
    from ..tuning.environment import current
    from ..tuning.keys import parse_key
    from ..tuning.store import get_store

    env, store, here = current(device), get_store(), profile(device)
    names = registry.recurrence_names()
    texts = {key for r in store.recurrences(env) if r in names for d, _ in DIRECTIONS for key in store.keys(env, r, d)}
    return [parse_key(text, here) for text in sorted(texts)]


def entries(device: torch.device, keys: Iterable[Problem] = ()) -> list[Entry]:
    """Lock entries of every recorded key and of `keys`, as decided now without a lock. Raises LockError where nothing may run."""
    from ..tuning.environment import current
    from ..tuning.lock import Entry, config_text
    from ..tuning.records import record_key

    found: dict[Entry, None] = {}
    env = current(device).directory
    with settings.override(lock=None):
        for key in dict.fromkeys([*recorded_keys(device), *(k.key() for k in keys)]):
            recurrence = registry.get_recurrence(key.recurrence)
            decision, hashes = decide(recurrence, key, None), Hashes(recurrence.variants)
            if decision.forward is None:
                raise LockError(f"nothing may run {key.text()}: {decision.reason}. To fix: leave this call out.")
            for direction, candidate in (("forward", decision.forward), ("backward", decision.backward)):
                if candidate is not None:
                    variant, config = candidate.variant, config_text(candidate.config)
                    found[Entry(env, key.recurrence, record_key(key), direction, variant.name, config, hashes.of(variant))] = None
    return list(found)
