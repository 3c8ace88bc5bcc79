"""Proofs of several groups of Keys side by side, each in a process of its own; nothing is timed meanwhile."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from ..problem import Problem
from .candidates import Candidate
from .jobs import Entry
from .proof import Verdict
from .worker import Inline, JobError, Lost, Worker

#: How many groups are proven at once: oracles in float64 take memory.
SIDE_BY_SIDE = 5

#: A candidate's fingerprint and whether it is of backward, with the candidate; and what became of it.
Named = list[tuple[tuple[str, bool], Candidate]]
Verdicts = dict[tuple[str, bool], Verdict]


class Provers:
    """The processes that prove, the first of which also times. failures: (proof key, reason) of groups that nothing could prove."""

    def __init__(self, recurrence: str, device: torch.device, worker: Worker | Inline, plugins: Sequence[str], count: int, limit: float):
        self.recurrence, self.device, self.limit = recurrence, device, limit
        self.workers: list[Worker | Inline] = [worker, *(Worker(plugins) for _ in range(count - 1))]
        self.failures: list[tuple[str, str]] = []
        self.late: list[str] = []  # kernels that these processes compiled because nobody had
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.workers)

    def run(self, groups: Iterable[tuple[Problem, Named]], say: Callable[[str, str, str], None]) -> list[Verdicts]:
        """The verdicts on each group's candidates; at most as many groups as there are processes."""
        jobs = [(key, named, worker, say) for (key, named), worker in zip(groups, self.workers, strict=False)]
        if len(jobs) < 2:
            return [self._prove(*job) for job in jobs]
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            return [done.result() for done in [pool.submit(self._prove, *job) for job in jobs]]

    def _prove(self, key: Problem, named: Named, worker: Worker | Inline, say: Callable[[str, str, str], None]) -> Verdicts:
        say("prove", key.text(), f"{len(named)} candidates")
        remaining = [Entry(i, c.variant.name, c.config, name[1]) for i, (name, c) in enumerate(named)]
        arguments = {"recurrence": self.recurrence, "device": self.device, "proof_key": key}
        verdicts: Verdicts = {}
        stalled = False
        while remaining:
            current, results = None, {}
            try:
                for kind, number, *rest in worker.run("prove", {**arguments, "entries": remaining}, self.limit):
                    current = number if kind == "begin" else None
                    if kind == "end":
                        results[number] = rest[0]
                    elif kind == "late":
                        with self._lock:
                            self.late += number
            except (Lost, JobError) as error:
                if current is not None:
                    results[current] = Verdict(error.status, error.detail)
                elif not results and stalled:  # no candidate has begun, twice: none is to blame
                    with self._lock:
                        self.failures.append((key.text(), f"{error.status}: {error.detail}"))
                    say("failed", key.text(), error.detail)
                    break
                stalled = not results
            verdicts.update({named[number][0]: verdict for number, verdict in results.items()})
            remaining = [e for e in remaining if e.number not in results]
        return verdicts

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
