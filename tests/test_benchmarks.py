"""benchmarks: what a run would measure, and what is made of its results; no run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_cells, peers, plot, tables

LENGTHS = (128, 2048)


def rows() -> list[dict[str, Any]]:
    """Results as benchmarks.peers writes them: every library at two lengths, a refusal, and a step."""
    made: list[dict[str, Any]] = []
    for T, (factor, name) in itertools.product(LENGTHS, enumerate(plot.LABELS, 1)):
        times = {"forward_ms": T * factor * 1e-4, "forward_graph_ms": T * factor * 9e-5, "both_ms": T * factor * 4e-4}
        made.append({"op": "retention", "shape": [8, T, 32, 128], "decode": False, "library": name, "problems": {}, **times})
    made[0]["errors"] = {"o": 2e-3, "dq": 3e-3, "dk": 4e-3}
    made[1]["problems"] = {"both": "refused: RuntimeError: not here"}
    step = {"op": "retention", "shape": [256, 1, 32, 128], "decode": True, "library": "ours", "problems": {}}
    return [*made, step | {"state_bytes": 10**9, "forward_ms": 0.3, "forward_graph_ms": 0.25}]


def test_cells_hold_sdpa_once_for_each_shape() -> None:
    found = peers.cells(list(peers.ALL))
    assert len(set(found)) == len(found)
    softmax = [case.shape for case, name in found if name == "sdpa_flash"]
    assert len(set(softmax)) == len(softmax) == len({case.shape for case in peers.ALL if not case.decode})


def test_compile_jobs_take_cases_with_the_same_kernels_once() -> None:
    jobs = peers.compile_jobs(list(peers.ALL))
    fla = [(case.op, case.shape) for name, case, shard, _ in jobs if name == "fla" and shard == 0 and not case.decode]
    assert sorted(fla) == sorted(
        [
            ("retention", (4, 4096, 16, 128)), ("linear_attn normalized", (4, 4096, 16, 128)), ("simple_gla", (4, 4096, 16, 128)),
            ("retention", (8, 128, 32, 128)), ("retention", (1, 32768, 8, 128)), ("retention", (8, 2048, 32, 64)),
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
    assert "| retention | 8, 128, 32, 128 | ours | 0.013 | 0.012 | 0.051 | - | - | - / - | 2.0e-03 | 4.0e-03 (dk) |" in text
    assert "| retention | 256, 32, 128 | ours | 0.3000 | 0.2500 | 4.00 | - | - | - |" in text
    assert "- retention (8, 128, 32, 128), fla: both: refused: RuntimeError: not here" in text


def test_plot_is_the_same_each_time_and_needs_all_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = json.loads(json.dumps({"machine": {"device": "H200"}, "rows": rows()}))
    for name in ("a.svg", "b.svg"):
        plot.draw(content, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and len(drawn) < 60_000
    assert all(label.encode() in drawn for label, _ in plot.LABELS.values())
    with pytest.raises(SystemExit):
        plot.draw({"rows": rows()[-1:]}, tmp_path / "c.svg")
    assert plot.apart([1.0, 1.1, 9.0], 1.5) == [1.0, 1.5, 9.0]
