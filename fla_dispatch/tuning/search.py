"""The tuner: for each Key compile its candidates, prove them, time those that passed, and keep what became of each.

Keys that differ in lengths and counts alone share their proofs, and Keys with and without gradients share the timing of
forward. Compiling runs in processes ahead of proving; some groups of Keys are proven side by side, and then timed one at a
time, in processes that may die. Each record is kept as
soon as it is made, so that a run that is cut loses nothing; what a record has tried already is not tried again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..device import default_device, profile
from ..problem import Problem
from ..registry import Recurrence, Trial
from . import environment, jit
from .candidates import Bench, Candidate, Field, Group, field, plain, recurrence_of
from .choice import make_record
from .crew import Crew
from .jobs import Entry
from .precompile import Compilation, CompileJob, Site
from .proof import Verdict
from .provers import SIDE_BY_SIDE, Provers
from .records import Outcome, Record, Timing, config_dict, record_key
from .store import Store, get_store
from .timing import Plan
from .worker import Inline, JobError, Lost, Worker

#: Groups of proofs whose kernels are compiled ahead of those in hand.
AHEAD = 3


class Event(NamedTuple):
    """What the tuner is doing. stage: compile | prove | time | failed; done of total keys; text: for people."""

    stage: str
    done: int
    total: int
    key: str
    text: str


class Tuner:
    """One run over Keys of one recurrence; see `tune` for the arguments."""

    def __init__(
        self,
        recurrence: Recurrence,
        keys: Iterable[Problem],
        *,
        device: torch.device | None = None,
        store: Store | None = None,
        budget_seconds: float = 600.0,
        key_seconds: float = 0.2,
        regime: str = "eager",
        processes: int | None = None,
        plugins: Sequence[str] = (),
        limit_seconds: float = 60.0,
        isolate: bool = True,
        again: bool = False,
        most: int = 12,
        out: Path | None = None,
        progress: Callable[[Event], None] | None = None,
    ) -> None:
        assert recurrence.workload is not None, f"{recurrence.name} declares no workload"
        self.recurrence, self.workload = recurrence, recurrence.workload
        self.device = device or default_device()
        self.store = store or get_store()
        self.environment = environment.current(self.device, regime)
        self.budget, self.regime, self.limit, self.again, self.most = budget_seconds, regime, limit_seconds, again, most
        self.plan = Plan(seconds=key_seconds / 2)
        self.out = None if out is None else Path(out) / self.environment.directory / f"{recurrence.name}.jsonl"
        self.progress = progress or (lambda event: None)
        self.worker: Worker | Inline = Worker(plugins) if isolate else Inline()
        count = processes if processes is not None else max(1, (os.cpu_count() or 2) - 2)
        side = max(1, min(SIDE_BY_SIDE, count // 2)) if isolate and profile(self.device).is_gpu else 1
        self.provers = Provers(recurrence.name, self.device, self.worker, plugins, side, limit_seconds)
        self.crew = Crew(count, plugins, limit_seconds) if isolate and profile(self.device).is_gpu and count else None
        self.compilation = Compilation(recurrence)
        here = profile(self.device)
        self.keys = list(dict.fromkeys(plain(dataclasses.replace(k, device=here)) for k in keys))
        self.records: dict[tuple[str, str], Record] = {}
        self.failures = self.provers.failures
        self.known = self.done = self.total = 0
        self._late: list[str] = []
        self.seconds = {"compile": 0.0, "prove": 0.0, "time": 0.0}
        self._verdicts: dict[tuple[str, bool], Verdict] = {}
        self._submitted: dict[tuple[Problem, str, bool], tuple[CompileJob, ...]] = {}
        self._began = time.monotonic()

    # -- the run -------------------------------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self._began)

    @property
    def late(self) -> dict[str, int]:
        """How often a worker compiled which kernel because the crew had not."""
        return dict(collections.Counter([*self._late, *self.provers.late]))

    @property
    def left_out(self) -> int:
        """Keys that the budget did not reach, or that nothing may run."""
        return len(self.keys) - self.known - self.done

    def run(self) -> list[Record]:
        """Tune until all keys are done or the budget is spent; the records of all keys that have one."""
        groups = self._groups(self._benches())
        if groups:
            jit.check(f"measuring {groups[0].benches[0].key.text()}")
        ahead = 0
        try:
            for n in range(0, len(groups), len(self.provers)):
                batch = groups[n : n + len(self.provers)]
                while ahead < min(len(groups), n + len(batch) + AHEAD):
                    self._submit(groups[ahead])
                    ahead += 1
                if self.left <= 0:
                    break
                with self._counted("compile"):
                    verdicts = [self._compiled(group) for group in batch]
                with self._counted("prove"):
                    self._prove(batch, verdicts)
                with self._counted("time"), contextlib.nullcontext() if self.crew is None else self.crew.held():
                    for group, self._verdicts in zip(batch, verdicts, strict=True):
                        for bench in group.benches:
                            if self.left <= 0:
                                break
                            self._time(bench)
        except TimeoutError:
            self._say("compile", "", "the budget ended before the next kernels were compiled")
        finally:
            self.provers.close()
            if self.crew is not None:
                self.crew.close()
        return list(self.records.values())

    @contextlib.contextmanager
    def _counted(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - began

    def _benches(self) -> list[Bench]:
        """Keys with something untried, by what is timed together; what is known goes straight to `records`."""
        found: dict[Problem, Bench] = {}
        for key in self.keys:
            priors = {b: self._prior(key, b) for b in ((False, True) if key.grad else (False,))}
            fields = [
                field(
                    self.recurrence, key, backward=b, most=self.most, capture=self.regime == "graph",
                    chosen=None if prior is None or prior.choice is None else prior.choice.fingerprint,
                )
                for b, prior in priors.items()
            ]  # fmt: skip
            if key.T == 0 or key.BH == 0 or None in fields:
                self.failures.append((record_key(key), "nothing to run, or nothing that may run it"))
                continue
            common = dataclasses.replace(key, grad=False)
            bench = found.setdefault(common, Bench(common, [], {}))
            for f in filter(None, fields):
                bench.fields.append(f)
                prior = priors[f.backward]
                if prior is not None:
                    bench.priors[record_key(key), f.backward] = prior
        todo = []
        for bench in found.values():
            if bench.untried(backward=False) or bench.untried(backward=True):
                todo.append(bench)
                continue
            self.known += bench.keys
            self.records.update({(r.key, r.direction): r for r in bench.priors.values()})
        self.total = sum(bench.keys for bench in todo)
        return todo

    def _prior(self, key: Problem, backward: bool) -> Record | None:
        hit = None if self.again else self.store.lookup(self.environment, key.recurrence, record_key(key), _name(backward))
        return None if hit is None else hit.record

    def _groups(self, benches: list[Bench]) -> list[Group]:
        found: dict[Problem, list[Bench]] = {}
        for bench in benches:
            found.setdefault(self.workload.proof_key(bench.key), []).append(bench)
        return [Group(key, members) for key, members in found.items()]

    def _say(self, stage: str, key: str, text: str) -> None:
        self.progress(Event(stage, self.done, self.total, key, text))

    # -- compiling -----------------------------------------------------------------------------------------------------------

    def _new(self, group: Group) -> dict[tuple[str, bool], Candidate]:
        """Candidates that a group has to prove."""
        return {(name, b): c for bench in group.benches for b in (False, True) for name, c in bench.untried(backward=b).items()}

    def _submit(self, group: Group) -> None:
        """Hand the kernels of a group's trials and calls to the crew."""
        if self.crew is None:
            return
        layouts = {self.workload.layout(bench.key)[1:]: bench.key for bench in reversed(group.benches)}
        for (name, backward), c in self._new(group).items():
            calls: list[Problem | Trial] = [*self.workload.trials(group.proof_key, c.config), *layouts.values()]
            sites = [Site(self.recurrence.name, c.variant.name, c.config, backward, call) for call in calls]
            jobs = tuple(dict.fromkeys(job for site in sites for job in self.compilation.jobs(site)))
            self._submitted[group.proof_key, name, backward] = jobs
            for job in jobs:
                self.crew.submit(job, profile(self.device).arch)

    def _compiled(self, group: Group) -> dict[tuple[str, bool], Verdict]:
        """Wait for a group's kernels; verdicts on candidates that do not compile or do not fit the device."""
        failed: dict[tuple[str, bool], Verdict] = {}
        room = profile(self.device).shared_bytes
        jobs = {n: self._submitted.get((group.proof_key, *n), ()) for n in self._new(group)}
        if self.crew is not None:
            self._say("compile", group.proof_key.text(), f"{len({j for found in jobs.values() for j in found})} kernels")
        for name, found in jobs.items():
            for job in found:
                assert self.crew is not None
                result = self.crew.result(job, self.left)
                if isinstance(result, Verdict):
                    failed[name] = result
                elif result is not None and result > room:
                    failed[name] = Verdict("compile_error", f"needs {result} B of shared memory, a block has {room} B")
        return failed

    def _prove(self, batch: list[Group], verdicts: list[dict[tuple[str, bool], Verdict]]) -> None:
        """Add the verdicts on the candidates that compiled."""
        named = [[(n, c) for n, c in self._new(group).items() if n not in known] for group, known in zip(batch, verdicts, strict=True)]
        found = self.provers.run(zip((group.proof_key for group in batch), named, strict=True), self._say)
        for known, new in zip(verdicts, found, strict=True):
            known.update(new)

    # -- timing --------------------------------------------------------------------------------------------------------------

    def _time(self, bench: Bench) -> None:
        """Time what passed its proof, and keep the records of the bench's keys."""
        entries: list[Entry] = []
        names: list[tuple[str, bool]] = []
        for backward in (False, True):
            passed = {n: c for n, c in bench.untried(backward=backward).items() if self._verdict(n, backward).status == "ok"}
            if passed:
                passed = {**bench.companions(backward=backward), **passed}
            for name, c in passed.items():
                entries.append(Entry(len(entries), c.variant.name, c.config, backward, c.seconds))
                names.append((name, backward))
        always = {(f.default, f.backward) for f in bench.fields} | {(bench.incumbent(f), f.backward) for f in bench.fields}
        arguments = {
            "recurrence": self.recurrence.name, "device": self.device, "key": bench.key, "regime": self.regime,
            "always": frozenset(i for i, name in enumerate(names) if name in always), "plan": self.plan,
        }  # fmt: skip
        failed: dict[tuple[str, bool], Verdict] = {}
        times: dict[tuple[str, bool], tuple[Timing, int | None]] = {}
        remaining = entries
        while remaining:
            current, finished = None, False
            job = {**arguments, "entries": remaining, "source": self._source(bench, failed)}
            try:
                for kind, *rest in self.worker.run("time", job, self.limit):
                    current = rest[0] if kind == "begin" else None
                    if kind == "end":
                        failed[names[rest[0]]] = rest[1]
                    elif kind == "times":
                        times.update({names[i]: (t, rest[1].get(i)) for i, t in rest[0].items()})
                        finished = True
                    elif kind == "late":
                        self._late += rest[0]
                break
            except JobError as error:
                self.failures.append((bench.key.text(), f"{error.status}: {error.detail}"))
                self._say("failed", bench.key.text(), error.detail)
                break
            except Lost as error:
                if current is None and not finished and not any(names[e.number] in failed for e in remaining):
                    self.failures.append((bench.key.text(), f"{error.status}: {error.detail}"))
                    break
                if current is not None:
                    failed[names[current]] = Verdict(error.status, error.detail)
            remaining = [e for e in remaining if names[e.number] not in failed and not (finished and not e.backward)]
        self.done += bench.keys
        for f in bench.fields:
            self._keep(bench, f, times, failed)

    def _verdict(self, name: str, backward: bool) -> Verdict:
        return self._verdicts.get((name, backward), Verdict("crash", "not proven"))

    def _source(self, bench: Bench, failed: dict[tuple[str, bool], Verdict]) -> Entry | None:
        """A proven forward to make backward's residuals with."""
        new = bench.untried(backward=False)
        proven = [c for n, c in new.items() if self._verdict(n, False).status == "ok" and (n, False) not in failed]
        for c in (*proven, *bench.companions(backward=False).values()):
            return Entry(-1, c.variant.name, c.config, False)
        return None

    def _keep(
        self,
        bench: Bench,
        f: Field,
        times: dict[tuple[str, bool], tuple[Timing, int | None]],
        failed: dict[tuple[str, bool], Verdict],
    ) -> None:
        """Make and store the record of one key and direction from what is new and what was known.

        Timings are compared with those of one run alone: where anything is timed, what was timed before and lost against a choice that is
        timed again here keeps its verdict and loses its timing.
        """
        outcomes = dict(bench.tried(f))
        if any((c.fingerprint, f.backward) in times for c in f.worthy):
            outcomes = {at: o.model_copy(update={"timing": None, "peak_bytes": None}) for at, o in outcomes.items()}
        for c in f.worthy:
            name, at = (c.fingerprint, f.backward), (c.fingerprint, c.kernel_hash)
            before = outcomes.get(at)
            verdict = failed.get(name) or self._verdicts.get(name)
            timing, peak = times.get(name, (None, None))
            if verdict is None and before is not None:  # proven earlier, perhaps timed again
                if timing is not None:
                    outcomes[at] = before.model_copy(update={"timing": timing, "peak_bytes": peak})
            elif verdict is not None and (verdict.status != "ok" or timing is not None):
                outcomes[at] = Outcome(
                    variant=c.variant.name, config=config_dict(c.config), kernel_hash=c.kernel_hash, status=verdict.status,
                    timing=timing if verdict.status == "ok" else None, certificate=verdict.certificate, peak_bytes=peak,
                    detail=verdict.detail,
                )  # fmt: skip
        if not outcomes:
            return
        record = make_record(
            self.recurrence.name, record_key(f.key), _name(f.backward), outcomes.values(), default=f.default, order=f.order,
            incumbent=bench.incumbent(f), kernels={c.variant.name: c.kernel_hash for c in f.worthy}, versions=environment.versions(),
        )  # fmt: skip
        self.store.put(self.environment, record)
        self.records[record.key, record.direction] = record
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as file:
                file.write(record.model_dump_json() + "\n")
        self._say("time", record.key, _summary(record))


def _name(backward: bool) -> Any:
    return "backward" if backward else "forward"


def _summary(record: Record) -> str:
    """`forward: sweep_triton{...} 12.3 us, 1.31x over the next`."""
    best = record.outcome()
    if record.choice is None or best is None or best.timing is None:
        return f"{record.direction}: nothing passed ({', '.join(sorted({o.status for o in record.outcomes}))})"
    return f"{record.direction}: {best.fingerprint} {best.timing.median_us:.4g} us, {record.choice.margin:.2f}x"


def tune(
    op_or_recurrence: str | Recurrence,
    keys: Iterable[Problem],
    budget_seconds: float = 600.0,
    device: torch.device | None = None,
    store: Store | None = None,
    progress: Callable[[Event], None] | None = None,
    *,
    key_seconds: float = 0.2,
    regime: str = "eager",
    processes: int | None = None,
    plugins: Sequence[str] = (),
    limit_seconds: float = 60.0,
    isolate: bool = True,
    again: bool = False,
    most: int = 12,
    out: Path | None = None,
) -> list[Record]:
    """Measure what is untried of some Keys on a device and keep the records; returns those of all keys that have one.

    budget_seconds: no new key is begun after it. key_seconds: device time for the samples of one key, both directions. regime:
    eager | graph. processes: compile processes (default: all cores but two). plugins: modules that register further variants,
    imported by each process. limit_seconds: after which a candidate that says nothing is ended. isolate: False runs all
    in this process, for candidates that are trusted. again: measure also what was tried. most: candidates per key and
    direction. out: a directory that gets the records as packs of JSON lines beside the store. progress: called with Events.
    """
    recurrence = op_or_recurrence if isinstance(op_or_recurrence, Recurrence) else recurrence_of(op_or_recurrence)
    tuner = Tuner(
        recurrence, keys, device=device, store=store, budget_seconds=budget_seconds, key_seconds=key_seconds, regime=regime,
        processes=processes, plugins=plugins, limit_seconds=limit_seconds, isolate=isolate, again=again, most=most, out=out,
        progress=progress,
    )  # fmt: skip
    return tuner.run()
