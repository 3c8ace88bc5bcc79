"""benchmarks: what a run would measure, and what is made of its results; no run."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import fla_dispatch as fd
from benchmarks import first_call, peer_cells, peers, plot, tables

LENGTHS = (128, 2048)


def rows() -> list[dict[str, Any]]:
    """Results as benchmarks.peers writes them: every library at two lengths, a refusal, memory, a step, and mamba2."""
    made: list[dict[str, Any]] = []
    for T, (factor, name) in itertools.product(LENGTHS, enumerate(plot.LABELS, 1)):
        times = {"forward_ms": T * factor * 1e-4, "forward_graph_ms": T * factor * 9e-5, "both_ms": T * factor * 4e-4}
        made.append({"op": "retention", "shape": [8, T, 32, 128], "decode": False, "library": name, "problems": {}, **times})
    made[0]["errors"] = {"o": 2e-3, "dq": 3e-3, "dk": 4e-3}
    made[0] |= {"both_peak_mib": 33.2, "bound_mib": 40.8, "forward_over_floor": 1.25, "both_over_floor": 2.0}
    made[1]["problems"] = {"both": "refused: RuntimeError: not here"}
    step = {"op": "retention", "shape": [256, 1, 32, 128], "decode": True, "library": "ours", "problems": {}}
    mamba2 = {"op": "mamba2", "shape": [1, 16384, 64, 64], "state": 128, "decode": False, "library": "ours", "problems": {}}
    return [*made, step | {"state_bytes": 10**9, "forward_ms": 0.3, "forward_graph_ms": 0.25}, mamba2 | {"forward_ms": 0.1}]


def test_cells_hold_sdpa_once_for_each_shape() -> None:
    found = peers.cells(list(peers.ALL))
    assert len(set(found)) == len(found)
    softmax = [case.shape for case, name in found if name == "sdpa_flash"]
    assert len(set(softmax)) == len(softmax) == len({case.shape for case in peers.ALL if "sdpa_flash" in case.peers})


def test_cells_of_steps_and_of_an_op_without_a_peer() -> None:
    found = peers.cells(list(peers.ALL))
    steps = [(case.op, case.shape[0]) for case, name in found if name == "ours_step"]
    assert steps == list(itertools.product(("retention", "simple_gla", "gated_delta", "kda"), (256, 1)))
    assert [name for case, name in found if case.decode and case.op == "retention"] == ["ours", "fla", "ours_step"] * 2
    assert {name for case, name in found if case.op == "mamba2"} == {"ours"}
    assert {case.op for case in peers.CASES["tiny"]} == {case.op for case in peers.ALL}


def test_flash_qla_stands_beside_gated_delta_where_it_can() -> None:
    found = peers.cells(list(peers.DELTA))
    assert [name for case, name in found if case == peers.DELTA[0]] == ["ours", "fla", "flash_qla"]
    fit = [case for case in peers.DELTA if case.op == "gated_delta" and not case.decode and case.shape[3] == 128]
    assert [case for case, name in found if name == "flash_qla"] == fit and len(fit) == 5
    assert not any(name in peer_cells.SDPA for _, name in found)


def test_compile_jobs_of_all_but_fla_are_their_cells() -> None:
    jobs = [(case, name) for name, case, _, _ in peers.compile_jobs(list(peers.ALL)) if name != "fla"]
    compiled = ("ours", "ours_step", "flash_qla")
    assert jobs == [(case, name) for case, name in peers.cells(list(peers.ALL)) if name in compiled]


@pytest.mark.parametrize(("library", "function"), [("fla", "chunk"), ("fla", "fused_recurrent"), ("flash_qla", "chunk")])
def test_libraries_get_each_argument_in_its_role(library: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted functions whose arguments stand in another order than ours."""

    def planted(q: Any, k: Any, v: Any, g: Any = None, gk: Any = None, gv: Any = None, beta: Any = None, **other: Any) -> Any:
        assert gk is None and gv is None
        return fd.op("gated_delta", mode="chunk_torch")(q, k, v, g, beta, **other)

    name = "flash_qla" if library == "flash_qla" else "fla.ops.gated_delta_rule"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{f"{function}_gated_delta_rule": planted}))
    decode = function == "fused_recurrent"
    case = next(c for c in peers.CASES["tiny"] if c.op == "gated_delta" and c.decode == decode)
    found = peer_cells.errors(library, peer_cells.library(library, case), case, "cpu", not decode)
    assert found.keys() == ({"o", "state"} if decode else {"o", "dq", "dk", "dv", "dg", "dbeta"})
    assert all(error < 1e-2 for error in found.values()), found


def test_rows_are_judged_by_the_fewest_bytes() -> None:
    """mamba2: x, B, C, dt and o once; with gradients, that again with do for o, and a gradient of each input."""
    case = next(c for c in peers.ALL if c.op == "mamba2")
    o = x = 16384 * 64 * 64 * 2
    inputs = x + 16384 * (2 * 128 + 64) * 2 + 3 * 64 * 4  # A, D and the bias are float32 [H]
    row = peers.judged(case, "ours", {"forward_ms": 0.2, "problems": {}}, 4e12)
    assert row["floor_bytes"] == (inputs + o, 3 * inputs + 2 * o)
    assert row["forward_floor_ms"] == pytest.approx((inputs + o) / 4e9) and row["forward_over_floor"] == pytest.approx(
        0.2 / row["forward_floor_ms"]
    )
    assert "both_over_floor" not in row and "floor_bytes" not in peers.judged(case, "sdpa_flash", {}, 4e12)
    step = next(c for c in peers.ALL if c.decode)
    assert peers.judged(step, "ours_step", {}, None)["state_bytes"] == 2 * 256 * 32 * 128 * 128 * 4


def test_gated_delta_is_judged_by_the_fewest_bytes() -> None:
    case = peers.DELTA[0]
    x, rows = 4 * 4096 * 16 * 128 * 2, 4 * 4096 * 16 * 4  # g and beta are float32
    row = peers.judged(case, "flash_qla", {"problems": {}}, 4e12)
    assert row["floor_bytes"] == (4 * x + 2 * rows, 3 * (3 * x + 2 * rows) + 2 * x)
    assert row["bound_mib"] == pytest.approx(sum(row["bound_parts_mib"].values())) and row["bound_parts_mib"]["outputs"] == x / 2**20


@pytest.mark.parametrize("op", ["retention", "gated_delta", "kda"])
def test_steps_take_the_states_of_the_decoding_call(op: str) -> None:
    """The pool's slots hold them, in the order of the rows; a step gives what the call gives."""
    case = next(c for c in peers.CASES["tiny"] if c.decode and c.op == op)
    x = peer_cells.inputs_of(case, "cpu")
    found = {name: peer_cells.errors(name, peer_cells.library(name, case), case, "cpu", False) for name in ("ours", "ours_step")}
    assert found["ours"].keys() == found["ours_step"].keys() == {"o", "state"}
    assert all(error < 1e-2 for errors in found.values() for error in errors.values())
    step = peer_cells.stepping(x)
    pool, slots = step.args[-1], step.kwargs["slots"]
    assert pool.shape[0] > x.args[0].shape[0] and bool((pool[slots] == x.kwargs["initial_state"]).all())


def test_gradients_of_parameters_are_compared_too() -> None:
    """More rows than the two that are compared: A, D and the bias sum over rows."""
    for op, leaves in (("mamba2", ("x", "dt", "A", "B", "C", "D", "dt_bias")), ("comba", ("q", "k", "v", "p", "g", "beta"))):
        case = next(c for c in peers.CASES["tiny"] if c.op == op)
        case = case._replace(shape=(3, *case.shape[1:]))
        found = peer_cells.errors("ours", peer_cells.library("ours", case), case, "cpu", True)
        assert found.keys() == {"o", *(f"d{leaf}" for leaf in leaves)}
        assert all(error < 2e-2 for error in found.values()), found


def test_compile_jobs_take_cases_with_the_same_kernels_once() -> None:
    jobs = peers.compile_jobs(list(peers.ALL))
    fla = [(case.op, case.shape) for name, case, shard, _ in jobs if name == "fla" and shard == 0 and not case.decode]
    assert sorted(fla) == sorted(
        [
            ("retention", (4, 4096, 16, 128)), ("linear_attn normalized", (4, 4096, 16, 128)), ("simple_gla", (4, 4096, 16, 128)),
            ("retention", (8, 128, 32, 128)), ("retention", (1, 32768, 8, 128)), ("retention", (8, 2048, 32, 64)),
            *((case.op, case.shape) for case in peers.DELTA if not case.decode),
        ]
    )  # fmt: skip


def test_shards_compile_each_config_once() -> None:
    launched: list[int] = []
    for shard in range(4):
        once = peer_cells.compiled(shard, 4)(10)
        times = [once(lambda i=i: launched.append(i), quantiles=None)[0] for i in range(10)]
        assert times.index(min(times)) % 4 == shard
    assert sorted(launched) == list(range(10))


def test_autotuners_sample_with_what_they_are_given() -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    def kernel(x: Any) -> None: ...

    tuner = Autotuner(triton.jit(kernel), ["x"], [object(), object()], [], None, None)
    tuner.cache[()] = tuner.configs[0]
    peer_cells.bench_with(peer_cells.untuned)
    assert not tuner.cache and tuner.do_bench(lambda: 1 / 0, quantiles=None) == [1.0] * 3


def test_tables_of_peers() -> None:
    text = tables.table({"rows": rows()})
    first = "| retention | 8, 128, 32, 128 | ours | 0.013 | 0.012 | 1.25 | 0.051 | - | 2.00 | 33 | 41 | - / - | 2.0e-03 | 4.0e-03 (dk) |"
    assert first in text and "| mamba2 | 1, 16384, 64, 64, N = 128 | ours | 0.100 | - | - |" in text
    assert "| retention | 256, 32, 128 | ours | 0.3000 | 3.33 | 0.2500 | 4.00 | - | - | - |" in text
    assert "- retention (8, 128, 32, 128), fla: both: refused: RuntimeError: not here" in text


def test_plot_is_the_same_each_time_and_needs_all_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = json.loads(json.dumps({"machine": {"device": "H200"}, "rows": rows()}))
    for name in ("a.svg", "b.svg"):
        plot.draw(content, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and len(drawn) < 60_000
    assert all(label.encode() in drawn for label, _, _ in plot.LABELS.values())
    with pytest.raises(SystemExit):
        plot.draw({"rows": rows()[-1:]}, tmp_path / "c.svg")
    assert plot.apart([1.0, 1.1, 9.0], 1.5) == [1.0, 1.5, 9.0]


def test_first_calls_keep_what_a_process_that_is_cut_had_printed(tmp_path: Path) -> None:
    """The last whole document counts; what the process started ends with it."""
    code = (
        "import json, subprocess, sys, time; print('words'); print(json.dumps({'first_s': 1.5}), flush=True); print('{\"half', flush=True)"
    )
    slow = f"{code}; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    row = first_call.run(["-c", slow], tmp_path, tmp_path / "caches", 3.0)
    assert row["first_s"] == 1.5 and row["problem"] == "cut after 3 s" and 3 <= row["wall_s"] < 30
    failed = first_call.run(["-c", f"{code}; raise ValueError('not here')"], tmp_path, tmp_path / "caches", 30.0)
    assert failed["first_s"] == 1.5 and failed["problem"] == "ValueError: not here" and failed["exit_code"] == 1
    whole = first_call.run(["-c", code], tmp_path, tmp_path / "caches", 30.0)
    assert whole["first_s"] == 1.5 and "problem" not in whole
    text = tables.table({"processes": {"FLA": row, "ours": whole | {"second_s": 0.5}}})
    assert "| FLA (cut after 3 s) | 1.500 | - | 0 |" in text and "| ours | 1.500 | 0.5000 | 0 |" in text
