"""The planted kernels of tests/gpu whose faults need no GPU: right but for the fault, which the proof finds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import planted
from planted import gpu_kernels

from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import prove

planted.withdraw()
gpu_kernels.withdraw()

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _planted() -> Iterator[None]:
    gpu_kernels.plant()
    yield
    gpu_kernels.withdraw()


@pytest.mark.parametrize(
    "kind, status, words", [("good", "ok", ""), ("wrong", "wrong", "o 1."), ("beyond", "wrong", "guard"), ("unwritten", "wrong", "o inf")]
)
def test_faults_are_named(kind: str, status: str, words: str) -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    key = key_of("retention", {"B": 1, "T": gpu_kernels.LATE, "H": 2, "D": gpu_kernels.W}, profile(CPU))
    found = prove(recurrence, recurrence.variant(gpu_kernels.NAME), gpu_kernels.Planted(kind), key, CPU)
    assert (found.status, words in found.detail) == (status, True), found
