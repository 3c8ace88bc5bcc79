"""Proofs: right candidates pass for every class of calls, each planted fault is found and named, and calls have their Keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla_dispatch import registry
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.problem import Problem
from fla_dispatch.tuning.guard import BAND, Guards, guarded
from fla_dispatch.tuning.jobs import classify
from fla_dispatch.tuning.keys import key_of
from fla_dispatch.tuning.proof import Prover, prove

planted.withdraw()  # importing it registers it, as a worker needs; other tests of this process must not meet it

CPU = torch.device("cpu")
KINDS = {
    "none": (("none", "false"), ()),
    "normalize": (("none", "true"), ()),
    "head": (("head", "false"), ()),
    "token": (("token", "false"), ("g",)),
    "mamba": (("token", "false"), ("g", "beta")),
    "mamba_skip": (("token", "false"), ("g", "beta", "skip")),
}


@pytest.fixture(autouse=True, scope="module")
def _planted() -> Iterator[None]:
    planted.plant()
    yield
    planted.withdraw()


def problem(kind: str = "token", **changes: Any) -> Problem:
    (decay, normalize), roles = KINDS[kind]
    made = Problem(
        "scalar_decay", profile(CPU), (("qkv", "float32"), *((role, "float32") for role in roles)), 16, 16, 1, 8, 256, 4, 256,
        False, True, True, True, (("decay", decay), ("normalize", normalize)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def verdict(kind: str, *, backward: bool = False) -> Any:
    recurrence = registry.get_recurrence("scalar_decay")
    key = problem("none", K=planted.K, group=2)
    return prove(recurrence, recurrence.variant(planted.NAME), planted.Planted(kind), key, CPU, backward=backward)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_candidates_pass(kind: str, packed: bool, dtype: str) -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    prover = Prover(recurrence, CPU)
    variant = recurrence.variant("chunk_torch")
    for states in (False, True):
        key = problem(kind, packed=packed, initial_state=states, final_state=states, mean_length=64 if packed else 256)
        key = dataclasses.replace(key, dtypes=(("qkv", dtype), *key.dtypes[1:])).key()
        for backward in (False, True):
            found = prover.prove(variant, variant.configs(key)[0], prover.workload.proof_key(key), backward=backward)
            assert found.status == "ok", found.detail
            assert found.certificate is not None and found.certificate.repeats >= 3
            assert ({"dq", "dk", "dv"} if backward else {"o"}) <= set(found.certificate.errors)
            assert all(error <= found.certificate.tolerances[name] for name, error in found.certificate.errors.items())


@pytest.mark.parametrize(
    "kind, status, words",
    [
        ("good", "ok", ""),
        ("wrong", "wrong", "o "),
        ("slightly_wrong", "wrong", "o 1.0"),
        ("racy", "racy", "other bits of o"),
        ("racy_and_wrong", "racy", "other bits of o"),
        ("unwritten", "wrong", "o inf"),
        ("outside", "wrong", "guard"),
        ("before", "wrong", "guard"),
        ("changes_input", "wrong", "inputs q were changed"),
        ("wrong_dtype", "wrong", "o inf"),
        ("wrong_shape", "wrong", "o inf"),
    ],
)
def test_faults_are_named(kind: str, status: str, words: str) -> None:
    found = verdict(kind)
    assert (found.status, words in found.detail) == (status, True), found
    assert found.certificate is not None
    if words.startswith("o "):
        assert found.certificate.errors["o"] > found.certificate.tolerances["o"]


@pytest.mark.parametrize("kind, status", [("wrong", "wrong"), ("racy", "racy"), ("outside", "wrong"), ("unwritten", "wrong")])
def test_directions_are_proven_apart(kind: str, status: str) -> None:
    """A fault in backward leaves forward right, and the other way round."""
    assert verdict(f"{kind}_backward").status == "ok"
    assert verdict(f"{kind}_backward", backward=True).status == status
    assert verdict(kind, backward=True).status == "ok"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("what", ["truth", "inputs"])
def test_a_damaged_oracle_convicts_nobody(backward: bool, what: str) -> None:
    """What a stray write did to a kept trial is found before the next candidate is called wrong; and who is wrong stays so."""
    recurrence = registry.get_recurrence("scalar_decay")
    prover = Prover(recurrence, CPU)
    variant, config = recurrence.variant(planted.NAME), planted.Planted("good")
    key = prover.workload.proof_key(problem("none", K=planted.K).key())
    want = prover.prove(variant, config, key, backward=backward)
    for trial in prover.workload.trials(key, config):
        case = prover.case(trial, backward)
        damaged = case.tensors.v if what == "inputs" else case.gradients.v if backward else case.outputs.o
        damaged.view(-1)[:3] += 100
    assert prover.prove(variant, config, key, backward=backward) == want and want.status == "ok"
    kind = "wrong_backward" if backward else "wrong"
    assert prover.prove(variant, planted.Planted(kind), key, backward=backward).status == "wrong"


def test_what_a_candidate_raises_goes_through() -> None:
    for kind, status in (("no_memory", "oom"), ("compile_error", "compile_error"), ("raises", "crash")):
        with pytest.raises(Exception, match="planted") as caught:
            verdict(kind)
        assert classify(caught.value)[0] == status


def test_guards() -> None:
    guards = Guards()
    with guarded(guards):
        x = torch.empty(3, 5)
        y = x.new_empty((2, 7), dtype=torch.bfloat16)
        z = torch.empty_like(x.t())
        w = torch.empty(4)
        placed = guards.place(torch.arange(6.0).view(2, 3))
    assert torch.empty(3, 5).storage_offset() == 0, "the real functions are back"
    assert x.isnan().all() and y.isnan().all() and x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    assert z.stride() == torch.empty_like(x.t()).stride() and w.storage_offset() == 0
    assert placed.tolist() == [[0, 1, 2], [3, 4, 5]]
    x.fill_(1), y.fill_(1), placed.fill_(9)
    assert guards.broken() == 0
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(1)
    x.as_strided((1,), (1,), BAND // 4 - 1).fill_(1)
    assert guards.broken() == 2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["sm90", "cpu"]), st.booleans(), st.sampled_from([1, 2, 3, 7, 32, 150, 200]), st.sampled_from([1, 2, 3, 5, 16, 80]),
    st.sampled_from([1, 2, 8]), st.sampled_from([1, 17, 64, 100, 1000, 4096]), st.sampled_from(list(KINDS)),
)  # fmt: skip
def test_calls_have_their_key(arch: str, packed: bool, N: int, H: int, group: int, T: int, kind: str) -> None:
    """workload.make is the inverse of Problem.key: what is timed for a Key has it."""
    recurrence = registry.get_recurrence("scalar_decay")
    assert recurrence.workload is not None
    mean = -(-T // N) if packed else T
    key = problem(
        kind, device=hypothetical(arch), group=group, BH=N * H * group, T=T, N=N, packed=packed, mean_length=mean
    ).key()  # fmt: skip
    tensors, options = recurrence.workload.make(key, torch.device("meta"), 0)
    made = dataclasses.replace(recurrence.problem(tensors, options, True), device=key.device, interpret=False)
    assert made.key() == key
    _, h, hv = recurrence.workload.layout(key)
    assert (tensors.q.shape[2], tensors.v.shape[2]) == (h, hv)


def test_proofs_are_shared_by_lengths_alone() -> None:
    workload = registry.get_recurrence("scalar_decay").workload
    assert workload is not None
    base = problem()
    same = (
        {"T": 64, "mean_length": 64}, {"T": 32768, "mean_length": 32768}, {"N": 2, "BH": 64}, {"BH": 512, "N": 16}, {"grad": False},
        {"capture": True},
    )  # fmt: skip
    for changes in same:
        assert workload.proof_key(dataclasses.replace(base, **changes).key()) == workload.proof_key(base.key()), changes
    other = (
        {"K": 32}, {"V": 32}, {"group": 2}, {"packed": True, "mean_length": 64}, {"initial_state": False}, {"final_state": False},
        {"dtypes": (("qkv", "bfloat16"), ("g", "float32"))}, {"flags": (("decay", "none"), ("normalize", "false"))},
    )  # fmt: skip
    for changes in other:
        assert workload.proof_key(dataclasses.replace(base, **changes).key()) != workload.proof_key(base.key()), changes


def test_trials_cover_what_breaks_kernels() -> None:
    recurrence = registry.get_recurrence("scalar_decay")
    workload = recurrence.workload
    assert workload is not None
    config = recurrence.variant("chunk_triton").configs(problem(device=hypothetical("sm90")).key())[0]
    for packed in (False, True):
        key = workload.proof_key(problem(packed=packed, mean_length=64 if packed else 256, device=hypothetical("sm90")).key())
        trials = {t.name: t for t in workload.trials(key, config)}
        assert trials["odd"].problem.T % 2 and trials["odd"].problem.T <= 300
        assert trials["segments"].problem.T > 2 * config.SEG
        assert {"strong", "reset"} <= set(trials)
        wave = trials["wave"]
        blocks = wave.problem.BH
        assert wave.repeats >= 3 and blocks > wave.problem.device.units and wave.heads % 16 == 0
        assert all(sum(t.lengths) == t.problem.T and len(t.lengths) == t.problem.N for t in trials.values() if t.lengths is not None)
        assert (trials["odd"].lengths is not None) == packed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", ["retention", "gated_delta", "comba"])
def test_what_is_cut_into_segments_is_proven_across_their_ends(op: str, packed: bool) -> None:
    """Of every room: each config that cuts sequences has a trial with a sequence of more than two segments."""
    recurrence = registry.get_recurrence(registry.get_op(op).recurrence)
    workload = recurrence.workload
    assert workload is not None
    key = key_of(op, {"B": 1, "T": 16384, "H": 2}, hypothetical("sm90"), packed=packed)
    cut = [c for v in recurrence.variants for c in v.configs(key) if getattr(c, "SEG", 0)]
    assert cut
    for config in cut:
        longest = max(max(t.lengths or (t.problem.T,)) for t in workload.trials(workload.proof_key(key), config))
        assert longest > 2 * config.SEG, config


def test_infinite_errors_survive_in_records() -> None:
    found = verdict("unwritten")
    assert found.certificate is not None
    text = found.certificate.model_dump_json()
    assert type(found.certificate).model_validate_json(text).errors["o"] == math.inf
