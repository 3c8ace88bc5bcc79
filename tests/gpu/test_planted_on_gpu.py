"""The tuner against planted kernels on a real GPU: each fault costs its candidate and no more, and all that follows is measured.

What a CPU cannot show: errors that leave a CUDA context useless, kernels that never end, shared memory at launch, races of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import matrix
import planted
from planted import gpu_kernels

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.kernels.scalar_decay.cases import tolerance
from fla_dispatch.problem import Problem
from fla_dispatch.tuning import environment, search
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.records import Outcome, Record, record_key
from fla_dispatch.tuning.search import Tuner
from fla_dispatch.tuning.store import Store

planted.withdraw()  # importing registers, as a worker needs; other tests of this process must not meet these
gpu_kernels.withdraw()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

#: kind -> (status, a word of the detail), in the order of proving: a good one after each that costs the process.
EXPECTED = {
    "good": ("ok", ""),
    "wrong": ("wrong", "trial odd: o "),
    "beyond": ("wrong", "guard"),
    "unwritten": ("wrong", "o inf"),
    "racy": ("racy", "other bits of o"),
    "raises": ("crash", "KeyError"),
    "compile_error": ("compile_error", "no such width"),
    "shared_memory": ("compile_error", "shared memory"),
    "far": ("crash", "illegal memory access"),
    "good_after_far": ("ok", ""),
    "abort": ("crash", "SIGABRT"),
    "good_after_abort": ("ok", ""),
    "endless": ("timeout", "nothing for"),
    "good_after_endless": ("ok", ""),
    "late_far": ("crash", "illegal memory access"),
}

#: Kinds that each end the process they run in.
DEADLY = ("far", "abort", "endless", "late_far")


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_kernels, "KINDS", list(EXPECTED))
    gpu_kernels.plant()
    yield
    gpu_kernels.withdraw()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def key() -> Problem:
    return key_of("retention", {"B": 1, "T": gpu_kernels.LATE, "H": 2, "D": gpu_kernels.W}, profile(device()))


def tuned(root: Path, limit: float, processes: int | None = None) -> tuple[Tuner, str]:
    """A tuner after its run, and its story for messages."""
    events: list[search.Event] = []
    tuner = Tuner(
        registry.get_recurrence("scalar_decay"), [key()], device=device(), store=Store(root), budget_seconds=500, key_seconds=0.05, most=40,
        plugins=["planted.gpu_kernels"], limit_seconds=limit, processes=processes, progress=events.append,
    )  # fmt: skip
    tuner.run()
    story = [f"{e.stage}: {e.text}" for e in events] + [f"failure: {at}: {why}" for at, why in tuner.failures]
    story.append(f"{tuner.worker.starts} starts, {tuner.late} kernels compiled late, seconds {tuner.seconds}")
    return tuner, "\n".join(story)


def reread(root: Path, story: str) -> Record:
    """The record as another process would find it."""
    hit = Store(root).lookup(environment.current(device()), "scalar_decay", record_key(key()), "forward")
    assert hit is not None, f"no record was stored\n{story}"
    return hit.record


def row(name: str, o: Outcome | None) -> str:
    errors = o.certificate.errors if o is not None and o.certificate is not None else None
    return f"{name}: " + ("no outcome" if o is None else f"{o.status}: {o.detail!r}, errors {errors}, timing {o.timing}")


def by_kind(record: Record) -> dict[str, Outcome]:
    return {str(o.config["kind"]): o for o in record.outcomes if o.config and "kind" in o.config}


def compare(record: Record, expected: dict[str, tuple[str, str]], story: str) -> None:
    """Every kind has the status and the word in its detail that are expected of it; all differences at once."""
    found = by_kind(record)
    wrong = [
        f"expected {status} {word!r}, got {row(kind, o)}"
        for kind, (status, word) in expected.items()
        if (o := found.get(kind)) is None or o.status != status or word not in o.detail
    ]
    whole = "\n".join(row(o.fingerprint, o) for o in record.outcomes)
    assert not wrong, "\n".join([*wrong, "", "all outcomes:", whole, "", "the run:", story])
    for o in record.outcomes:
        assert o.detail or o.status == "ok", row(o.fingerprint, o)
        assert (o.timing is not None) == (o.status == "ok"), f"proof before speed: {row(o.fingerprint, o)}"
        if o.status in ("ok", "wrong", "racy"):
            assert o.certificate is not None and o.certificate.errors, row(o.fingerprint, o)


def check_winner(record: Record, story: str) -> None:
    """A real variant won, and sweep_triton was measured."""
    assert record.choice is not None, f"nothing was chosen\n{story}"
    assert record.choice.variant != gpu_kernels.NAME, record.choice
    sweeps = [o for o in record.outcomes if o.variant == "sweep_triton"]
    assert any(o.status == "ok" for o in sweeps), "\n".join([*(row(o.fingerprint, o) for o in sweeps), story])


def test_planted_kernels(tmp_path: Path) -> None:
    ours = torch.arange(1 << 20, device=device(), dtype=torch.float32)
    total = ours.double().sum().item()
    tuner, story = tuned(tmp_path / "store", limit=30)
    # this process and its context are as they were
    assert ours.double().sum().item() == total
    q = torch.randn(1, 64, 2, gpu_kernels.W, device=device(), dtype=torch.bfloat16)
    o, _ = fd.op("retention", mode="sweep_triton")(q, q, q)
    want, _ = fd.op("retention", mode="chunk_torch")(q, q, q)
    assert matrix.distance(o, want) <= 2 * tolerance(torch.bfloat16)

    record = reread(tmp_path / "store", story)
    compare(record, EXPECTED, story)
    check_winner(record, story)
    assert not tuner.failures, story
    assert tuner.worker.starts == 1 + len(DEADLY), f"expected one process, and one more after each of {DEADLY}\n{story}"


def test_what_nobody_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compile processes the worker meets the compiler's refusals, and shared memory at launch: the same verdicts."""
    kinds = ("compile_error", "shared_memory", "good")
    monkeypatch.setattr(gpu_kernels, "KINDS", list(kinds))
    tuner, story = tuned(tmp_path / "store", limit=120, processes=0)
    record = reread(tmp_path / "store", story)
    compare(record, {kind: EXPECTED[kind] for kind in kinds}, story)
    assert "OutOfResources" in by_kind(record)["shared_memory"].detail, row("shared_memory", by_kind(record)["shared_memory"])
    check_winner(record, story)
    assert tuner.worker.starts == 1 and not tuner.failures, story
