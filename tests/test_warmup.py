"""Warmup: the calls of a model and their keys, what is missing, measured and left; on a CPU, where torch variants run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run  # noqa: F401  the command line as a fixture
from tiering import CPU, Shelves, outcome, record, shelves

import fla_dispatch as fd
from fla_dispatch import registry
from fla_dispatch.device import hypothetical, profile
from fla_dispatch.dispatch import miss, warm
from fla_dispatch.errors import CallError, JitError, UnknownNameError
from fla_dispatch.tuning import search
from fla_dispatch.tuning.warmup import Call, model_calls, parse_numbers, read_workload

SMALL: dict[str, Any] = {"dtype": "float32", "heads": 2, "head_dim": 16, "batch": (1,)}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelves]:
    """A store of its own, and a tuner that trusts its candidates and takes few samples."""
    monkeypatch.setattr(search, "tune", functools.partial(search.tune, isolate=False, key_seconds=0.01))
    with shelves(tmp_path) as found:
        yield found


def measure(shelf: Shelves, *calls: Call) -> None:
    """Records as if the calls had been tuned."""
    for call in calls:
        key = call.key(profile(CPU))
        for direction in ("forward", "backward")[: 2 if call.grad else 1]:
            shelf.put("user", record(key, outcome("chunk_torch"), direction=direction))


@pytest.mark.parametrize(
    "text, numbers",
    [
        (64, (64,)), ("64", (64,)), ("1,64", (1, 64)), ([3, 5], (3, 5)), ("1:64", (1, 16, 32, 64)), ("100:1000", (128, 256, 512, 1000)),
        ("64:64", (64,)),
    ],
)  # fmt: skip
def test_numbers(text: Any, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text, "x") == numbers


@pytest.mark.parametrize("text", ["", "a", "4:2", "0:4", "0", [], [0], ["4"], True, 1.5, None])
def test_bad_numbers(text: Any) -> None:
    with pytest.raises(CallError, match="x: expected"):
        parse_numbers(text, "x")


def test_training_calls() -> None:
    calls = model_calls(
        "simple_gla", "train", heads=4, value_heads=8, head_dim=64, value_dim=128, batch=(1, 2), lengths=(64, 100), layout="both"
    )
    assert len(calls) == 8 and all(c.grad and not c.initial_state and not c.final_state for c in calls)
    assert {(c.size("B"), c.size("T"), c.packed) for c in calls} == {(b, t, p) for b in (1, 2) for t in (64, 100) for p in (False, True)}
    key = calls[0].key(hypothetical("sm90"))
    assert (key.K, key.V, key.group, key.BH, key.T, key.grad) == (64, 128, 2, 8, 64, True) and key.device.arch == "sm90"


def test_serving_calls() -> None:
    """Prefill with and without a state to go on from, and decode: one token for each batch, as a call and as steps."""
    calls = model_calls("mamba2", "serve", heads=4, head_dim=32, state_dim=64, batch=(1, 3), lengths=(64, 128))
    steps = [c for c in calls if c.op == "mamba2_step"]
    assert sorted(c.size("B") for c in steps) == [1, 1, 3, 3] and not any(c.grad for c in calls)
    calls = [c for c in calls if c.op == "mamba2"]
    assert len(calls) == 2 * 2 * 2 + 2 and all(c.final_state for c in calls)
    assert sorted(c.size("B") for c in calls if c.size("T") == 1) == [1, 3]
    keys = {c.key(profile(CPU)) for c in (*calls, *steps)}
    assert {(k.K, k.V) for k in keys} == {(64, 32)} and {k.T for k in keys} == {1, 64, 128}


def test_wrong_names() -> None:
    with pytest.raises(UnknownNameError, match="state_dim"):
        model_calls("retention", "train", state_dim=4)
    with pytest.raises(UnknownNameError, match="no size named"):
        model_calls("retention", "train", sizes={"Q": 4})
    with pytest.raises(UnknownNameError, match="train, serve"):
        model_calls("retention", "infer")


def test_workload_file(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(
        '[[call]]\nop = ["retention", "simple_gla"]\nheads = [2, 4]\nhead_dim = 16\nbatch = 1\nlength = "16:64"\npacked = "both"\n'
        '[[call]]\nop = "mamba2"\nuse = "serve"\nsizes = {H = 2, P = 16, N = 16}\nlength = [64]\nbatch = [2]\ndtype = "float32"\n'
    )
    calls = read_workload(path)
    assert len(calls) == 2 * 2 * 3 * 2 + 3 + 2 and len({c.text() for c in calls}) == len(calls)
    for bad in (
        "",
        "[[call]]\nheads = 2\n",
        '[[call]]\nop = "retention"\ncolour = 1\n',
        "x",
        '[[call]]\nop = "retention"\nlength = "a"\n',
        '[[call]]\nop = "retention"\noptions = 3\n',
    ):
        path.write_text(bad)
        with pytest.raises(CallError):
            read_workload(path)


def test_options_of_a_workload(tmp_path: Path) -> None:
    """They reach the op and its step, whose keys name what the step does inside."""
    path = tmp_path / "model.toml"
    path.write_text(
        '[[call]]\nop = ["gated_delta", "kda"]\nheads = 2\nhead_dim = 16\nuse = "serve"\nbatch = 2\nlength = 64\noptions = {raw = true}\n'
    )
    calls = read_workload(path)
    assert all(("raw", True) in c.options and "raw=True" in c.text() for c in calls) and len(calls) == 2 * (2 + 1 + 2)
    keys = [c.key(profile(CPU)) for c in calls if c.op.endswith("_step")]
    assert {k.flag("decay") for k in keys} == {"token", "channel"}
    for key in keys:
        assert (key.flag("l2norm"), key.flag("weight"), key.flag("gate")) == ("true", "sigmoid", "softplus")
    for call in calls:
        warm.launch(call, CPU)


@pytest.mark.parametrize("name", registry.op_names())
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_has_the_key_that_it_says(name: str, packed: bool, shelf: Shelves) -> None:
    """The warmed-up key is the one of the real call: run it and see under which key it was missed."""
    miss.missed.clear()
    sizes = registry.get_op(name).sizes
    step = "T" not in sizes
    if step and packed:
        pytest.skip("a step has no packs")
    small = {**sizes, "B": 2, "H": 2} | ({} if step else {"T": 20})
    options = (("pool", "slots"), ("state_dtype", "bfloat16")) if step else ()
    call = Call(name, tuple(small.items()), "float32", packed, not step, options=options)
    warm.launch(call, CPU)
    assert list(miss.missed) == [call.key(profile(CPU))]


def test_missing_measured_and_left(shelf: Shelves) -> None:
    calls = model_calls("retention", "train", lengths=(16, 33), **SMALL)
    keys = [c.key(profile(CPU)) for c in calls]
    assert warm.missing(keys) == keys
    assert [x.what for x in warm.what_is_left(calls, CPU)] == ["measure", "measure"]
    assert warm.tune_missing(keys[:1], CPU, 30.0) == [] and warm.missing(keys) == keys[1:]
    measure(shelf, calls[1])
    assert warm.launch_all(calls, CPU) == [] and warm.what_is_left(calls, CPU) == []


def test_what_would_compile_is_left(shelf: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call runs once more, one token shorter too, with compilations ruled out."""
    calls = model_calls("retention", "train", lengths=(64,), **SMALL)
    measure(shelf, *calls)
    lengths = []

    def launch(call: Call, device: torch.device) -> None:
        lengths.append(call.size("T"))
        if call.size("T") == 63:
            raise JitError("the kernel sweep was compiled. To fix: no")

    monkeypatch.setattr(warm, "launch", launch)
    left = warm.what_is_left(calls, CPU)
    assert lengths == [64, 63] and [(x.what, x.detail) for x in left] == [("compile", "the kernel sweep was compiled")]


def test_shorter_calls_stay_in_their_bucket() -> None:
    lengths = {T: model_calls("retention", "train", lengths=(T,), **SMALL)[0].shorter() for T in (1, 2, 17, 18, 64, 65, 66)}
    assert {T: s and s.size("T") for T, s in lengths.items()} == {1: None, 2: None, 17: None, 18: 17, 64: 63, 65: None, 66: 65}


def test_command(shelf: Shelves, run: Any, tmp_path: Path) -> None:  # noqa: F811  the fixture
    path = tmp_path / "model.toml"
    path.write_text('[[call]]\nop = "retention"\nheads = 2\nhead_dim = 16\nbatch = 1\nlength = 64\ndtype = "float32"\n')
    arguments = ["warmup", "--workload", str(path), "--device", "cpu"]
    code, out, _ = run(*arguments, "--check", "--json")
    found = json.loads(out)
    assert code == 1 and found["missing"] == 1 and [x["what"] for x in found["left"]] == ["measure"] and found["measured"] == 0
    code, out, _ = run(*arguments, "--strict", "--json")
    found = json.loads(out)
    assert code == 0 and found["measured"] == 1 and found["left"] == [] and found["still_missing"] == []
    code, out, _ = run(*arguments, "--check")
    assert code == 0 and "nothing is left" in out
    code, out, _ = run(*arguments, "--budget", "0", "--strict", "--json")
    assert code == 0 and json.loads(out)["missing"] == 0  # nothing was missing
    assert run("warmup", "--device", "cpu")[0] == 2 and run("warmup", "--op", "retention", "--length", "x")[0] == 2
    args, kwargs = registry.get_op("retention").example({"B": 1, "T": 50, "H": 2, "HV": 2, "K": 16, "V": 16}, torch.float32, "cpu")
    assert fd.op("retention").explain(*args, **kwargs).tier == "estimate"  # a call without gradients is another key


def test_budget_that_is_spent(shelf: Shelves, run: Any) -> None:  # noqa: F811  the fixture
    arguments = ["--op", "retention", "--heads", "2", "--head-dim", "16", "--dtype", "float32", "--batch", "1", "--length", "64"]
    code, out, _ = run("warmup", *arguments, "--device", "cpu", "--budget", "0", "--json")
    found = json.loads(out)
    assert code == 1 and len(found["still_missing"]) == 1 and found["measured"] == 0
