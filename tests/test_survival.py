"""When the worker or its device is lost: the guilty candidate alone gets a verdict, and everything else is measured."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import torch

from fla_dispatch import registry
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.problem import Problem
from fla_dispatch.tuning import jobs
from fla_dispatch.tuning.crew import Crew
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.precompile import CompileJob, Site
from fla_dispatch.tuning.records import Record
from fla_dispatch.tuning.search import Tuner
from fla_dispatch.tuning.store import Store
from fla_dispatch.tuning.worker import Broken, Inline, JobError, Lost, Worker

planted.withdraw()  # importing registers, as a worker needs; other tests of this process must not meet it

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(planted, "KINDS", ["good"])
    planted.plant()
    yield
    planted.withdraw()


def tuner_of(directory: Path) -> Tuner:
    """A tuner of one key, in this process."""
    key: Problem = key_of("linear_attn", {"B": 1, "T": 512, "H": 2, "K": planted.K, "V": 16}, profile(CPU), dtype="float32")
    return Tuner(registry.get_recurrence("scalar_decay"), [key], device=CPU, store=Store(directory), isolate=False, key_seconds=0.02)


def statuses(record: Record) -> dict[str, str]:
    """Status of each planted kind."""
    return {str(o.config["kind"]): o.status for o in record.outcomes if o.config and "kind" in o.config}


def test_time_stands_still_for_a_held_process() -> None:
    """A stopped process says nothing for longer than its limit, and is no timeout; released it answers."""
    worker = Worker()
    key = key_of("linear_attn", {"B": 1, "T": 16, "H": 1, "K": planted.K, "V": 16}, profile(CPU), dtype="float32")
    entries = [jobs.Entry(0, "reference", None, False)]
    job = {"recurrence": "scalar_decay", "device": CPU, "proof_key": key, "entries": entries}
    try:
        list(worker.run("prove", job, 60.0))  # it has started
        worker.hold()
        release = threading.Timer(3.5, worker.release)
        release.start()
        events = [event[0] for event in worker.run("prove", job, 2.5)]
        assert events == ["begin", "end"]
        assert worker.starts == 1
    finally:
        worker.close()


def test_a_device_that_is_lost_while_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends right after the verdict on its candidate: that one is out, all others are still timed."""
    run = Inline.run
    ran: list[str] = []

    def ending(self: Inline, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        ran.append(function)
        for event in run(self, function, arguments, limit):
            yield event
            if function == "time" and event[0] == "end":
                raise Lost("crash", "the process ended: exit code 3")

    monkeypatch.setattr(Inline, "run", ending)
    planted.KINDS[:] = ["late_raises", "good"]
    tuner = tuner_of(tmp_path)
    (record,) = tuner.run()
    assert ran == ["prove", "time", "time"] and not tuner.failures
    assert statuses(record) == {"late_raises": "crash", "good": "ok"}
    assert {o.variant for o in record.outcomes if o.timing is not None} == {planted.NAME, "chunk_torch"} and record.choice is not None


@pytest.mark.parametrize("error", [Lost("crash", "no context"), JobError("oom", "no context")], ids=["lost", "failed"])
@pytest.mark.parametrize("times", [1, 2])
def test_nobody_is_blamed_for_what_precedes_the_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    """A worker that fails before its first candidate gets a second chance; after that the key is given up, without verdicts."""
    run = Inline.run
    left = [error] * times

    def failing(self: Inline, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        if left:
            raise left.pop()
        yield from run(self, function, arguments, limit)

    monkeypatch.setattr(Inline, "run", failing)
    tuner = tuner_of(tmp_path)
    records = tuner.run()
    if times == 1:
        assert statuses(records[0]) == {"good": "ok"} and not tuner.failures
    else:
        assert not records and "no context" in tuner.failures[0][1]


def test_worker_that_does_not_end() -> None:
    """A process that the driver holds is left behind."""

    class Held:
        returncode = None

        def kill(self) -> None: ...
        def wait(self, timeout: float) -> int:
            raise subprocess.TimeoutExpired("held", timeout)

    worker = Worker()
    worker._process = Held()  # type: ignore[assignment]
    lost = worker._lost("timeout", "nothing for 1 s")
    assert (lost.status, lost.detail) == ("timeout", "nothing for 1 s") and worker._process is None


def test_an_error_of_a_lost_device_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error looks like, if nothing runs on the device after it; the verdict comes before the process ends."""
    events: list[Any] = []

    def attempt(error: Exception) -> jobs._Attempt:
        made = jobs._Attempt(torch.device("cuda"))
        with made:
            raise error
        return made

    class CompilationError(Exception): ...

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(jobs, "synchronize", lost)
    for error in (RuntimeError("CUDA error"), CompilationError("while a binary was loaded"), torch.OutOfMemoryError("none")):
        with pytest.raises(Broken, match="illegal memory access"):
            attempt(error).failed(events.append, 7)
    assert [(kind, number, verdict.status) for kind, number, verdict in events] == [("end", 7, "crash")] * 3
    assert "a binary was loaded" in events[1][2].detail
    monkeypatch.setattr(jobs._Attempt, "_lost", lambda self: None)
    monkeypatch.setattr(jobs, "_release", lambda device, always: None)
    assert attempt(CompilationError("planted")).failed(events.append, 8) and events[-1][2].status == "compile_error"
    assert not jobs._Attempt(torch.device("cuda")).failed(events.append, 9) and len(events) == 4


def test_crew_that_does_not_start() -> None:
    """No verdict on a kernel that nothing tried to compile."""
    problem = key_of("retention", {"B": 1, "T": 256, "H": 3, "D": 16}, hypothetical("sm90"))
    crew = Crew(1, ["no_such_plugin"], limit=10)
    job = CompileJob(Site("scalar_decay", "recurrent_triton", None, False, problem), 0)
    try:
        crew.submit(job, "sm90")
        assert crew.result(job) is None
    finally:
        crew.close()
