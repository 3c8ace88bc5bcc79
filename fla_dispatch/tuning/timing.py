"""Timing: one sample of a call at a time, so that candidates take turns and a drifting clock meets all of them alike.

Eager time is the sustained rate of back-to-back calls: the larger of the device's time, behind a flushed L2 cache, and the host
time of issuing. Graph time is a replay of the captured call. On a CPU both are the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from .records import Timing

Call = Callable[[], object]

#: Bytes that are written between samples: several times any L2 cache.
FLUSH = 1 << 28


class Clock(Protocol):
    """A way to take one sample, in seconds; the call's work is done when it returns."""

    def sample(self, call: Call) -> float: ...


class HostClock:
    """The host's clock, for CPUs."""

    def sample(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class DeviceClock:
    """Device events around the call, and the host time of issuing it where that is longer."""

    def __init__(self, device: torch.device, *, host: bool = True) -> None:
        self._module = getattr(torch, device.type)
        self._device, self._host = device, host
        self._flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=device)

    def sample(self, call: Call) -> float:
        begin, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize(self._device)
        self._flush.zero_()
        begin.record()
        start = time.perf_counter()
        call()
        issued = time.perf_counter() - start
        end.record()
        self._module.synchronize(self._device)
        device: float = begin.elapsed_time(end) * 1e-3
        return max(device, issued) if self._host else device


def clock(device: torch.device, regime: str) -> Clock:
    """The clock of a device and timing regime."""
    if device.type in ("cuda", "xpu"):
        return DeviceClock(device, host=regime == "eager")
    return HostClock()


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph's replay; the call itself where there are no graphs. Raises what capturing raises."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # outputs live in the graph's memory as long as it does
    with torch.cuda.graph(graph):
        kept.append(call())

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def summarise(samples: Sequence[float]) -> Timing:
    """Median, minimum and median absolute deviation of samples in seconds."""
    median = statistics.median(samples)
    deviation = statistics.median(abs(s - median) for s in samples)
    return Timing(median_us=median * 1e6, min_us=min(samples) * 1e6, mad_us=deviation * 1e6, rounds=len(samples))


class Plan(NamedTuple):
    """How one field of candidates is timed.

    seconds: of samples, in all; least, most: rounds of the finals; finalists: how many reach them beside those that always do;
    hopeless: a candidate this many times slower than the fastest is not sampled again.
    """

    seconds: float = 0.1
    least: int = 5
    most: int = 30
    finalists: int = 3
    hopeless: float = 1.5


def race(
    contenders: dict[int, Call], take: Callable[[int, Call], float | None], plan: Plan, always: frozenset[int] = frozenset()
) -> dict[int, list[float]]:
    """Samples of each contender by successive halving: all twice, the better half again, then interleaved finals.

    take(i, call) -> seconds, or None for a contender that failed and leaves. always: contenders that reach the finals whatever
    their time (the default, the incumbent), unless they are hopeless by a factor of ten.
    """
    samples: dict[int, list[float]] = {i: [] for i in contenders}
    alive = list(contenders)
    spent = 0.0

    def once(i: int) -> None:
        nonlocal spent
        seconds = take(i, contenders[i])
        if seconds is None:
            alive.remove(i)
            samples.pop(i)
        else:
            samples[i].append(seconds)
            spent += seconds

    def keep(count: int) -> None:
        fastest = min((min(samples[i]) for i in alive), default=0.0)
        ranked = sorted(alive, key=lambda i: min(samples[i]))
        good = [i for n, i in enumerate(ranked) if n < count and min(samples[i]) <= plan.hopeless * fastest]
        good += [i for i in ranked if i in always and i not in good and min(samples[i]) <= 10 * fastest]
        alive[:] = [i for i in alive if i in good]

    for i in list(alive):
        once(i)
    best = min(map(min, samples.values()), default=0.0)
    for i in [i for i in alive if 2 * plan.hopeless * best < samples[i][0] <= plan.seconds / 10]:
        once(i)  # a stall of the host is no verdict, and another look is cheap
    alive = [i for i in alive if min(samples[i]) <= 2 * plan.hopeless * min(map(min, samples.values())) or i in always]
    for i in list(alive):
        once(i)
    while alive and len(alive) > plan.finalists + len(always):
        before = len(alive)
        keep(max(plan.finalists, -(-before // 2)))
        if len(alive) == before:
            break
        for i in list(alive):
            once(i)
    keep(plan.finalists)
    one_round = sum(min(samples[i]) for i in alive)
    rounds = int(min(plan.most, max(plan.least, (plan.seconds - spent) / one_round if one_round else plan.most)))
    for n in range(rounds):
        for i in alive[n % len(alive) :] + alive[: n % len(alive)] if alive else ():
            once(i)
    return samples
