"""The tuner against planted candidates: it completes, the parent lives, every verdict is stored, and nothing is tried twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import planted.compiler
import pytest
import torch
from typer.testing import CliRunner

from fla_dispatch import registry
from fla_dispatch import settings as fla_settings
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.errors import CallError, UnknownNameError
from fla_dispatch.problem import Problem
from fla_dispatch.tuning import environment, search, timing
from fla_dispatch.tuning.candidates import field
from fla_dispatch.tuning.crew import Crew
from fla_dispatch.tuning.keys import expand, key_of, parse_key, read_keys
from fla_dispatch.tuning.precompile import CompileJob, Site, launches
from fla_dispatch.tuning.proof import Verdict
from fla_dispatch.tuning.records import Record, fingerprint, record_key
from fla_dispatch.tuning.search import Tuner, tune
from fla_dispatch.tuning.store import Store
from fla_dispatch.tuning.verify import verify
from fla_dispatch.tuning.worker import Inline, Lost, Worker

planted.withdraw()  # importing registers, as a worker needs; other tests of this process must not meet these
planted.compiler.withdraw()

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(planted, "KINDS", ["good"])
    planted.plant()
    yield
    planted.withdraw()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def key(T: int = 512, *, grad: bool = True, K: int = planted.K) -> Problem:
    return key_of("linear_attn", {"B": 1, "T": T, "H": 2, "K": K, "V": 16}, profile(CPU), dtype="float32", grad=grad)


def found(store: Store, problem: Problem, direction: str) -> Record:
    hit = store.lookup(environment.current(CPU), "scalar_decay", record_key(problem), direction)
    assert hit is not None
    return hit.record


def statuses(record: Record) -> dict[str, str]:
    """Status of each planted kind."""
    return {str(o.config["kind"]): o.status for o in record.outcomes if o.config and "kind" in o.config}


def test_planted_candidates(store: Store, tmp_path: Path) -> None:
    """Each misbehaviour costs its candidate and no more."""
    expected = {
        "wrong": "wrong", "racy": "racy", "outside": "wrong", "abort": "crash", "segfault": "crash", "leaves": "crash",
        "hang": "timeout", "no_memory": "oom", "compile_error": "compile_error", "raises": "crash", "late_abort": "crash",
        "good": "ok",
    }  # fmt: skip
    planted.KINDS[:] = [*expected, "wrong_backward", "abort_backward"]
    events: list[search.Event] = []
    records = tune(
        "linear_attn", [key(), key(grad=False)], 300, CPU, store, events.append, key_seconds=0.1, plugins=["planted"], limit_seconds=2,
        most=20, out=tmp_path / "out",
    )  # fmt: skip
    assert len(records) == 3, "forward with and without gradients, and backward"
    forward, backward = found(store, key(), "forward"), found(store, key(), "backward")
    assert statuses(forward) == {**expected, "wrong_backward": "ok", "abort_backward": "ok"}
    got = statuses(backward)
    assert (got.pop("wrong_backward"), got.pop("abort_backward")) == ("wrong", "crash")
    assert set(got.values()) == {"ok"}, "what is wrong in forward alone is right in backward"
    for record in (forward, backward):
        for o in record.outcomes:
            assert (o.timing is not None) == (o.status == "ok"), "proof before speed"
            if o.status in ("ok", "wrong", "racy"):
                assert o.certificate is not None and o.certificate.errors
            assert o.detail or o.status == "ok"
        assert record.choice is not None and record.outcome() is not None
        assert record.versions["torch"] and record.default in record.order
    details = {str(o.config["kind"]): o.detail for o in forward.outcomes if o.config and "kind" in o.config}
    assert "SIGABRT" in details["abort"] and "SIGSEGV" in details["segfault"] and "exit code 0" in details["leaves"]
    assert {e.stage for e in events} >= {"prove", "time"} and events[-1].done == events[-1].total == 2
    # the records went to the pack too, which is a store of its own
    (pack,) = (tmp_path / "out").rglob("*.jsonl")
    assert len(pack.read_text().splitlines()) == 3
    assert found(Store(tmp_path / "out"), key(), "backward").choice == backward.choice


def test_nothing_is_tried_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run measures nothing; a config that is added later is measured beside the default and the choice alone."""
    ran: list[tuple[str, list[str]]] = []
    run = Inline.run

    def watched(self: Inline, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        ran.append((function, [fingerprint(e.variant, e.config) for e in arguments["entries"]]))
        return run(self, function, arguments, limit)

    monkeypatch.setattr(Inline, "run", watched)
    planted.KINDS[:] = ["good", "wrong", "slow"]
    problem = key(grad=False)
    first = tune("linear_attn", [problem], 60, CPU, store, key_seconds=0.02, isolate=False)
    assert [f for f, _ in ran] == ["prove", "time"]
    ran.clear()
    assert tune("linear_attn", [problem], 60, CPU, store, isolate=False) == first and not ran
    planted.KINDS.append("raises_backward")  # forward is good: a new candidate
    (second,) = tune("linear_attn", [problem], 60, CPU, store, key_seconds=0.02, isolate=False)
    new = fingerprint(planted.NAME, planted.Planted("raises_backward"))
    assert ran[0] == ("prove", [new])
    assert first[0].choice is not None
    assert set(ran[1][1]) == {new, first[0].default, first[0].choice.fingerprint}
    assert statuses(second) == {"good": "ok", "wrong": "wrong", "slow": "ok", "raises_backward": "ok"}
    assert second.incumbent == first[0].choice.fingerprint
    timed = {o.fingerprint for o in second.outcomes if o.timing is not None}
    assert timed == set(ran[1][1]), "timings of one run alone are compared"
    ran.clear()
    tune("linear_attn", [problem], 60, CPU, store, key_seconds=0.02, isolate=False, again=True)
    assert len(ran[0][1]) == 5, "all four, and chunk_torch"


def test_a_choice_stays_worthy_whatever_it_is_estimated() -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    problem = key_of("retention", {"B": 2, "T": 512, "H": 4, "D": 64}, hypothetical("sm90"), dtype="bfloat16")
    before = field(recurrence, problem, backward=False, most=1)
    assert before is not None
    last = next(name for name in before.order if name != before.default)
    after = field(recurrence, problem, backward=False, most=1, chosen=last)
    assert after is not None and [c.fingerprint for c in after.worthy] == [before.default, last]


def test_proofs_are_shared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that differ in lengths and heads are proven once and timed each."""
    ran: list[str] = []
    run = Inline.run

    def watched(self: Inline, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        ran.append(function)
        return run(self, function, arguments, limit)

    monkeypatch.setattr(Inline, "run", watched)
    records = tune("linear_attn", [key(64), key(128), key(256)], 60, CPU, store, key_seconds=0.02, isolate=False)
    assert ran == ["prove", "time", "time", "time"] and len(records) == 6
    certificates = {o.certificate.canonical for r in records if r.direction == "forward" for o in r.outcomes if o.certificate}
    assert len(certificates) == 2, "one for each candidate"


def test_budget(store: Store) -> None:
    assert tune("linear_attn", [key()], 0.0, CPU, store, isolate=False) == []
    tuner = Tuner(registry.get_recurrence("scalar_decay"), [key(0)], device=CPU, store=store, isolate=False)
    assert tuner.run() == [] and len(tuner.failures) == 1 and tuner.left_out == 1


def test_inputs_that_do_not_fit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key whose inputs do not fit is passed over; the others are measured."""
    workload = registry.get_recurrence("scalar_decay").workload
    assert workload is not None
    make = workload.make

    def small(p: Problem, device: torch.device, seed: int) -> Any:
        if p.T > 128:
            raise torch.OutOfMemoryError("planted: the inputs are too large")
        return make(p, device, seed)

    monkeypatch.setattr(Inline, "run", _reporting(Inline.run))
    recurrence = dataclasses.replace(registry.get_recurrence("scalar_decay"), workload=dataclasses.replace(workload, make=small))
    monkeypatch.setitem(registry._recurrences, "scalar_decay", recurrence)
    tuner = Tuner(recurrence, [key(512), key(64)], device=CPU, store=store, isolate=False, key_seconds=0.02)
    assert {r.key for r in tuner.run()} == {record_key(key(64))}
    assert len(tuner.failures) == 1 and "too large" in tuner.failures[0][1]


def _reporting(run: Any) -> Any:
    """Inline.run with the errors that a process would report."""
    from fla_dispatch.tuning.jobs import classify
    from fla_dispatch.tuning.worker import JobError

    def wrapped(self: Inline, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        try:
            yield from run(self, function, arguments, limit)
        except torch.OutOfMemoryError as error:
            raise JobError(*classify(error)) from None

    return wrapped


# -- timing ------------------------------------------------------------------------------------------------------------------


def race(speeds: dict[int, float], plan: timing.Plan, always: frozenset[int] = frozenset(), failing: int = -1) -> dict[int, list[float]]:
    """A race of calls with known times."""
    taken: list[int] = []

    def take(i: int, call: timing.Call) -> float | None:
        taken.append(i)
        return None if i == failing and taken.count(i) == 2 else speeds[i] * (1 + 0.001 * (len(taken) % 7))

    return timing.race({i: (lambda: None) for i in speeds}, take, plan, always)


def test_race() -> None:
    speeds = {0: 2.0, 1: 1.0, 2: 1.02, 3: 1.04, 4: 1.06, 5: 5.0, 6: 50.0}
    plan = timing.Plan(seconds=1000.0, finalists=3, most=10)
    samples = race(speeds, plan, always=frozenset({0, 6}))
    assert all(len(samples[i]) >= 10 for i in (0, 1, 2, 3)), "finalists, and the default though it is slow"
    assert len(samples[5]) <= 2 and len(samples[6]) <= 3, "hopeless, even as the default"
    assert len(race(speeds, timing.Plan(seconds=0.0))[5]) == 1, "nor is time spent on a second look"
    assert 2 <= len(samples[4]) < 10
    few = race(speeds, timing.Plan(seconds=0.0, least=3))
    assert 3 <= len(few[1]) <= 6
    assert 1 not in race(speeds, plan, failing=1) and 2 in race(speeds, plan, failing=1)
    assert race({}, plan) == {}
    made = timing.summarise([3.0, 1.0, 2.0])
    assert (made.median_us, made.min_us, made.mad_us, made.rounds) == (2e6, 1e6, 1e6, 3)


def test_one_stall_of_the_host_costs_no_contender_the_race() -> None:
    """A candidate whose first sample is ten times too slow wins, because it is the fastest otherwise."""
    stalled: list[int] = []

    def take(i: int, call: timing.Call) -> float | None:
        first = i == 1 and not stalled
        if first:
            stalled.append(i)
        return {0: 1e-4, 1: 8e-5, 2: 9e-5, 3: 1.1e-4}[i] * (10 if first else 1)

    samples = timing.race(dict.fromkeys(range(4), lambda: None), take, timing.Plan(seconds=0.04))
    assert len(samples[1]) >= 5 and min(samples, key=lambda i: timing.summarise(samples[i]).median_us) == 1


def test_hopeless_estimates_are_not_sampled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is estimated at many times the fastest measured one is neither timed nor recorded."""
    monkeypatch.setattr(planted, "VARIANT", dataclasses.replace(planted.VARIANT, cost=lambda p, c, d: 1.0 if c.kind == "slow" else 1e-9))
    planted.withdraw()
    planted.plant()
    planted.KINDS[:] = ["good", "slow"]
    monkeypatch.setattr("fla_dispatch.tuning.candidates.FAR", float("inf"))
    (record,) = tune("linear_attn", [key(grad=False)], 60, CPU, store, key_seconds=0.02, isolate=False)
    assert statuses(record) == {"good": "ok"}


# -- workers and compiling ---------------------------------------------------------------------------------------------------


def test_worker_that_does_not_start() -> None:
    worker = Worker(["no_such_plugin"])
    with pytest.raises(Lost, match="no_such_plugin"):
        list(worker.run("prove", {}, 1))
    worker.close()


def test_compile_crew() -> None:
    """Real and planted kernels for a GPU that is not here: what hangs, aborts or fails costs its own job."""
    recurrence = registry.get_recurrence("scalar_decay")
    real = key_of("retention", {"B": 1, "T": 256, "H": 3, "D": 16}, hypothetical("sm90"))
    variant = recurrence.variant("recurrent_triton")
    site = Site("scalar_decay", variant.name, variant.configs(real)[0], False, real)
    assert len(launches(site)) == 1 and launches(site._replace(variant="chunk_torch", config=None)) == []
    planted.compiler.plant()
    crew = Crew(2, ["planted", "planted.compiler"], limit=10)
    try:
        jobs = {"real": CompileJob(site, 0)}
        for kind in ("good", "huge", "hang", "abort", "compile_error"):
            jobs[kind] = CompileJob(Site("scalar_decay", planted.compiler.NAME, planted.Planted(kind), False, real), 0)
        for job in (*jobs.values(), *jobs.values()):
            crew.submit(job, "sm90")
        results = {name: crew.result(job) for name, job in jobs.items()}
    finally:
        crew.close()
        planted.compiler.withdraw()
    assert isinstance(results["real"], int) and results["good"] == 1024 and results["huge"] == 1 << 20
    bad = {name: r.status for name, r in results.items() if isinstance(r, Verdict)}
    assert bad == {"hang": "timeout", "abort": "crash", "compile_error": "compile_error"}


def test_what_does_not_fit_the_device_is_not_proven(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory is known from compiling; equal kernels of trials and keys are one job."""
    real = key_of("retention", {"B": 1, "T": 32, "H": 3, "D": 16}, hypothetical("sm90"))
    monkeypatch.setattr(search, "profile", lambda device: hypothetical("sm90"))
    submitted: list[CompileJob] = []

    class Instant:
        def __init__(self, *args: object) -> None: ...
        def close(self) -> None: ...
        def submit(self, job: CompileJob, arch: str) -> None:
            submitted.append(job)

        def result(self, job: CompileJob, patience: float) -> int | Verdict:
            if job.site.variant == "sweep_triton":
                return 1 << 20
            return Verdict("timeout", "planted") if job.site.variant == "chunk_triton" else 1024

    monkeypatch.setattr(search, "Crew", Instant)
    tuner = Tuner(registry.get_recurrence("scalar_decay"), [real, dataclasses.replace(real, T=64)], device=CPU, store=store, most=64)
    (group,) = tuner._groups(tuner._benches())
    tuner._submit(group)
    failed = tuner._compiled(group)
    assert len(group.benches) == 2 and submitted
    assert {v.status for (name, _), v in failed.items() if name.startswith("sweep_triton")} == {"compile_error"}
    assert {v.status for (name, _), v in failed.items() if name.startswith("chunk_triton")} == {"timeout"}
    assert not any(name.startswith("recurrent_triton") for name, _ in failed)
    recurrent = {j for j in submitted if j.site.variant == "recurrent_triton"}
    assert len(recurrent) == 1, "heads are numbers of a run, not of a compilation"


# -- keys --------------------------------------------------------------------------------------------------------------------


def test_keys_of_a_file(tmp_path: Path) -> None:
    device = hypothetical("sm90")
    path = tmp_path / "keys.toml"
    path.write_text(
        '[[keys]]\nop = ["retention", "mamba2"]\nB = [1, 4]\nT = [64, 4096]\nH = 4\nD = [64, 128]\npacked = [false, true]\ngrad = true\n'
        'tokens = 8192\n[[keys]]\nop = "retention"\nB = 1\nT = 64\nH = 4\nD = 64\ngrad = true\n'
    )
    pairs = read_keys(path, device)
    assert {name for name, _ in pairs} == {"scalar_decay"} and len(set(pairs)) == len(pairs)
    keys = [k for _, k in pairs]
    assert len(keys) == 2 * 3 * 2 * 2, "4 x 4096 tokens are left out, and the second table is in the first"
    assert all(k == k.key() and k.device is device and k.grad for k in keys)
    assert {(k.K, k.V) for k in keys} == {(64, 64), (128, 128)} and {k.packed for k in keys} == {False, True}
    for k in keys:
        assert parse_key(k.text(), device) == k
        with pytest.raises(ValueError, match="not the text"):
            parse_key(k.text(), hypothetical("sm80"))
    for bad in ("keys = 1", "[[keys]]\nT = 1", "not toml"):
        path.write_text(bad)
        with pytest.raises(CallError, match="To fix"):
            read_keys(path, device)
    with pytest.raises(UnknownNameError, match="no size named 'Q'"):
        expand({"op": "retention", "Q": 1}, device)
    with pytest.raises(UnknownNameError, match="no dtype"):
        expand({"op": "retention", "dtype": "bf61"}, device)


# -- command line ------------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path) -> None:
    """tune, then verify what it stored; then a record whose code is another's."""
    from fla_dispatch.cli import app

    with fla_settings.override(cache_dir=str(tmp_path / "cache")):
        call = "--op linear_attn --size T=64,128 --size H=2 --size K=24 --size V=16 --size B=1 --dtype float32 --device cpu --key-ms 20"
        ran = CliRunner().invoke(app, ["tune", *call.split(), "--plugin", "planted", "--json"])
        assert ran.exit_code == 0, ran.output
        (report,) = json.loads(ran.stdout)
        assert (report["done"], report["known"], report["records"], report["failures"]) == (2, 0, 2, [])
        again = CliRunner().invoke(app, ["tune", *call.split(), "--plugin", "planted"])
        assert again.exit_code == 0 and "0 keys measured, 2 known" in again.stdout
        proven = CliRunner().invoke(app, ["verify", "--device", "cpu", "--plugin", "planted", "--json"])
        assert proven.exit_code == 0 and {row["status"] for row in json.loads(proven.stdout)} == {"ok"}
    wrong = CliRunner().invoke(app, ["tune", "--device", "cpu"])
    assert wrong.exit_code != 0 and isinstance(wrong.exception, CallError)


def test_verify_finds_what_changed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = tune("linear_attn", [key(64, grad=False)], 60, CPU, store, key_seconds=0.02, isolate=False)
    assert record.choice is not None
    env = environment.current(CPU)
    store.put(env, record.model_copy(update={"kernels": {record.choice.variant: "0" * 24}}))
    assert [v.status for v in verify(device=CPU, store=store)] == ["stale"]
    store.put(env, record.model_copy(update={"choice": record.choice.model_copy(update={"config": {"C": 12345}})}))
    assert [v.status for v in verify(device=CPU, store=store)] == ["gone"]


def test_dispatch_runs_what_was_measured(tmp_path: Path) -> None:
    """The whole way: a key made from sizes is tuned, and a call of those sizes finds the record."""
    import fla_dispatch as fd

    with fla_settings.override(cache_dir=str(tmp_path / "cache")):
        planted.KINDS[:] = ["wrong", "good"]
        records = tune("linear_attn", [key()], 60, CPU, key_seconds=0.02, isolate=False)
        made = fd.explain("linear_attn", device="cpu", dtype="float32", grad=True, B=1, T=300, H=2, K=planted.K, V=16)
        assert made.tier == "user", made.to_text()
        chosen = {r.direction: r.choice.fingerprint for r in records if r.choice is not None}
        assert made.forward is not None and made.backward is not None
        assert fingerprint(*made.forward) == chosen["forward"] and fingerprint(*made.backward) == chosen["backward"]
