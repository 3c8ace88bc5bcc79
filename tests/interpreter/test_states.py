"""Every config of the variants that keep states of chunks, by the tuner's own proof: chunk lengths, heads per program, descriptors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fla_dispatch import registry
from fla_dispatch.device import profile
from fla_dispatch.kernels.scalar_decay.configs import ParallelConfig, StatesConfig
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import prove

CPU = torch.device("cpu")

#: Whole sequences, and segments of which the first trial (197 tokens) has several.
STATES = [StatesConfig(0, 64, 2, 2, True), StatesConfig(128, 128, 3, 2, True), StatesConfig(128, 64, 2, 1, False)]


def check(variant: str, configs: list[Any], op: str, sizes: dict[str, int], **chosen: Any) -> None:
    """The first of the trials, in both directions: blocks run one after the other here."""
    whole = registry.get_recurrence("scalar_decay")
    work = whole.workload
    assert work is not None
    recurrence = dataclasses.replace(whole, workload=dataclasses.replace(work, trials=lambda p, config: work.trials(p, config)[:1]))
    key = key_of(op, sizes, profile(CPU), dtype="float16", grad=True, **chosen)
    for config in configs:
        for backward in (False, True):
            found = prove(recurrence, recurrence.variant(variant), config, key, CPU, backward=backward)
            assert found.status == "ok", (config, backward, found.detail)


def test_states() -> None:
    check("states_triton", STATES, "mamba2", {"B": 2, "T": 200, "H": 3, "G": 1, "P": 16, "N": 32})


def test_states_with_states() -> None:
    check("states_triton", STATES[:2], "simple_gla", {"B": 2, "T": 200, "H": 1, "K": 16, "V": 64}, initial_state=True, final_state=True)


def test_states_of_packs() -> None:
    check("states_triton", STATES[1:], "mamba2", {"B": 2, "T": 200, "H": 2, "G": 1, "P": 16, "N": 16}, packed=True, initial_state=True)


def test_states_of_head_dims_without_descriptors() -> None:
    check("states_triton", [StatesConfig(128, 128, 2, 2)], "retention", {"B": 2, "T": 200, "H": 1, "HV": 3, "K": 20, "V": 36})


@pytest.mark.parametrize("tokens", [64, 128])
def test_parallel(tokens: int) -> None:
    sizes = {"B": 2, "T": 50, "H": 3, "G": 1, "P": 16, "N": 32}
    check("parallel_triton", [ParallelConfig(tokens, 2, 1)], "mamba2", sizes, initial_state=tokens == 64, final_state=tokens == 64)
