"""The faults that tests/gpu plants are in the compiled code: no compiler has repaired, folded or refused one by itself."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import planted
import triton
from planted import gpu_kernels

from fla_dispatch import registry, settings
from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared import ahead
from fla_dispatch.tuning.candidates import field, plain
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.precompile import Compilation, Site, launches

if settings.current.interpret:
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted functions", allow_module_level=True)

planted.withdraw()
gpu_kernels.withdraw()

KINDS = ("good", "wrong", "beyond", "unwritten", "racy", "far", "endless", "compile_error", "shared_memory", "late_far", "raises")


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_kernels, "KINDS", list(KINDS))
    gpu_kernels.plant()
    yield
    gpu_kernels.withdraw()


def key(T: int = gpu_kernels.LATE) -> Any:
    return plain(key_of("retention", {"B": 1, "T": T, "H": 2, "D": gpu_kernels.W}, hypothetical("sm90")))


def site(kind: str, call: Any) -> Site:
    return Site("scalar_decay", gpu_kernels.NAME, gpu_kernels.Planted(kind), False, call)


def compiled(kind: str) -> Any:
    (launch,) = launches(site(kind, key()))
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(ahead.source(launch), target=ahead.target("sm90"), options=options)


def test_they_are_worth_measuring() -> None:
    """The tuner would take every kind in this order, and one trial repeats."""
    recurrence = registry.get_recurrence("scalar_decay")
    found = field(recurrence, key(), backward=False, most=40)
    assert found is not None and not found.default.startswith(gpu_kernels.NAME)
    assert [c.config.kind for c in found.worthy if c.variant.name == gpu_kernels.NAME] == list(KINDS)
    workload = recurrence.workload
    assert workload is not None
    trials = workload.trials(workload.proof_key(key()), gpu_kernels.Planted("racy"))
    assert any(t.repeats > 1 for t in trials) and all(t.problem.T != gpu_kernels.LATE for t in trials)


def test_faults_are_compiled() -> None:
    code = {kind: compiled(kind).asm["ptx"] for kind in ("good", "wrong", "beyond", "unwritten", "racy", "far", "endless", "late_far")}
    stores = {kind: len(re.findall(r"\bst\.global", text)) for kind, text in code.items()}
    assert stores["beyond"] == stores["far"] == 2 * stores["good"]
    assert len(set(code.values())) == len(code) - 1 and code["late_far"] == code["far"]
    loop = re.search(r"^(\$L__BB\w+):(?:(?!^\$L__BB).)*?ld\.volatile(?:(?!^\$L__BB).)*?bra(?:\.uni)?\s+\1;", code["endless"], re.M | re.S)
    assert loop is not None, code["endless"]


def test_what_the_compiler_refuses() -> None:
    with pytest.raises(triton.compiler.errors.CompilationError, match="no such width"):
        compiled("compile_error")
    shared = compiled("shared_memory").metadata.shared
    assert shared > max(hypothetical(arch).shared_bytes for arch in ("sm80", "sm90", "sm100")), shared


def test_host_code_that_raises_is_left_to_its_proof() -> None:
    """Launches are recorded in the tuner's own process, which outlives a candidate whose host code raises."""
    with pytest.raises(KeyError, match="planted"):
        launches(site("raises", key()))
    compilation = Compilation(registry.get_recurrence("scalar_decay"))
    assert compilation.jobs(site("raises", key())) == ()
    assert len(compilation.jobs(site("good", key()))) == 1
