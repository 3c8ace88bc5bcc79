"""The calls that prove a config of a recurrence over tokens: small, with odd lengths, stress gates, segments, and a wave of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...problem import Problem
from ...registry import Trial

#: Lengths around the edges of chunks, none and one token among them.
PACK = (0, 1, 2, 63, 64, 65, 2)


def proof_key(p: Problem) -> Problem:
    """Lengths, heads and counts are arguments of every kernel, and no constants of one."""
    return dataclasses.replace(
        p, T=256, mean_length=256, N=1, BH=p.group * 2, grad=False, capture=False, deterministic=False, interpret=False, forced=False
    )


def trials(p: Problem, config: Any, *, gated: bool, alone: bool) -> tuple[Trial, ...]:
    """One odd length over several chunks, one token, gates under stress, several segments, and more than one wave of blocks.

    The wave is repeated. gated: there are gates to put under stress; alone: a single token has gradients that are more than rounding.
    A config with a field SEG cuts sequences into segments of so many tokens; one with a field tokens takes none that are longer.
    """
    few, many = (1, 1) if p.BH // p.group == 1 else (3, 16)
    waves = 5 * p.device.units  # narrow blocks share a unit by up to eight, and have several tiles of V
    segment, longest = int(getattr(config, "SEG", 0)), int(getattr(config, "tokens", 1 << 30))

    def trial(name: str, N: int, T: int, heads: int, regime: str = "mild", repeats: int = 1, pack: tuple[int, ...] = ()) -> Trial:
        if longest < T:
            T = longest - 3
        if p.packed:
            N, T = len(pack), sum(pack)
        sizes = dataclasses.replace(p, N=N, BH=N * heads * p.group, T=T, mean_length=-(-T // N) if p.packed else T)
        return Trial(name, sizes, heads * p.group, pack if p.packed else None, regime, repeats)

    found = [trial("odd", 2, 197, few, pack=PACK)]
    if not p.packed and alone:
        found.append(trial("one", 3, 1, few))
    if gated:
        found += [trial(regime, 6, 131, few, regime, pack=(5, 0, 126, 7, 131, 3)) for regime in ("strong", "reset")]
    if segment:
        long = 2 * segment + 70
        found.append(trial("segments", 1, long, few, pack=(1, long, segment, 0, 3)))
    N = max(2, -(-waves // (many * p.group)))
    found.append(trial("wave", N, 67, many, repeats=3, pack=((67, 1, 64, 70) * N)[: N + 1]))
    return tuple(found)
